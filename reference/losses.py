"""Losses: scale-and-shift-invariant depth and semantic segmentation (paper sections 4 and 5; MiDaS, TPAMI 2020, section 5).

Depth, per image, on inverse depth, over its M valid pixels, with d^ and d*^ the aligned prediction and target and R = d^ - d*^:

    L_ssitrim = 1/(2M) * sum of the U_m smallest |R_i|,  U_m = floor(0.8 M)
    L_reg     = sum over scales k = 0..3 of 1/M_k * sum (|dR/dx| + |dR/dy|),  scale k being every 2^k-th pixel
    loss      = mean over the images of L_ssitrim + 0.5 L_reg

Maps are (B, H, W), masks (B, H, W) bool, True where valid; per-image losses are (B,), losses scalars of the prediction's dtype.
Each function returns its result and its vjp. |x| has gradient 0 at 0; the target gets no gradient; an image without a valid
pixel has loss 0 and gradient 0; values at invalid pixels are never read.

Segmentation: cross-entropy of the logits plus 0.2 times that of the auxiliary logits, each resized to the labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import nn
from .alignment import align_least_squares, align_median, is_constant, least_squares, median_and_deviation, scale_and_shift
from .nn.differences import absolute_differences, absolute_differences_adjoint
from .nn.selection import smallest


def _check(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> None:
    """Raise ValueError unless the three are (B, H, W) with at least one pixel, the mask is bool and valid pixels are finite."""
    if prediction.dtype not in (np.float32, np.float64):
        raise ValueError(f"prediction has dtype {prediction.dtype}: expected float32 or float64")
    if prediction.ndim != 3 or prediction.size == 0:
        raise ValueError(f"prediction has shape {prediction.shape}: expected (B, H, W) with at least one pixel")
    for name, array in (("target", target), ("mask", mask)):
        if array.shape != prediction.shape:
            raise ValueError(f"{name} has shape {array.shape}: expected {prediction.shape}, the shape of the prediction")
    if mask.dtype != bool:
        raise ValueError(f"mask has dtype {mask.dtype}: expected bool, True at the valid pixels")
    for name, array in (("prediction", prediction), ("target", target)):
        bad = np.argwhere(mask & ~np.isfinite(array))
        if len(bad):
            b, y, x = (int(i) for i in bad[0])
            raise ValueError(f"{name}[{b}, {y}, {x}] is {array[b, y, x]}: expected a finite value at every valid pixel")


def trimmed_absolute(residual: np.ndarray, mask: np.ndarray, kept: float = 0.8) -> tuple[np.ndarray, Callable]:
    """L_ssitrim per image (B,): the sum of the floor(kept * M) smallest |R| over 2M. Ties go to the earlier pixel.

    residual, mask: (B, H, W). vjp(dloss (B,)) -> dresidual. The trimmed pixels, the largest residuals, get no gradient.
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"kept={kept}: expected a fraction of the valid pixels, between 0 and 1")
    count = mask.sum(axis=(1, 2))
    magnitude = np.abs(residual)
    used = [math.floor(kept * int(n)) for n in count]
    flat = len(residual), -1
    chosen = smallest(magnitude.reshape(flat), mask.reshape(flat), np.array(used, np.intp)).reshape(residual.shape)
    share = (1 / np.maximum(2 * count, 1)).astype(residual.dtype)
    zero = residual.dtype.type(0)

    def vjp(dloss: np.ndarray) -> np.ndarray:
        return np.sign(np.where(chosen, residual, zero)) * (dloss * share)[:, None, None]

    return np.where(chosen, magnitude, zero).sum(axis=(1, 2)) * share, vjp


