"""Losses: scale-and-shift-invariant depth and semantic segmentation (paper sections 4 and 5; MiDaS, TPAMI 2020, section 5).

Depth, per image, on inverse depth, over its M valid pixels, with d^ and d*^ the aligned prediction and target and R = d^ - d*^:

    L_ssitrim = 1/(2M) * sum of the U_m smallest |R_i|,  U_m = floor(0.8 M)
    L_reg     = sum over scales k = 0..3 of 1/M_k * sum (|dR/dx| + |dR/dy|),  scale k being every 2^k-th pixel
    loss      = mean over the images of L_ssitrim + 0.5 L_reg

Maps are (B, H, W), masks (B, H, W) bool, True where valid. The depth losses treat all images at once and read nothing back to the
host, so they neither stall a GPU nor break a compiled graph. Float64 is computed in float64, every narrower type in float32,
under autocast too. |x| has gradient 0 at 0; the target gets no gradient; an image without a valid pixel has loss 0 and gradient
0; values at invalid pixels are never used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from accelerated import operators
from accelerated.kernel_paths import by_kernel

from .alignment import align_least_squares, align_median, centred, least_squares, median_and_deviation, valid_or_zero


def _check_shapes(prediction: Tensor, target: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless the three are (B, H, W) with at least one pixel, the prediction is float and the mask bool."""
    if not prediction.dtype.is_floating_point:
        raise ValueError(f"prediction has dtype {prediction.dtype}: expected a floating-point type")
    if prediction.ndim != 3 or prediction.numel() == 0:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}: expected (B, H, W) with at least one pixel")
    for name, tensor in (("target", target), ("mask", mask)):
        if tensor.shape != prediction.shape:
            expected = f"expected {tuple(prediction.shape)}, the shape of the prediction"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {expected}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}: expected torch.bool, True at the valid pixels")


def _nan_unless_finite(prediction: Tensor, target: Tensor) -> Tensor:
    """1, or NaN where any value is not finite: trimming would hide such a pixel, and looking at it here would stall the GPU."""
    finite = torch.isfinite(prediction.detach()).all() & torch.isfinite(target).all()
    return torch.where(finite, 1.0, torch.nan).to(prediction.dtype)


def trimmed_absolute(residual: Tensor, mask: Tensor, kept: float = 0.8) -> Tensor:
    """L_ssitrim per image (B,): the sum of the floor(kept * M) smallest |R| over 2M. Ties go to the earlier pixel.

    residual, mask: (B, H, W). The trimmed pixels, the largest residuals, get no gradient.
    """
    if not 0 <= kept <= 1:
        raise ValueError(f"kept={kept}: expected a fraction of the valid pixels, between 0 and 1")
    size, valid = residual.abs().flatten(1), mask.flatten(1)
    count = valid.sum(1)
    if kept == 1:  # nothing is trimmed, so nothing need be ranked
        return torch.where(valid, size, 0.0).sum(1) / (2 * count.clamp(min=1))
    with torch.no_grad():
        ascending = size.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)
        used = (kept * count.double()).floor()  # in float64: float32 would miscount from some ten million pixels on
        rank = torch.arange(size.shape[1], device=size.device).expand_as(ascending)
        keep = torch.zeros_like(valid).scatter(1, ascending, rank < used[:, None])
    return torch.where(keep, size, 0.0).sum(1) / (2 * count.clamp(min=1))


