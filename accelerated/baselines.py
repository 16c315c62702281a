"""What can be predicted without looking at the image: the scores that a trained model has to beat.

Scenes resemble each other: floors are near at the bottom, skies and far walls are at the top. A predictor that gives every image
the same map already scores on that. Each function returns such maps, (H, W), learnt from the training set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accelerated.alignment import align_median


def constant_depths(inverse: Tensor, known: Tensor) -> dict[str, Tensor]:
    """Return image-independent predictions of inverse depth, each (H, W), float32, by name.

    `inverse` (N, H, W) is the training set's inverse depth, `known` (N, H, W) bool says where it is defined. The maps are the
    per-pixel mean and median of the inverse depth, the same of its normalised form (per image, median 0 and mean absolute
    deviation 1: what the loss compares), and a constant. A pixel that no image knows gets the mean of the others.
    """
    normalized = align_median(inverse, known)
    return {
        "constant": torch.ones_like(inverse[0]),
        "mean inverse depth": _filled(_known_only(inverse, known).nanmean(0)),
        "median inverse depth": _filled(_median(inverse, known)),
        "mean of the normalised": _filled(_known_only(normalized, known).nanmean(0)),
        "median of the normalised": _filled(_median(normalized, known)),
    }


def constant_labels(label: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Return image-independent class maps, each (H, W) int64: the commonest class everywhere, and the commonest per pixel.

    `label` (N, H, W) holds the training set's class ids; ids of `num_classes` or more are not counted.
    """
    counts = torch.stack([(label == k).sum(0) for k in range(num_classes)])
    commonest = counts.sum(dim=(1, 2)).argmax()
    return {
        "commonest class": commonest.expand(label.shape[1:]),
        "commonest per pixel": counts.argmax(0),
    }


def _known_only(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, values, torch.nan)


def _median(values: Tensor, known: Tensor) -> Tensor:
    """Median over the known images of each pixel; row by row, since sorting copies what it is given."""
    rows = zip(values.unbind(1), known.unbind(1), strict=True)
    return torch.stack([_known_only(row, where).nanmedian(0).values for row, where in rows])


def _filled(values: Tensor) -> Tensor:
    return values.nan_to_num(float(values.nanmean()))