def _differences(residual: np.ndarray, mask: np.ndarray, scale: int) -> tuple[np.ndarray, np.ndarray, Callable]:
    """Per image, the sum of |dR/dx| + |dR/dy| over every 2^scale-th pixel (B,), and the number of valid pixels there (B,).

    A difference counts where both of its pixels are valid. vjp(dsum (B,)) -> dresidual (B, H, W).
    """
    step = (slice(None), slice(None, None, 2**scale), slice(None, None, 2**scale))
    r, valid = residual[step], mask[step]

    def vjp(dsum: np.ndarray) -> np.ndarray:
        dresidual = np.zeros_like(residual)
        dresidual[step] = absolute_differences_adjoint(dsum, r, valid)
        return dresidual

    return absolute_differences(r, valid), valid.sum(axis=(1, 2)), vjp


def gradient_matching(residual: np.ndarray, mask: np.ndarray, scales: int = 4) -> tuple[np.ndarray, Callable]:
    """L_reg per image (B,): over the scales, the summed absolute differences of R divided by the valid pixels of that scale.

    residual, mask: (B, H, W). vjp(dloss (B,)) -> dresidual. A scale without a valid pixel adds 0.
    """
    loss = np.zeros(len(residual), residual.dtype)
    parts = []
    for scale in range(scales):
        total, count, vjp_scale = _differences(residual, mask, scale)
        share = (1 / np.maximum(count, 1)).astype(residual.dtype)
        loss += total * share
        parts.append((share, vjp_scale))

    def vjp(dloss: np.ndarray) -> np.ndarray:
        dresidual = np.zeros_like(residual)
        for share, vjp_scale in parts:
            dresidual += vjp_scale(dloss * share)
        return dresidual

    return loss, vjp


def _by_median(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Callable]:
    """R with each map aligned by its own median and deviation."""
    aligned, vjp = align_median(prediction, mask)
    return aligned - align_median(target, mask)[0], vjp


def _by_least_squares(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, Callable]:
    """R with the prediction aligned to the target, which is used as it is."""
    aligned, vjp = align_least_squares(prediction, target, mask)
    return aligned - np.where(mask, target, 0), vjp


ALIGNMENTS: dict[str, Callable] = {"median": _by_median, "least_squares": _by_least_squares}


