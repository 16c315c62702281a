"""How good a prediction is: depth per image, with and without alignment, the order of points, segmentation (sections 4 and 5).

    mask = valid_depth(depth, 1e-3, 80) & garg_crop(*depth.shape[1:])                              # which pixels count
    z = zero_shot_depth(prediction, depth, mask, DEPTH_CAPS["kitti"])                              # where scale is unknown
    sums = add(sums, sum_images(depth_errors(z, depth, mask)))                                     # batch by batch
    mean_errors(sums).abs_rel                                                                      # at the end

Depth metrics are computed per image, over its pixels that count, and averaged over images; segmentation metrics come from one
confusion matrix. Everything is float64; the crops' masks are on the CPU. Zero-shot depth protocol (MiDaS, TPAMI 2020; DPT,
section 4.1): inverse depth is predicted up to scale and shift, so a prediction is aligned to the truth per image by least
squares in inverse depth, inverted, capped, and compared in metres. `absolute_relative_error` is the one number that judges
training: the same, capped at the farthest depth of each image.
"""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from accelerated import operators
from accelerated.alignment import least_squares
from accelerated.kernel_paths import by_kernel

_SMALLEST = 1e-12  # metres: keeps divisions finite where depth is unknown, which is 0
_PIXELS = (1, 2)

DEPTH_CAPS = {"eth3d": 72.0, "sintel": 72.0, "kitti": 80.0, "nyu": 10.0, "tum": 10.0}
"""Metres at which the zero-shot protocol caps a prediction, by dataset. DIW has no depth, but pairs of points."""

Value = TypeVar("Value", Tensor, float)


class DepthErrors(NamedTuple, Generic[Value]):
    """The depth metrics of each image (B,), or their means: z is predicted, z* true, means are over an image's pixels."""

    abs_rel: Value  # mean |z - z*| / z*
    sq_rel: Value  # mean (z - z*)^2 / z*, metres
    rmse: Value  # sqrt mean (z - z*)^2, metres
    rmse_log: Value  # sqrt mean (ln z - ln z*)^2
    log10: Value  # mean |log10 z - log10 z*|
    silog: Value  # 100 times the standard deviation of ln z - ln z*: KITTI's convention
    delta1: Value  # share of pixels with max(z / z*, z* / z) < 1.25; the paper's "d > 1.25" is 100 (1 - delta1)
    delta2: Value  # ... < 1.25^2
    delta3: Value  # ... < 1.25^3


class DepthSums(NamedTuple):
    """Each metric summed over images, and how many images: those with a pixel that counts."""

    abs_rel: float = 0.0
    sq_rel: float = 0.0
    rmse: float = 0.0
    rmse_log: float = 0.0
    log10: float = 0.0
    silog: float = 0.0
    delta1: float = 0.0
    delta2: float = 0.0
    delta3: float = 0.0
    images: int = 0


class OrdinalSums(NamedTuple):
    """Pairs of points whose predicted order is not the one people gave, and all pairs."""

    wrong: int = 0
    pairs: int = 0


Sums = TypeVar("Sums", DepthSums, OrdinalSums)


def add(first: Sums, second: Sums) -> Sums:
    """Return the sums of both batches."""
    return type(first)._make(x + y for x, y in zip(first, second, strict=True))


# ---- depth ---------------------------------------------------------------------------------------------------------------------


def depth_errors(prediction: Tensor, depth: Tensor, mask: Tensor) -> DepthErrors[Tensor]:
    """Return the metrics of each image (B,), NaN for one without a pixel that counts, from metres (B, H, W) and a bool mask.

    What stands at pixels that do not count (NaN, inf, 0) changes nothing. Raises ValueError for shapes that differ, and for a
    value at a pixel that counts that is not positive and finite.
    """
    _check_shapes("depth_errors", prediction, depth, mask)
    _check_values("depth_errors", "prediction", prediction[mask], positive=True)
    _check_values("depth_errors", "depth", depth[mask], positive=True)
    z, truth = (torch.where(mask, metres.double(), 1.0) for metres in (prediction, depth))  # where they agree, nothing is added
    count = mask.sum(_PIXELS)

    def mean(values: Tensor) -> Tensor:
        return values.sum(_PIXELS) / count  # 0 / 0 is NaN

    difference, log_difference = z - truth, z.log() - truth.log()
    centred = torch.where(mask, log_difference - mean(log_difference)[:, None, None], 0.0)
    ratio = torch.maximum(z / truth, truth / z)
    return DepthErrors(
        mean(difference.abs() / truth),
        mean(difference**2 / truth),
        mean(difference**2).sqrt(),
        mean(log_difference**2).sqrt(),
        mean((z.log10() - truth.log10()).abs()),
        100 * mean(centred**2).sqrt(),
        *(mean((mask & (ratio < 1.25**k)).double()) for k in (1, 2, 3)),
    )


