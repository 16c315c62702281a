"""How good a prediction is: absolute relative error after alignment, mean intersection over union.

Zero-shot depth protocol (MiDaS, section 5; DPT, section 4.1): inverse depth is predicted up to scale and shift, so a prediction
is aligned to the truth per image by least squares in inverse depth, inverted, capped, and compared in metres.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelerated.alignment import least_squares

_SMALLEST = 1e-12  # metres: keeps divisions finite where depth is unknown, which is 0


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


def confusion(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count pixels by true and predicted class: (num_classes, num_classes) int64, truth along the rows.

    `prediction` and `label` are class ids of one shape and any integer type; pixels labelled `ignore_index` are left out.
    Matrices of batches are added. Raises ValueError for shapes that differ, and for a value that is no class on either side.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"the prediction has shape {tuple(prediction.shape)}: expected {tuple(label.shape)}, the label's")
    counted = label != ignore_index
    truth, guess = label[counted].long(), prediction[counted].long()
    for name, values in (("label", truth), ("prediction", guess)):
        wrong = values[(values < 0) | (values >= num_classes)]
        if len(wrong):
            raise ValueError(f"the {name} holds {int(wrong[0])}: expected a class from 0 to {num_classes - 1}")
    return torch.bincount(truth * num_classes + guess, minlength=num_classes**2).view(num_classes, num_classes)


def mean_intersection_over_union(counts: Tensor) -> float:
    """Return mIoU from a confusion matrix (K, K); NaN where it is empty.

    A class that neither the truth nor the prediction contains has no IoU and is left out of the mean.
    """
    hits = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - hits
    return float((hits[union > 0] / union[union > 0]).mean())