def depth_loss(
    prediction: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    alignment: str = "median",
    kept: float = 0.8,
    scales: int = 4,
    gradient_weight: float = 0.5,
) -> tuple[Any, Callable]:
    """The trimmed scale-and-shift-invariant loss with gradient matching (MiDaS section 5, equations for L_ssitrim and L_reg).

    prediction: inverse depth (B, H, W), float32 or float64, any scale. target: inverse depth, computed with in the prediction's
    dtype. mask: bool. alignment: "median" or "least_squares". Returns the loss, a scalar, and vjp(dloss) -> dprediction.
    The batch loss is the mean over all images, those without a valid pixel (which contribute 0) included.
    Raises ValueError for shapes that differ, a mask that is not bool, an unknown alignment, `kept` outside [0, 1], and a value
    that is not finite at a valid pixel.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"unknown alignment {alignment!r}: expected one of {', '.join(ALIGNMENTS)}")
    _check(prediction, target, mask)
    residual, align_vjp = ALIGNMENTS[alignment](prediction, target.astype(prediction.dtype), mask)
    trimmed, trimmed_vjp = trimmed_absolute(residual, mask, kept)
    matching, matching_vjp = gradient_matching(residual, mask, scales)
    images = prediction.dtype.type(len(prediction))
    weight = prediction.dtype.type(gradient_weight)

    def vjp(dloss: Any) -> np.ndarray:
        each = np.full(len(prediction), dloss / images, prediction.dtype)
        return align_vjp(trimmed_vjp(each) + matching_vjp(weight * each))

    return (trimmed + weight * matching).sum() / images, vjp


def published_snippet_loss(
    prediction: np.ndarray, target: np.ndarray, mask: np.ndarray, scales: int = 4, gradient_weight: float = 0.5
) -> tuple[Any, Callable]:
    """The loss of the snippet that the authors posted, kept for comparison: not the loss of their paper.

    Half the mean squared residual after least squares, untrimmed, and gradient matching; both "batch based": summed over the
    batch and divided by its number of valid pixels (at each scale), a divisor of 0 giving 0. Where the normal equations are
    singular, scale and shift are both 0. Shapes, dtypes and errors as in `depth_loss`. vjp(dloss) -> dprediction.
    """
    _check(prediction, target, mask)
    dtype = prediction.dtype
    target = np.where(mask, target, 0).astype(dtype)
    fit, fit_vjp = least_squares(prediction, target, mask)
    shift = np.where(fit.singular, dtype.type(0), fit.shift)
    aligned, apply_vjp = scale_and_shift(prediction, fit.scale, shift, mask)
    residual = aligned - target
    share = dtype.type(1 / max(2 * int(mask.sum()), 1))
    loss = (residual * residual).sum() * share
    parts = []
    for scale in range(scales):
        total, count, vjp_scale = _differences(residual, mask, scale)
        weight = dtype.type(gradient_weight / max(int(count.sum()), 1))
        loss += total.sum() * weight
        parts.append((weight, vjp_scale))

    def vjp(dloss: Any) -> np.ndarray:
        dloss = dtype.type(dloss)
        dresidual = (2 * dloss * share) * residual
        for weight, vjp_scale in parts:
            dresidual += vjp_scale(np.full(len(prediction), dloss * weight, dtype))
        direct, dscale, dshift = apply_vjp(dresidual)
        return direct + fit_vjp(dscale, dshift)

    return loss, vjp


def _correlation(x: np.ndarray, y: np.ndarray) -> tuple[Any, Callable]:
    """1 - r of two maps' valid pixels x, y (M,), neither of them constant; vjp(dloss) -> dx."""
    x, y = x - x.min(), y - y.min()  # sums start from the smallest value: a large common offset costs no digits
    x, y = x - x.mean(), y - y.mean()
    x_norm, y_norm = np.sqrt((x * x).sum()), np.sqrt((y * y).sum())
    r = (x * y).sum() / (x_norm * y_norm)
    return 1 - r, lambda dloss: dloss * (r * x / x_norm - y / y_norm) / x_norm


