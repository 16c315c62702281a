"""Batch normalisation of maps (Ioffe and Szegedy 2015), in the segmentation model's fusion blocks and heads (paper section 5.2).

In training a channel is normalised by its mean and variance over the batch, and the running statistics move towards them; in
evaluation it is normalised by the running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient, check_shape
from .differentiable import differentiable


class BatchNorm(NamedTuple):
    """Result of `batch_norm`: three arrays. Its vjp takes the same structure, where None means a zero gradient."""

    y: Any  # (B, C, H, W)
    running_mean: Any  # (C,)
    running_var: Any  # (C,)


Vjp = Callable[[BatchNorm], tuple[Array, Array, Array]]


@differentiable
def batch_norm(
    x: Array,
    weight: Array,
    bias: Array,
    running_mean: Array,
    running_var: Array,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[BatchNorm, Vjp]:
    """Normalise x (B, C, H, W) per channel, then scale and shift by weight and bias (C,); all of one float dtype.

    Returns the map with the running statistics (C,): the given ones in evaluation; in training
    (1 - momentum) * running + momentum * batch, the batch's variance divided by n - 1 (by n for the normalisation itself).
    vjp(BatchNorm) -> dx, dweight, dbias. Raises TypeError for dtypes, ValueError for shapes and for training on a single value
    per channel, which has no variance.
    """
    check_arrays("batch_norm", x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    check_shape("batch_norm", "x", x, ("B", "C", "H", "W"))
    per_channel = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, array in per_channel.items():
        check_shape("batch_norm", name, array, (x.shape[1],))
    normalise = _by_batch if training else _by_running
    return normalise(x, weight, bias, running_mean, running_var, momentum, eps)


def _by_running(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
) -> tuple[BatchNorm, Vjp]:
    scale = 1 / np.sqrt(running_var + eps)
    y = affine(_planes(x), running_mean, weight * scale, bias).reshape(x.shape)

    def vjp(d: BatchNorm) -> tuple[Array, Array, Array]:
        dy = _gradient(d.y, x)
        dbias, along = channel_sums(_planes(dy), _planes(x), running_mean)
        return dy * (weight * scale)[:, None, None], along * scale, dbias

    return BatchNorm(y, running_mean, running_var), vjp


def _by_batch(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
) -> tuple[BatchNorm, Vjp]:
    n = x.size // x.shape[1]
    if n == 1:
        raise ValueError(f"batch_norm: x has shape {x.shape}: training needs more than one value per channel")
    mean, var = moments(_planes(x))
    scale = 1 / np.sqrt(var + eps)
    y = affine(_planes(x), mean, weight * scale, bias).reshape(x.shape)
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * n / (n - 1) * var

    def vjp(d: BatchNorm) -> tuple[Array, Array, Array]:
        dy = _gradient(d.y, x)
        dbias, along = channel_sums(_planes(dy), _planes(x), mean)
        # Centring and scaling each remove a direction of dy: 1, and x - mean. The running statistics add to just these.
        direct = weight * scale
        constant, slope = -direct * dbias / n, -direct * scale**2 * along / n
        if d.running_mean is not None:
            constant += momentum / n * d.running_mean
        if d.running_var is not None:
            slope += momentum * 2 / (n - 1) * d.running_var
        return combine(_planes(dy), _planes(x), mean, direct, constant, slope).reshape(x.shape), along * scale, dbias

    return BatchNorm(y, new_mean, new_var), vjp


def _gradient(dy: Array | None, like: Array) -> Array:
    if dy is None:
        return np.zeros_like(like)
    check_gradient("batch_norm", dy, like.shape, like.dtype)
    return dy


def _planes(maps: Array) -> Array:
    return maps.reshape(*maps.shape[:2], -1)


@twinned
def moments(x: Array) -> tuple[Array, Array]:
    """Return mean and variance (C,) of x (B, C, H * W) per channel; the variance is divided by n."""
    mean = x.mean(axis=(0, 2))
    return mean, np.square(x - mean[:, None]).mean(axis=(0, 2))


@twinned
def affine(x: Array, mean: Array, scale: Array, bias: Array) -> Array:
    """Return (x - mean) * scale + bias of x (B, C, H * W), the others (C,)."""
    return (x - mean[:, None]) * scale[:, None] + bias[:, None]


@twinned
def channel_sums(dy: Array, x: Array, mean: Array) -> tuple[Array, Array]:
    """Return the sums (C,) of dy and of dy (x - mean) of dy, x (B, C, H * W)."""
    return dy.sum(axis=(0, 2)), (dy * (x - mean[:, None])).sum(axis=(0, 2))


@twinned
def combine(dy: Array, x: Array, mean: Array, direct: Array, constant: Array, slope: Array) -> Array:
    """Return direct * dy + constant + slope * (x - mean) of dy, x (B, C, H * W), the others (C,)."""
    return direct[:, None] * dy + constant[:, None] + slope[:, None] * (x - mean[:, None])
