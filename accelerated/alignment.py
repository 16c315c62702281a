"""Alignment: the scale and shift that make two inverse depths comparable (paper section 4; MiDaS, TPAMI 2020, section 5).

    align_median         d^ = (d - t) / s,  t = median(d),  s = mean |d - t|      from one map alone
    align_least_squares  d^ = s d + t,  (s, t) = argmin sum (s d + t - d*)^2      from a map d and its target d*

Maps are (B, H, W), masks (B, H, W) bool, True where a pixel is valid; all images of a batch at once, nothing read back to the
host. Float64 is computed in float64, every narrower type in float32, under autocast too. What stands at invalid pixels (NaN,
inf, 0) changes neither results nor gradients; both are 0 there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from accelerated import operators
from accelerated.kernel_paths import by_kernel

SMALLEST_DEVIATION = 1e-6  # s(d) of the median alignment is clamped here
_PIXELS = (1, 2)


class LeastSquares(NamedTuple):
    """Per image: scale (B,), shift (B,), and whether the normal equations were singular (B,) bool."""

    scale: Tensor
    shift: Tensor
    singular: Tensor


def valid_or_zero(d: Tensor, mask: Tensor) -> Tensor:
    """d at the valid pixels and 0 elsewhere, in float64 if d is, otherwise in float32. Cuts invalid pixels off the gradient."""
    return torch.where(mask, d.to(torch.promote_types(d.dtype, torch.float32)), 0.0)


def _count(mask: Tensor) -> Tensor:
    """Valid pixels per image (B, 1, 1), 1 where there are none: every use of it divides a sum that is then 0."""
    return mask.sum(_PIXELS, keepdim=True).clamp(min=1)


def _median(d: Tensor, mask: Tensor) -> Tensor:
    """Lower median of each image's valid pixels (B, 1, 1), 0 where there are none.

    Its gradient goes to the first pixel, in row-major order, that has the median value: the median is read from there.
    """
    flat, valid = d.flatten(1), mask.flatten(1)
    pixels = flat.shape[1]
    with torch.no_grad():
        # nanmedian is the lower median of what is no NaN, found without sorting; of nothing it is NaN, which nothing equals.
        middle = flat.masked_fill(~valid, torch.nan).nanmedian(dim=1, keepdim=True).values
        has_median_value = valid & (flat == middle)
        position = torch.arange(pixels, device=d.device)
        first = torch.where(has_median_value, position, pixels - 1).amin(1, keepdim=True)
    return flat.gather(1, first)[:, :, None]


def median_and_deviation(d: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per image, the lower median t and the mean absolute deviation s = mean |d - t| of the valid pixels, each (B, 1, 1).

    s is at least 1e-6, with no gradient where it was clamped. Both count valid pixels only: t = 0, s = 1e-6 where there are none.
    """
    d = valid_or_zero(d, mask)
    median = _median(d, mask)
    deviation = torch.where(mask, d - median, 0.0).abs().sum(_PIXELS, keepdim=True) / _count(mask)
    return median, torch.where(deviation < SMALLEST_DEVIATION, SMALLEST_DEVIATION, deviation)


def align_median(d: Tensor, mask: Tensor) -> Tensor:
    """Align each image of d (B, H, W) by its own lower median t and mean absolute deviation s, over its valid pixels.

    Returns d^ (B, H, W). Gradients flow through t and s. s is at least 1e-6, with no gradient where it was clamped: constant
    pixels give d^ = 0. For any a > 0 and b, a * d + b has the same d^. Valid pixels must be finite, which is not checked here.
    """
    d = valid_or_zero(d, mask)
    median, deviation = median_and_deviation(d, mask)
    return torch.where(mask, d - median, 0.0) / deviation


def _lowest(d: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Per image, the smallest valid value (B, 1, 1), 0 where there is none, and whether all are equal to within rounding.

    The verdict comes from the extreme values, which are exact in any order of evaluation, and never from a determinant, which
    is not. The second term of the threshold is where the square of a difference would underflow.
    """
    some = mask.any(2, keepdim=True).any(1, keepdim=True)
    lowest = torch.where(some, d.masked_fill(~mask, torch.inf).amin(_PIXELS, keepdim=True), 0.0)
    highest = torch.where(some, d.masked_fill(~mask, -torch.inf).amax(_PIXELS, keepdim=True), 0.0)
    limits = torch.finfo(d.dtype)
    threshold = 8 * limits.eps * torch.maximum(lowest.abs(), highest.abs()) + math.sqrt(limits.tiny)
    return lowest, highest - lowest <= threshold


def centred(d: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """d (B, H, W) less the mean of its image's valid pixels, 0 elsewhere; and per image (B, 1, 1) whether those are constant."""
    # The sum starts from the smallest value: a large common offset costs no digits, and constant maps give exact zeros. The
    # result does not depend on where it starts, so that value needs no gradient.
    lowest, constant = _lowest(d.detach(), mask)
    above = torch.where(mask, d - lowest, 0.0)
    return torch.where(mask, above - above.sum(_PIXELS, keepdim=True) / _count(mask), 0.0), constant


def least_squares(prediction: Tensor, target: Tensor, mask: Tensor) -> LeastSquares:
    """Per image, the scale s and shift t that minimise sum (s * prediction + t - target)^2 over the valid pixels.

    prediction, target, mask: (B, H, W). The target gets no gradient. The normal equations are singular exactly where the valid
    predictions are constant (one pixel, or none, is), to within 8 eps of the largest: then s = 0, t = mean target, which is a
    minimiser, and no gradient flows. Without a valid pixel t = 0.
    """
    if by_kernel("least_squares", prediction.device.type):
        real = torch.promote_types(prediction.dtype, torch.float32)
        return LeastSquares(*operators.least_squares(prediction.to(real), target.detach().to(real), mask))
    prediction = valid_or_zero(prediction, mask)
    target = valid_or_zero(target.detach(), mask).to(prediction.dtype)
    count = _count(mask)
    # Sums start from the smallest value: a large common offset costs no digits, and constant maps give exact zeros. The fit does
    # not depend on where they start, so that value needs no gradient.
    lowest, singular = _lowest(prediction.detach(), mask)
    target_lowest, _ = _lowest(target, mask)
    x, y = torch.where(mask, prediction - lowest, 0.0), torch.where(mask, target - target_lowest, 0.0)
    x_mean, y_mean = x.sum(_PIXELS, keepdim=True) / count, y.sum(_PIXELS, keepdim=True) / count
    x, y = torch.where(mask, x - x_mean, 0.0), torch.where(mask, y - y_mean, 0.0)
    variance = (x * x).sum(_PIXELS, keepdim=True)  # times M: the determinant of the normal equations over M
    covariance = (x * y).sum(_PIXELS, keepdim=True)
    scale = torch.where(singular, 0.0, covariance / torch.where(singular, 1.0, variance))
    shift = target_lowest + y_mean - scale * (lowest + x_mean)
    return LeastSquares(scale[:, 0, 0], shift[:, 0, 0], singular[:, 0, 0])


def align_least_squares(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Align each prediction (B, H, W) to its target by `least_squares`: returns d^ (B, H, W)."""
    scale, shift, _ = least_squares(prediction, target, mask)
    return torch.where(mask, scale[:, None, None] * valid_or_zero(prediction, mask) + shift[:, None, None], 0.0)