def correlation_loss(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[Any, Callable]:
    """1 - r, r the correlation of prediction and target over an image's valid pixels, averaged over the images: in [0, 2].

    Not a loss of the paper: a start for training from scratch, from which `depth_loss` alone may never leave the
    image-independent solution. Smooth, and as blind to scale and shift. An image whose valid predictions or targets are constant
    (one pixel is, and none) has no correlation: it contributes 0. Shapes, dtypes and errors as in `depth_loss`. Returns the
    loss, a scalar, and vjp(dloss) -> dprediction.
    """
    _check(prediction, target, mask)
    dtype = prediction.dtype
    target = target.astype(dtype)
    loss, vjps = dtype.type(0), []
    for b in range(len(prediction)):
        x, y = prediction[b, mask[b]], target[b, mask[b]]
        if len(x) and not is_constant(x) and not is_constant(y):
            loss_b, vjp_b = _correlation(x, y)
            loss += loss_b / dtype.type(len(prediction))
            vjps.append((b, vjp_b))

    def vjp(dloss: Any) -> np.ndarray:
        dprediction = np.zeros_like(prediction)
        for b, vjp_b in vjps:
            dprediction[b, mask[b]] = vjp_b(dtype.type(dloss) / dtype.type(len(prediction)))
        return dprediction

    return loss, vjp


ANCHOR = 3.0
"""Where `anchor_loss` wants the median, with a deviation of 1: the farthest pixels then lie above zero too."""


def anchor_loss(prediction: np.ndarray, mask: np.ndarray) -> tuple[Any, Callable]:
    """(log S)^2 + (T - 3)^2, T and S the batch's mean median and mean deviation: 0 where S = 1 and T = 3.

    Not a loss of the paper, whose loss is blind to the scale and shift of a prediction, as `correlation_loss` is: from random
    weights both drift, by many orders of magnitude, until what depends on the image is lost in rounding. This holds them in
    place and asks nothing else. prediction (B, H, W), mask bool (B, H, W); T and S are averaged over the images with a valid
    pixel, the loss is 0 where there is none. Errors as in `depth_loss`. Returns a scalar and vjp(dloss) -> dprediction.
    """
    _check(prediction, prediction, mask)
    dtype = prediction.dtype
    (median, deviation), statistics_vjp = median_and_deviation(prediction, mask)
    known = mask.any(axis=(1, 2))
    if not known.any():
        return dtype.type(0), lambda dloss: np.zeros_like(prediction)
    share = known.astype(dtype) / dtype.type(known.sum())
    t, s = (median * share).sum(), (deviation * share).sum()
    excess = t - dtype.type(ANCHOR)

    def vjp(dloss: Any) -> np.ndarray:
        return statistics_vjp(dtype.type(dloss) * 2 * excess * share, dtype.type(dloss) * 2 * np.log(s) / s * share)

    return np.log(s) ** 2 + excess**2, vjp


def _check_labels(labels: np.ndarray, batch: int, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError unless labels are integers (B, H, W), each a class or `ignore_index`."""
    if labels.ndim != 3 or len(labels) != batch or labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels have shape {labels.shape} and dtype {labels.dtype}: expected integers ({batch}, H, W)")
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        expected = f"expected a class from 0 to {num_classes - 1}, or {ignore_index} to ignore a pixel"
        raise ValueError(f"labels hold {int(labels[wrong][0])}: {expected}")


def _cross_entropy(logits: np.ndarray, labels: np.ndarray, ignore_index: int) -> tuple[Any, Callable]:
    """Mean of -log softmax(logits)[label] over the pixels that are not ignored, 0 if all are: (B, K, h, w), (B, H, W)."""
    logits, resize_vjp = nn.resize_bilinear(logits, labels.shape[1:], True)
    valid = labels != ignore_index
    classes = np.where(valid, labels, 0).astype(np.intp)[:, None]
    share = logits.dtype.type(1 / max(int(valid.sum()), 1))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(log_probability, classes, axis=1)[:, 0]
    loss = -chosen[valid].sum() * share

    def vjp(dloss: Any) -> np.ndarray:
        dlogits = np.exp(log_probability)  # the probabilities
        np.put_along_axis(dlogits, classes, np.take_along_axis(dlogits, classes, axis=1) - 1, axis=1)
        return resize_vjp(np.where(valid[:, None], dlogits * (logits.dtype.type(dloss) * share), logits.dtype.type(0)))

    return loss, vjp


def segmentation_loss(
    logits: np.ndarray,
    auxiliary: np.ndarray | None,
    labels: np.ndarray,
    auxiliary_weight: float = 0.2,
    ignore_index: int = 255,
) -> tuple[Any, Callable]:
    """Cross-entropy plus `auxiliary_weight` times the auxiliary head's (paper section 5.2).

    logits (B, K, h, w), auxiliary (B, K, h', w') or None (a model in evaluation), float32 or float64, of any resolution: each is
    resized to the labels, bilinear, align_corners=True. labels (B, H, W), integers, averaged over the pixels that are not
    `ignore_index`; if all are, the loss and its gradient are 0. Returns the loss, a scalar, and
    vjp(dloss) -> (dlogits, dauxiliary), dauxiliary None where auxiliary is. Raises ValueError for a label that is no class.
    """
    _check_labels(labels, len(logits), logits.shape[1], ignore_index)
    loss, main_vjp = _cross_entropy(logits, labels, ignore_index)
    if auxiliary is None:
        return loss, lambda dloss: (main_vjp(dloss), None)
    weight = logits.dtype.type(auxiliary_weight)
    auxiliary_loss, auxiliary_vjp = _cross_entropy(auxiliary, labels, ignore_index)
    return loss + weight * auxiliary_loss, lambda dloss: (main_vjp(dloss), auxiliary_vjp(weight * dloss))
