"""Batch normalisation of maps (Ioffe and Szegedy 2015), in the segmentation model's fusion blocks and heads (paper section 5.2).

In training a channel is normalised by its mean and variance over the batch, and the running statistics move towards them; in
evaluation it is normalised by the running statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .checks import Array, check_arrays, check_gradient, check_shape


class BatchNorm(NamedTuple):
    """Result of `batch_norm`: three arrays. Its vjp takes the same structure, where None means a zero gradient."""

    y: Any  # (B, C, H, W)
    running_mean: Any  # (C,)
    running_var: Any  # (C,)


Vjp = Callable[[BatchNorm], tuple[Array, Array, Array]]


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

    def normal() -> Array:
        return (x - _maps(running_mean)) * _maps(scale)

    def vjp(d: BatchNorm) -> tuple[Array, Array, Array]:
        dy = _gradient(d.y, x)
        return dy * _maps(weight * scale), _channel_sum(dy * normal()), _channel_sum(dy)

    return BatchNorm(normal() * _maps(weight) + _maps(bias), running_mean, running_var), vjp


def _by_batch(
    x: Array, weight: Array, bias: Array, running_mean: Array, running_var: Array, momentum: float, eps: float
) -> tuple[BatchNorm, Vjp]:
    n = x.size // x.shape[1]
    if n == 1:
        raise ValueError(f"batch_norm: x has shape {x.shape}: training needs more than one value per channel")
    mean = _channel_sum(x) / n
    centred = x - _maps(mean)
    var = _channel_sum(np.square(centred)) / n
    scale = 1 / np.sqrt(var + eps)
    normal = np.multiply(centred, _maps(scale), out=centred)
    new_mean = (1 - momentum) * running_mean + momentum * mean
    new_var = (1 - momentum) * running_var + momentum * n / (n - 1) * var

    def vjp(d: BatchNorm) -> tuple[Array, Array, Array]:
        dy = _gradient(d.y, normal)
        dweight, dbias = _channel_sum(dy * normal), _channel_sum(dy)
        dx = _maps(weight * scale) * (dy - _maps(dbias / n) - normal * _maps(dweight / n))
        if d.running_mean is not None:
            dx += _maps(momentum / n * d.running_mean)
        if d.running_var is not None:
            dx += _maps(momentum * 2 / (n - 1) * d.running_var / scale) * normal
        return dx, dweight, dbias

    return BatchNorm(normal * _maps(weight) + _maps(bias), new_mean, new_var), vjp


def _gradient(dy: Array | None, like: Array) -> Array:
    if dy is None:
        return np.zeros_like(like)
    check_gradient("batch_norm", dy, like.shape, like.dtype)
    return dy


def _maps(per_channel: Array) -> Array:
    return per_channel[:, None, None]


def _channel_sum(maps: Array) -> Array:
    return maps.sum(axis=(0, 2, 3))
