"""Metrics: how good a prediction is (paper sections 4 and 5; the zero-shot protocol is that of MiDaS, TPAMI 2020).

    mask = valid_depth(depth, 1e-3, 80) & garg_crop(*depth.shape[1:])                                # which pixels count
    z = zero_shot_depth(prediction, depth, mask, DEPTH_CAPS["kitti"])                                # where scale is unknown
    sums = add(sums, sum_images(depth_errors(z, depth, mask)))                                       # batch by batch
    mean_errors(sums).abs_rel                                                                        # at the end

Depth is (B, H, W) in metres, masks are (B, H, W) bool, True where a pixel counts; whatever stands at the other pixels (NaN, inf,
0) changes nothing. Depth metrics are computed per image, over its pixels, and then averaged over the images that have any, as
the papers do: an image with few known pixels weighs as much as another. Segmentation metrics come from one confusion matrix of
all pixels. Everything is computed in float64, whatever the inputs.
"""

from __future__ import annotations

import math
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from .alignment import least_squares

DEPTH_CAPS = {"eth3d": 72.0, "sintel": 72.0, "kitti": 80.0, "nyu": 10.0, "tum": 10.0}
"""Metres at which the zero-shot protocol caps a prediction, by dataset. DIW has no depth, but pairs of points."""

Value = TypeVar("Value", np.ndarray, float)


class DepthErrors(NamedTuple, Generic[Value]):
    """The depth metrics of each image (B,) float64, or their means: z is predicted, z* true, means are over an image's pixels."""

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


def depth_errors(prediction: np.ndarray, depth: np.ndarray, mask: np.ndarray) -> DepthErrors[np.ndarray]:
    """Return the metrics of each image; NaN for one without a pixel that counts. All arguments (B, H, W).

    Raises ValueError for shapes that differ, and for a value at a pixel that counts that is not positive and finite.
    """
    _check_shapes("depth_errors", prediction, depth, mask)
    _check_values("depth_errors", "prediction", prediction[mask], positive=True)
    _check_values("depth_errors", "depth", depth[mask], positive=True)
    errors = np.full((len(DepthErrors._fields), len(mask)), np.nan)
    for b in range(len(mask)):
        if mask[b].any():
            z, truth = prediction[b, mask[b]].astype(np.float64), depth[b, mask[b]].astype(np.float64)
            errors[:, b] = _errors_of_image(z, truth)
    return DepthErrors(*errors)


def _errors_of_image(z: np.ndarray, truth: np.ndarray) -> list[float]:
    """The metrics of one image's pixels, z and truth (M,) float64, in the order of DepthErrors."""
    difference, log_difference = z - truth, np.log(z) - np.log(truth)
    ratio = np.maximum(z / truth, truth / z)
    return [
        (np.abs(difference) / truth).mean(),
        (difference**2 / truth).mean(),
        math.sqrt((difference**2).mean()),
        math.sqrt((log_difference**2).mean()),
        np.abs(np.log10(z) - np.log10(truth)).mean(),
        100 * log_difference.std(),
        *((ratio < 1.25**k).mean() for k in (1, 2, 3)),
    ]


def sum_images(errors: DepthErrors[np.ndarray]) -> DepthSums:
    """Sum the metrics of a batch (B,) over its images, without those of NaN, which no pixel counts for."""
    counted = ~np.isnan(errors.abs_rel)
    return DepthSums._make([*(float(values[counted].sum()) for values in errors), int(counted.sum())])


def mean_errors(sums: DepthSums) -> DepthErrors[float]:
    """Return the mean of each metric over the images; NaN where there were none."""
    *totals, images = sums
    return DepthErrors(*(total / images if images else math.nan for total in totals))


def zero_shot_depth(prediction: np.ndarray, depth: np.ndarray, mask: np.ndarray, cap: float) -> np.ndarray:
    """Return depth in metres (B, H, W), float64, from `prediction`, inverse depth up to scale and shift.

    Per image, scale and shift are those of least squares in inverse depth over the pixels that count (`alignment.least_squares`);
    the aligned inverse depth, raised to 1 / `cap` where it is less, is inverted: nothing is farther than `cap` metres. `depth` is
    not capped. Pixels that do not count are 0.

    Raises ValueError for shapes that differ, for a cap that is not positive, and, at a pixel that counts, for a prediction that
    is not finite and a depth that is not positive and finite.
    """
    _check_shapes("zero_shot_depth", prediction, depth, mask)
    _check_values("zero_shot_depth", "prediction", prediction[mask], positive=False)
    _check_values("zero_shot_depth", "depth", depth[mask], positive=True)
    if not cap > 0:
        raise ValueError(f"zero_shot_depth: cap is {cap!r}: expected a positive number of metres")
    inverse = 1 / np.where(mask, depth, 1).astype(np.float64)
    d = np.where(mask, prediction, 0).astype(np.float64)
    fit, _ = least_squares(d, inverse, mask)
    aligned = fit.scale[:, None, None] * d + fit.shift[:, None, None]
    return np.where(mask, 1 / np.maximum(aligned, 1 / cap), 0.0)


def _check_shapes(op: str, prediction: np.ndarray, depth: np.ndarray, mask: np.ndarray) -> None:
    for name, values in (("depth", depth), ("prediction", prediction), ("mask", mask)):
        if values.ndim != 3 or values.shape != depth.shape:
            raise ValueError(f"{op}: {name} has shape {values.shape}: expected (B, H, W), the same for prediction, depth, mask")
    if mask.dtype != bool:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}: expected bool")


