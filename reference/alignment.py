"""Alignment: the scale and shift that make two inverse depths comparable (paper section 4; MiDaS, TPAMI 2020, section 5).

Inverse depth is known up to a scale and a shift only, so the loss compares maps after removing both, image by image:

    align_median         d^ = (d - t) / s,  t = median(d),  s = mean |d - t|      from one map alone
    align_least_squares  d^ = s d + t,  (s, t) = argmin sum (s d + t - d*)^2      from a map d and its target d*

Maps are (B, H, W), any positive scale; masks are (B, H, W) bool, True where a pixel is valid. Only valid pixels are ever read:
whatever stands at the others (NaN, inf, 0) changes nothing. Results are 0 there, as are gradients, and an image without a
valid pixel is 0 everywhere. Every function returns its result and its vjp and keeps its input's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .nn.selection import lower_median

SMALLEST_DEVIATION = 1e-6  # s(d) of the median alignment is clamped here


class LeastSquares(NamedTuple):
    """Per image: scale (B,), shift (B,), and whether the normal equations were singular (B,) bool."""

    scale: np.ndarray
    shift: np.ndarray
    singular: np.ndarray


class MedianDeviation(NamedTuple):
    """Per image: the median t (B,) and the mean absolute deviation from it s (B,)."""

    median: np.ndarray
    deviation: np.ndarray


def median_and_deviation(d: np.ndarray, mask: np.ndarray) -> tuple[MedianDeviation, Callable]:
    """Per image, the lower median t and the mean absolute deviation s = mean |d - t| of the valid pixels of d (B, H, W).

    Returns MedianDeviation and vjp(dt (B,), ds (B,)) -> dd. s is at least 1e-6, with no gradient where it was clamped; t = 0 and
    s = 1e-6 where no pixel is valid.
    """
    flat, valid, zero = d.reshape(len(d), -1), mask.reshape(len(d), -1), d.dtype.type(0)
    t, first = lower_median(flat, valid)  # equal values: the first in row-major order takes the whole gradient
    count = np.maximum(valid.sum(axis=1), 1).astype(d.dtype)
    centred = np.where(valid, flat, t[:, None]) - t[:, None]
    mean = np.abs(centred).sum(axis=1) / count
    clamped = mean < SMALLEST_DEVIATION

    def vjp(dt: np.ndarray, ds: np.ndarray) -> np.ndarray:
        dd = np.sign(centred) * (np.where(clamped, zero, ds) / count)[:, None]  # the gradient of |x| is 0 at x = 0
        rows = np.flatnonzero(valid.any(axis=1))
        dd[rows, first[rows]] += dt[rows] - dd[rows].sum(axis=1)  # all pixels are measured from t
        return dd.reshape(d.shape)

    return MedianDeviation(t, np.where(clamped, d.dtype.type(SMALLEST_DEVIATION), mean)), vjp


def align_median(d: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Callable]:
    """Align each image of d (B, H, W) by its own lower median and mean absolute deviation, over its valid pixels.

    Returns d^ (B, H, W) and vjp(dd^) -> dd. Gradients flow through t and s. Where the valid pixels are constant, s is 1e-6 and
    d^ is 0. For any a > 0 and b, a * d + b has the same d^.
    """
    (t, s), statistics_vjp = median_and_deviation(d, mask)
    t, s, zero = t[:, None, None], s[:, None, None], d.dtype.type(0)
    aligned = (np.where(mask, d, t) - t) / s

    def vjp(daligned: np.ndarray) -> np.ndarray:
        direct = np.where(mask, daligned, zero) / s
        return direct + statistics_vjp(-direct.sum(axis=(1, 2)), -(direct * aligned).sum(axis=(1, 2)))

    return aligned, vjp


def is_constant(d: np.ndarray) -> bool:
    """Whether the values d (M,) differ by no more than rounding, so that no scale can be read off them.

    Decided from the extreme values, which are exact in any order of evaluation, and never from a determinant, which is not. The
    second term is where the square of a difference would underflow.
    """
    limits = np.finfo(d.dtype)
    threshold = d.dtype.type(8 * limits.eps) * np.abs(d).max() + d.dtype.type(math.sqrt(limits.tiny))
    return bool(d.max() - d.min() <= threshold)


def _fit(d: np.ndarray, target: np.ndarray) -> tuple[Any, Any, bool, Callable]:
    """Solve the 2x2 normal equations of one image's valid pixels d, target (M,): scale, shift, singular, vjp."""
    count = d.dtype.type(len(d))
    # Sums start from the smallest value: a large common offset costs no digits, and constant maps give exact zeros.
    x, y = d - d.min(), target - target.min()
    x_mean, y_mean = x.sum() / count, y.sum() / count
    d_mean, target_mean = d.min() + x_mean, target.min() + y_mean
    if is_constant(d):
        return d.dtype.type(0), target_mean, True, lambda dscale, dshift: np.zeros_like(d)
    x, y = x - x_mean, y - y_mean
    variance = (x * x).sum()  # of d, times M: the determinant of the normal equations over M
    scale = (x * y).sum() / variance

    def vjp(dscale: Any, dshift: Any) -> np.ndarray:
        dscale_total = dscale - dshift * d_mean
        return (dscale_total / variance) * (y - 2 * scale * x) - dshift * scale / count

    return scale, target_mean - scale * d_mean, False, vjp


