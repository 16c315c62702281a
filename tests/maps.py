"""Batches of predicted and true inverse depth for the tests of losses, alignment and metrics, and where their kinks are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

MASKS = ("none", "one", "two", "some", "all")
VALUES = ("normal", "quantised", "constant")  # quantised: multiples of 1/4, so that medians and residuals tie
GARBAGE = np.array([np.nan, np.inf, -np.inf, 0.0, 1e30])


class Batch(NamedTuple):
    """prediction, target (B, H, W) float64 with garbage at their invalid pixels, and the mask (B, H, W)."""

    prediction: np.ndarray
    target: np.ndarray
    mask: np.ndarray


def values(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One map (H, W) of the kind."""
    if kind == "normal":
        return rng.standard_normal(shape)
    if kind == "quantised":
        return rng.integers(0, 6, shape) / 4
    return np.full(shape, rng.standard_normal())


def valid(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One mask (H, W) of the kind."""
    chosen = np.zeros(shape, bool).ravel()
    count = {"none": 0, "one": 1, "two": 2, "all": chosen.size}.get(kind, rng.integers(0, chosen.size + 1))
    chosen[rng.permutation(chosen.size)[:count]] = True
    return chosen.reshape(shape)


@st.composite
def batches(draw, kinds=VALUES, masks=MASKS, largest=19) -> Batch:
    """One to three images with sides of 1 to `largest`: every kind of mask beside every other, different kinds of values too."""
    shape = (draw(st.integers(1, largest)), draw(st.integers(1, largest)))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    each = draw(st.lists(st.tuples(*(st.sampled_from(k) for k in (kinds, kinds, masks))), min_size=1, max_size=3))
    prediction = np.stack([values(kind, shape, rng) for kind, _, _ in each])
    target = np.stack([values(kind, shape, rng) for _, kind, _ in each])
    mask = np.stack([valid(kind, shape, rng) for _, _, kind in each])
    prediction[~mask] = rng.choice(GARBAGE, (~mask).sum())
    target[~mask] = rng.choice(GARBAGE, (~mask).sum())
    return Batch(prediction, target, mask)


def distance_to_kinks(residual: np.ndarray, mask: np.ndarray, kept: float = 0.8, scales: int = 4) -> float:
    """How far the residual R (B, H, W) is from where the loss has a kink: R = 0, R = R of a neighbour, a tie in the trimming."""
    distances = [np.abs(residual[mask])]
    for b in range(len(residual)):
        ascending = np.sort(np.abs(residual[b][mask[b]]))
        used = int(np.floor(kept * len(ascending)))
        if 0 < used < len(ascending):
            distances.append(ascending[used : used + 1] - ascending[used - 1])
    for k in range(scales):
        r, m = residual[:, :: 2**k, :: 2**k], mask[:, :: 2**k, :: 2**k]
        for axis in (1, 2):
            both = np.minimum(*(np.take(m, range(i, m.shape[axis] - 1 + i), axis) for i in (0, 1)))
            distances.append(np.abs(np.diff(r, axis=axis))[both])
    return float(np.concatenate(distances).min(initial=np.inf))


def distance_to_other_median(maps: np.ndarray, mask: np.ndarray) -> float:
    """How far, over the images, another value is from the lower median of the valid pixels; infinite where there is none."""
    distance = np.inf
    for image, m in zip(maps, mask, strict=True):
        ascending = np.sort(image[m])
        middle = (len(ascending) - 1) // 2
        around = ascending[max(middle - 1, 0) : middle + 2]
        distance = min(distance, np.diff(around).min(initial=np.inf))
    return float(distance)