def _check_values(op: str, name: str, values: np.ndarray, positive: bool) -> None:
    """Raise ValueError unless the values (M,) are finite, and greater than 0 where they must be `positive`."""
    wrong = values[~(np.isfinite(values) & ((values > 0) | (not positive)))]
    if len(wrong):
        expected = "positive and finite" if positive else "finite"
        raise ValueError(f"{op}: {name} holds {wrong[0]} at a pixel that counts: expected {expected} values")


# ---- which pixels count --------------------------------------------------------------------------------------------------------


def valid_depth(depth: np.ndarray, nearest: float, farthest: float) -> np.ndarray:
    """Return where nearest < depth < farthest, metres: 1e-3 and 80 for KITTI, 1e-3 and 10 for NYU. NaN is not."""
    return (depth > nearest) & (depth < farthest)


def _crop(height: int, width: int, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    """Return (height, width) bool, True in rows [top, bottom) and columns [left, right), truncated to whole pixels."""
    mask = np.zeros((height, width), bool)
    mask[int(top) : int(bottom), int(left) : int(right)] = True
    return mask


def garg_crop(height: int, width: int) -> np.ndarray:
    """Return the mask (height, width) that KITTI is evaluated under (Garg et al. 2016): the road ahead, where there is lidar."""
    return _crop(height, width, 0.40810811 * height, 0.99189189 * height, 0.03594771 * width, 0.96405229 * width)


def eigen_kitti_crop(height: int, width: int) -> np.ndarray:
    """Return the mask (height, width) of KITTI's older convention (Eigen et al. 2014, as later reproduced by trial)."""
    return _crop(height, width, 0.3324324 * height, 0.91351351 * height, 0.0359477 * width, 0.96405229 * width)


def eigen_nyu_crop(height: int, width: int) -> np.ndarray:
    """Return the mask (480, 640) that NYUv2 is evaluated under (Eigen et al. 2014). ValueError for any other size."""
    if (height, width) != (480, 640):
        raise ValueError(f"eigen_nyu_crop: the image is {height} x {width}: expected 480 x 640, the one size it is defined for")
    return _crop(height, width, 45, 471, 41, 601)


# ---- order of points -----------------------------------------------------------------------------------------------------------


def ordinal_errors(prediction: np.ndarray, points: np.ndarray, closer: np.ndarray) -> OrdinalSums:
    """Count the pairs of points of one image that `prediction` (H, W), inverse depth up to scale and shift, orders wrongly.

    `points` (N, 2, 2) integers: N pairs of (row, column). `closer` (N,) holds +1 where people saw the first point closer to the
    camera than the second, -1 where farther, as in DIW, which has one pair per image and no "equal". The prediction is right
    where it is strictly larger at the closer point: two equal values are wrong. Raises ValueError for other shapes, points
    outside the image, other relations, and a prediction that is not finite at a point.
    """
    if prediction.ndim != 2 or points.ndim != 3 or points.shape[1:] != (2, 2) or closer.shape != points.shape[:1]:
        shapes = f"{prediction.shape}, {points.shape} and {closer.shape}"
        raise ValueError(
            f"ordinal_errors: prediction, points and closer have shapes {shapes}: expected (H, W), (N, 2, 2) and (N,)"
        )
    outside = (points < 0) | (points >= prediction.shape)
    if outside.any():
        point = tuple(points[outside.any(axis=2)][0].tolist())
        raise ValueError(f"ordinal_errors: a point is at {point}: expected row and column within {prediction.shape}")
    if not np.isin(closer, (-1, 1)).all():
        raise ValueError(f"ordinal_errors: closer holds {closer[~np.isin(closer, (-1, 1))][0]}: expected 1 or -1")
    first, second = (prediction[points[:, i, 0], points[:, i, 1]].astype(np.float64) for i in (0, 1))
    if not (np.isfinite(first) & np.isfinite(second)).all():
        raise ValueError("ordinal_errors: prediction is not finite at a point: expected finite values")
    return OrdinalSums(int((closer * (first - second) <= 0).sum()), len(points))


def whdr(sums: OrdinalSums) -> float:
    """Return the weighted human disagreement rate, the share of wrong pairs, all of one weight; NaN without a pair.

    Published tables give it in percent.
    """
    return sums.wrong / sums.pairs if sums.pairs else math.nan


# ---- segmentation --------------------------------------------------------------------------------------------------------------


def confusion(prediction: np.ndarray, label: np.ndarray, num_classes: int, ignore_index: int = 255) -> np.ndarray:
    """Count pixels by true and predicted class: (num_classes, num_classes) int64, truth along the rows.

    `prediction` and `label` are class ids of one shape and any integer type; pixels labelled `ignore_index` are left out.
    Matrices of batches are added. Raises ValueError for shapes that differ, and for a value that is no class on either side.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"the prediction has shape {prediction.shape}: expected {label.shape}, the label's")
    counted = label != ignore_index
    truth, guess = label[counted], prediction[counted]
    for name, values in (("label", truth), ("prediction", guess)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if len(wrong):
            raise ValueError(f"the {name} holds {wrong[0]}: expected a class from 0 to {num_classes - 1}")
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (truth, guess), 1)
    return counts


def pixel_accuracy(counts: np.ndarray) -> float:
    """Return the share of pixels whose class is right, from a confusion matrix (K, K); NaN where it is empty."""
    return float(counts.trace() / counts.sum()) if counts.any() else math.nan


def mean_intersection_over_union(counts: np.ndarray) -> float:
    """Return mIoU from a confusion matrix (K, K), NaN where it is empty: the mean over classes of hits / (truth or prediction).

    A class that neither the truth nor the prediction contains has no IoU and is left out of the mean.
    """
    hits = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean()) if counts.any() else math.nan