def least_squares(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[LeastSquares, Callable]:
    """Per image, the scale s and shift t that minimise sum (s * prediction + t - target)^2 over the valid pixels.

    prediction, target, mask: (B, H, W). Returns LeastSquares and vjp(dscale (B,), dshift (B,)) -> dprediction; the target gets
    no gradient. The normal equations are singular exactly where the valid predictions are constant (one pixel, or none, is), to
    within 8 eps of the largest: then s = 0, t = mean target, which is a minimiser, and no gradient flows. Without a valid pixel
    t = 0.
    """
    images = len(prediction)
    scale, shift = np.zeros(images, prediction.dtype), np.zeros(images, prediction.dtype)
    singular = np.ones(images, bool)
    vjps: list[tuple[int, Callable]] = []
    for b in range(images):
        if mask[b].any():
            scale[b], shift[b], singular[b], vjp_b = _fit(prediction[b, mask[b]], target[b, mask[b]])
            vjps.append((b, vjp_b))

    def vjp(dscale: np.ndarray, dshift: np.ndarray) -> np.ndarray:
        dprediction = np.zeros_like(prediction)
        for b, vjp_b in vjps:
            dprediction[b, mask[b]] = vjp_b(dscale[b], dshift[b])
        return dprediction

    return LeastSquares(scale, shift, singular), vjp


def scale_and_shift(d: np.ndarray, scale: np.ndarray, shift: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Callable]:
    """scale * d + shift at the valid pixels: d (B, H, W), scale (B,), shift (B,). vjp(dy) -> (dd, dscale, dshift)."""
    d = np.where(mask, d, d.dtype.type(0))
    y = np.where(mask, scale[:, None, None] * d + shift[:, None, None], d.dtype.type(0))

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dy = np.where(mask, dy, d.dtype.type(0))
        return scale[:, None, None] * dy, (dy * d).sum(axis=(1, 2)), dy.sum(axis=(1, 2))

    return y, vjp


def align_least_squares(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Callable]:
    """Align each prediction (B, H, W) to its target by `least_squares`. Returns d^ (B, H, W) and vjp(dd^) -> dprediction."""
    fit, fit_vjp = least_squares(prediction, target, mask)
    aligned, apply_vjp = scale_and_shift(prediction, fit.scale, fit.shift, mask)

    def vjp(daligned: np.ndarray) -> np.ndarray:
        direct, dscale, dshift = apply_vjp(daligned)
        return direct + fit_vjp(dscale, dshift)

    return aligned, vjp