def _differences(residual: Tensor, mask: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """Per image, the sum of |dR/dx| + |dR/dy| over every 2^scale-th pixel (B,), and the number of valid pixels there (B,).

    A difference counts where both of its pixels are valid.
    """
    r, valid = residual[:, :: 2**scale, :: 2**scale], mask[:, :: 2**scale, :: 2**scale]
    across = torch.where(valid[:, :, 1:] & valid[:, :, :-1], (r[:, :, 1:] - r[:, :, :-1]).abs(), 0.0)
    down = torch.where(valid[:, 1:] & valid[:, :-1], (r[:, 1:] - r[:, :-1]).abs(), 0.0)
    return across.sum((1, 2)) + down.sum((1, 2)), valid.sum((1, 2))


def gradient_matching(residual: Tensor, mask: Tensor, scales: int = 4) -> Tensor:
    """L_reg per image (B,): over the scales, the summed absolute differences of R divided by the valid pixels of that scale.

    residual, mask: (B, H, W). A scale without a valid pixel adds 0.
    """
    loss = residual.new_zeros(len(residual))
    for scale in range(scales):
        total, count = _differences(residual, mask, scale)
        loss = loss + total / count.clamp(min=1)
    return loss


def _by_median(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """R with each map aligned by its own median and deviation."""
    return align_median(prediction, mask) - align_median(target, mask)


def _by_least_squares(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """R with the prediction aligned to the target, which is used as it is."""
    return align_least_squares(prediction, target, mask) - target


ALIGNMENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"median": _by_median, "least_squares": _by_least_squares}


def depth_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    alignment: str = "median",
    kept: float = 0.8,
    scales: int = 4,
    gradient_weight: float = 0.5,
) -> Tensor:
    """The trimmed scale-and-shift-invariant loss with gradient matching (MiDaS section 5, equations for L_ssitrim and L_reg).

    prediction: inverse depth (B, H, W), floating point, any scale. target: inverse depth, computed with in the prediction's
    precision. mask: bool. alignment: "median" or "least_squares". Returns a scalar, float64 if the prediction is, else float32.
    The batch loss is the mean over all images, those without a valid pixel (which contribute 0) included.
    Raises ValueError for shapes that differ, a mask that is not bool, an unknown alignment, `kept` outside [0, 1] and `scales`
    outside 0 to 27. A value that is not finite at a valid pixel makes the loss NaN, and the gradient at the valid pixels of its
    image at least (by torch of every image): naming it would take a device sync.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"unknown alignment {alignment!r}: expected one of {', '.join(ALIGNMENTS)}")
    if not 0 <= scales <= 27:  # every 2^27-th pixel of an image is its first
        raise ValueError(f"scales={scales}: expected a whole number from 0 to 27")
    _check_shapes(prediction, target, mask)
    if alignment == "median" and by_kernel("depth_loss", prediction.device.type):
        target = target.detach().to(torch.promote_types(prediction.dtype, torch.float32))
        return operators.depth_loss(prediction, target, mask, kept, scales, gradient_weight)[0]
    prediction = valid_or_zero(prediction, mask)
    target = valid_or_zero(target.detach(), mask).to(prediction.dtype)
    residual = ALIGNMENTS[alignment](prediction, target, mask)
    each = trimmed_absolute(residual, mask, kept) + gradient_weight * gradient_matching(residual, mask, scales)
    return each.mean() * _nan_unless_finite(prediction, target)


def published_snippet_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, scales: int = 4, gradient_weight: float = 0.5
) -> Tensor:
    """The loss of the snippet that the authors posted, kept for comparison: not the loss of their paper.

    Half the mean squared residual after least squares, untrimmed, and gradient matching; both "batch based": summed over the
    batch and divided by its number of valid pixels (at each scale), a divisor of 0 giving 0. Where the normal equations are
    singular, scale and shift are both 0. Shapes, dtypes, errors and NaN as in `depth_loss`.
    """
    _check_shapes(prediction, target, mask)
    prediction = valid_or_zero(prediction, mask)
    target = valid_or_zero(target.detach(), mask).to(prediction.dtype)
    scale, shift, singular = least_squares(prediction, target, mask)
    shift = torch.where(singular, 0.0, shift)
    residual = torch.where(mask, scale[:, None, None] * prediction + shift[:, None, None], 0.0) - target
    loss = (residual * residual).sum() / (2 * mask.sum().clamp(min=1))
    for k in range(scales):
        total, count = _differences(residual, mask, k)
        loss = loss + gradient_weight * total.sum() / count.sum().clamp(min=1)
    return loss * _nan_unless_finite(prediction, target)


def correlation_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - r, r the correlation of prediction and target over an image's valid pixels, averaged over the images: in [0, 2].

    Not a loss of the paper: a start for training from scratch, from which `depth_loss` alone may never leave the
    image-independent solution. Smooth, and as blind to scale and shift. An image whose valid predictions or targets are constant
    (one pixel is, and none) has no correlation: it contributes 0. Shapes, dtypes, errors and NaN as in `depth_loss`.
    """
    _check_shapes(prediction, target, mask)
    prediction = valid_or_zero(prediction, mask)
    target = valid_or_zero(target.detach(), mask).to(prediction.dtype)
    x, x_constant = centred(prediction, mask)
    y, y_constant = centred(target, mask)
    constant = (x_constant | y_constant)[:, 0, 0]
    variances = (x * x).sum((1, 2)) * (y * y).sum((1, 2))
    correlation = (x * y).sum((1, 2)) / torch.where(constant, 1.0, variances).sqrt()
    return torch.where(constant, 0.0, 1 - correlation).mean() * _nan_unless_finite(prediction, target)


ANCHOR = 3.0
"""Where `anchor_loss` wants the median, with a deviation of 1: the farthest pixels then lie above zero too."""


def anchor_loss(prediction: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """(log S)^2 + (T - 3)^2, T and S the batch's mean median and mean deviation: 0 where S = 1 and T = 3.

    Not a loss of the paper, whose loss is blind to the scale and shift of a prediction, as `correlation_loss` is: from random
    weights both drift, by many orders of magnitude, until what depends on the image is lost in rounding. This holds them in
    place and asks nothing else. prediction (B, H, W), mask bool (B, H, W); T and S are averaged over the images with a valid
    pixel, the loss is 0 where there is none. `total` adds up, differentiably, what several processes hold of the batch. Returns
    a scalar; dtypes, errors and NaN as in `depth_loss`.
    """
    _check_shapes(prediction, prediction, mask)
    median, deviation = median_and_deviation(prediction, mask)
    known = mask.any(2).any(1)[:, None, None]
    medians, deviations = torch.where(known, median, 0.0).sum(), torch.where(known, deviation, 0.0).sum()
    medians, deviations, images = total(torch.stack([medians, deviations, known.sum().to(median.dtype)]))
    some = images > 0
    t = medians / images.clamp(min=1)
    s = torch.where(some, deviations / images.clamp(min=1), 1.0)
    return torch.where(some, s.log() ** 2 + (t - ANCHOR) ** 2, 0.0) * _nan_unless_finite(prediction.where(mask, 0.0), t)


def check_labels(labels: Tensor, batch: int, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError unless labels are integers (B, H, W), each a class or `ignore_index`.

    Reads one number back from a GPU; inside a graph, compiled or captured, which that would break, values are not looked at.
    """
    integers = not (labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool)
    if labels.ndim != 3 or len(labels) != batch or labels.numel() == 0 or not integers:
        raise ValueError(f"labels have shape {tuple(labels.shape)} and dtype {labels.dtype}: expected integers ({batch}, H, W)")
    if torch.compiler.is_compiling() or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        expected = f"expected a class from 0 to {num_classes - 1}, or {ignore_index} to ignore a pixel"
        raise ValueError(f"labels hold {int(labels[wrong][0])}: {expected}")


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean of -log softmax(logits)[label] over the pixels that are not ignored, 0 if all are: (B, K, h, w), (B, H, W)."""
    if by_kernel("cross_entropy", logits.device.type):
        labels = labels if labels.dtype in (torch.uint8, torch.int32, torch.int64) else labels.long()
        return operators.upsampled_cross_entropy(logits, labels, ignore_index)[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=True)
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def segmentation_loss(
    logits: Tensor,
    auxiliary: Tensor | None,
    labels: Tensor,
    auxiliary_weight: float = 0.2,
    ignore_index: int = 255,
) -> Tensor:
    """Cross-entropy plus `auxiliary_weight` times the auxiliary head's (paper section 5.2).

    logits (B, K, h, w), auxiliary (B, K, h', w') or None (a model in evaluation), of any resolution: each is resized to the
    labels, bilinear, align_corners=True, in at least float32. labels (B, H, W), integers, averaged over the pixels that are not
    `ignore_index`; if all are, the loss and its gradient are 0. Returns a scalar. Raises ValueError for a label that is no class.
    """
    check_labels(labels, len(logits), logits.shape[1], ignore_index)
    loss = _cross_entropy(logits, labels, ignore_index)
    if auxiliary is None:
        return loss
    return loss + auxiliary_weight * _cross_entropy(auxiliary, labels, ignore_index)