def sum_images(errors: DepthErrors[Tensor]) -> DepthSums:
    """Sum the metrics of a batch (B,) over its images, without those of NaN, which no pixel counts for."""
    counted = ~errors.abs_rel.isnan()
    return DepthSums._make([*(float(values[counted].sum()) for values in errors), int(counted.sum())])


def mean_errors(sums: DepthSums) -> DepthErrors[float]:
    """Return the mean of each metric over the images; NaN where there were none."""
    *totals, images = sums
    return DepthErrors(*(total / images if images else math.nan for total in totals))


def zero_shot_depth(prediction: Tensor, depth: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Return depth in metres (B, H, W), float64, from `prediction`, inverse depth up to scale and shift.

    Per image, scale and shift are those of least squares in inverse depth over the pixels that count; the aligned inverse depth,
    raised to 1 / `cap` where it is less, is inverted: nothing is farther than `cap` metres. `depth` is not capped. Pixels that do
    not count are 0.

    Raises ValueError for shapes that differ, for a cap that is not positive, and, at a pixel that counts, for a prediction that
    is not finite and a depth that is not positive and finite.
    """
    _check_shapes("zero_shot_depth", prediction, depth, mask)
    _check_values("zero_shot_depth", "prediction", prediction[mask], positive=False)
    _check_values("zero_shot_depth", "depth", depth[mask], positive=True)
    if not cap > 0:
        raise ValueError(f"zero_shot_depth: cap is {cap!r}: expected a positive number of metres")
    inverse = 1 / torch.where(mask, depth.double(), 1.0)
    d = torch.where(mask, prediction.double(), 0.0)
    scale, shift, _ = least_squares(d, inverse, mask)
    aligned = scale[:, None, None] * d + shift[:, None, None]
    return torch.where(mask, 1 / aligned.clamp(min=1 / cap), 0.0)


def _check_shapes(op: str, prediction: Tensor, depth: Tensor, mask: Tensor) -> None:
    for name, values in (("depth", depth), ("prediction", prediction), ("mask", mask)):
        if values.ndim != 3 or values.shape != depth.shape:
            shape = tuple(values.shape)
            raise ValueError(f"{op}: {name} has shape {shape}: expected (B, H, W), the same for prediction, depth, mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}: expected bool")


def _check_values(op: str, name: str, values: Tensor, positive: bool) -> None:
    """Raise ValueError unless the values (M,) are finite, and greater than 0 where they must be `positive`."""
    wrong = values[~(values.isfinite() & ((values > 0) | (not positive)))]
    if len(wrong):
        expected = "positive and finite" if positive else "finite"
        raise ValueError(f"{op}: {name} holds {wrong[0].item()} at a pixel that counts: expected {expected} values")


def aligned_depth(prediction: Tensor, depth: Tensor) -> Tensor:
    """Return depth in metres (B, H, W), float64, from `prediction` (B, H, W), inverse depth up to scale and shift.

    `depth` (B, H, W) is the truth in metres, 0 where unknown. Per image, scale and shift are those of least squares in inverse
    depth over the known pixels. The result is capped at the largest known depth: an aligned inverse depth of 0 or less means
    "as far as anything". An image with no known pixel gives zeros.
    """
    depth = depth.double()
    scale, shift, _ = least_squares(prediction.double(), 1 / depth.clamp(min=_SMALLEST), depth > 0)
    aligned = scale[:, None, None] * prediction.double() + shift[:, None, None]
    farthest = depth.amax(dim=(1, 2), keepdim=True)
    return torch.where(farthest > 0, 1 / torch.maximum(aligned, 1 / farthest.clamp(min=_SMALLEST)), 0.0)


def absolute_relative_error(prediction: Tensor, depth: Tensor) -> Tensor:
    """Return AbsRel per image (B,), float64: the mean of |z - z*| / z* over known pixels, z from `aligned_depth`.

    `prediction` (B, H, W) inverse depth up to scale and shift; `depth` (B, H, W) metres, 0 where unknown. NaN for an image
    with no known pixel.
    """
    truth = depth.double()
    known = truth > 0
    error = (aligned_depth(prediction, depth) - truth).abs() / truth.clamp(min=_SMALLEST)
    return torch.where(known, error, 0.0).sum(dim=(1, 2)) / known.sum(dim=(1, 2))


# ---- which pixels count --------------------------------------------------------------------------------------------------------


def valid_depth(depth: Tensor, nearest: float, farthest: float) -> Tensor:
    """Return where nearest < depth < farthest, metres: 1e-3 and 80 for KITTI, 1e-3 and 10 for NYU. NaN is not."""
    return (depth > nearest) & (depth < farthest)


def _crop(height: int, width: int, top: float, bottom: float, left: float, right: float) -> Tensor:
    """Return (height, width) bool, True in rows [top, bottom) and columns [left, right), truncated to whole pixels."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[int(top) : int(bottom), int(left) : int(right)] = True
    return mask


def garg_crop(height: int, width: int) -> Tensor:
    """Return the mask (height, width) that KITTI is evaluated under (Garg et al. 2016): the road ahead, where there is lidar."""
    return _crop(height, width, 0.40810811 * height, 0.99189189 * height, 0.03594771 * width, 0.96405229 * width)


def eigen_kitti_crop(height: int, width: int) -> Tensor:
    """Return the mask (height, width) of KITTI's older convention (Eigen et al. 2014, as later reproduced by trial)."""
    return _crop(height, width, 0.3324324 * height, 0.91351351 * height, 0.0359477 * width, 0.96405229 * width)


def eigen_nyu_crop(height: int, width: int) -> Tensor:
    """Return the mask (480, 640) that NYUv2 is evaluated under (Eigen et al. 2014). ValueError for any other size."""
    if (height, width) != (480, 640):
        raise ValueError(f"eigen_nyu_crop: the image is {height} x {width}: expected 480 x 640, the one size it is defined for")
    return _crop(height, width, 45, 471, 41, 601)


# ---- order of points -----------------------------------------------------------------------------------------------------------


def ordinal_errors(prediction: Tensor, points: Tensor, closer: Tensor) -> OrdinalSums:
    """Count the pairs of points of one image that `prediction` (H, W), inverse depth up to scale and shift, orders wrongly.

    `points` (N, 2, 2) integers: N pairs of (row, column). `closer` (N,) holds +1 where people saw the first point closer to the
    camera than the second, -1 where farther, as in DIW, which has one pair per image and no "equal". The prediction is right
    where it is strictly larger at the closer point: two equal values are wrong. Raises ValueError for other shapes, points
    outside the image, other relations, and a prediction that is not finite at a point.
    """
    if prediction.ndim != 2 or points.ndim != 3 or points.shape[1:] != (2, 2) or closer.shape != points.shape[:1]:
        shapes = f"{tuple(prediction.shape)}, {tuple(points.shape)} and {tuple(closer.shape)}"
        raise ValueError(
            f"ordinal_errors: prediction, points and closer have shapes {shapes}: expected (H, W), (N, 2, 2) and (N,)"
        )
    outside = (points < 0) | (points >= torch.tensor(prediction.shape, device=points.device))
    if outside.any():
        point = tuple(points[outside.any(2)][0].tolist())
        raise ValueError(f"ordinal_errors: a point is at {point}: expected row and column within {tuple(prediction.shape)}")
    unknown = closer[closer.abs() != 1]
    if len(unknown):
        raise ValueError(f"ordinal_errors: closer holds {unknown[0].item()}: expected 1 or -1")
    rows, columns = points.long().unbind(2)
    values = prediction[rows, columns].double()
    if not values.isfinite().all():
        raise ValueError("ordinal_errors: prediction is not finite at a point: expected finite values")
    return OrdinalSums(int((closer * (values[:, 0] - values[:, 1]) <= 0).sum()), len(points))


def whdr(sums: OrdinalSums) -> float:
    """Return the weighted human disagreement rate, the share of wrong pairs, all of one weight; NaN without a pair.

    Published tables give it in percent.
    """
    return sums.wrong / sums.pairs if sums.pairs else math.nan


# ---- segmentation --------------------------------------------------------------------------------------------------------------


def confusion(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by true and predicted class: (num_classes, num_classes) int64, truth along the rows.

    `prediction` and `label` are class ids of one shape and any integer type; pixels labelled `ignore_index` are left out.
    Matrices of batches are added. Raises ValueError for shapes that differ, and for a value that is no class on either side.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"the prediction has shape {tuple(prediction.shape)}: expected {tuple(label.shape)}, the label's")
    if by_kernel("confusion", label.device.type):
        kinds = (torch.uint8, torch.int32, torch.int64)
        prediction, label = (ids if ids.dtype in kinds else ids.long() for ids in (prediction, label))
        return operators.confusion(prediction, label, num_classes, ignore_index)
    counted = label != ignore_index
    truth, guess = label[counted].long(), prediction[counted].long()
    for name, values in (("label", truth), ("prediction", guess)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if len(wrong):
            raise ValueError(f"the {name} holds {int(wrong[0])}: expected a class from 0 to {num_classes - 1}")
    return torch.bincount(truth * num_classes + guess, minlength=num_classes**2).view(num_classes, num_classes)


def pixel_accuracy(counts: Tensor) -> float:
    """Return the share of pixels whose class is right, from a confusion matrix (K, K); NaN where it is empty."""
    return float(counts.trace().double() / counts.sum())


def mean_intersection_over_union(counts: Tensor) -> float:
    """Return mIoU from a confusion matrix (K, K); NaN where it is empty.

    A class that neither the truth nor the prediction contains has no IoU and is left out of the mean.
    """
    hits = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())
