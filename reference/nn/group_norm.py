"""Group normalisation of maps (Wu and He 2018), in the Hybrid's ResNet embedding network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient, check_positive, check_shape
from .differentiable import differentiable

Vjp = Callable[[Array], tuple[Array, Array, Array]]


@differentiable
def group_norm(x: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> tuple[Array, Vjp]:
    """Normalise x (B, C, H, W) over each of `groups` runs of C / groups channels; weight and bias (C,) act per channel.

    Variance is divided by n. All of one float dtype. vjp(dy) -> dx, dweight, dbias.
    Raises TypeError for dtypes, ValueError for shapes and a C that `groups` does not divide.
    """
    check_arrays("group_norm", x=x, weight=weight, bias=bias)
    check_shape("group_norm", "x", x, ("B", "C", "H", "W"))
    channels = x.shape[1]
    check_shape("group_norm", "weight", weight, (channels,))
    check_shape("group_norm", "bias", bias, (channels,))
    check_positive("group_norm", groups=groups)
    if channels % groups:
        raise ValueError(f"group_norm: x has shape {x.shape}: expected a multiple of {groups} channels, as groups is {groups}")
    shape, split = x.shape, (x.shape[0], groups, channels // groups, -1)
    grouped, weights = x.reshape(split), weight.reshape(groups, -1)
    y, mean, scale = standardize_groups(grouped, weights, bias.reshape(groups, -1), eps)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        check_gradient("group_norm", dy, shape, grouped.dtype)
        dx, dweight, dbias = standardize_groups_adjoint(dy.reshape(split), grouped, mean, scale, weights)
        return dx.reshape(shape), dweight.reshape(-1), dbias.reshape(-1)

    return y.reshape(shape), vjp


@twinned
def standardize_groups(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return y, mean (B, G, 1, 1) and scale (B, G, 1, 1) of x (B, G, C / G, H * W), weight and bias (G, C / G)."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    centred = x - mean
    scale = 1 / np.sqrt(np.square(centred).mean(axis=(2, 3), keepdims=True) + eps)
    return centred * scale * weight[..., None] + bias[..., None], mean, scale


@twinned
def standardize_groups_adjoint(dy: Array, x: Array, mean: Array, scale: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return dx (B, G, C / G, H * W), dweight and dbias (G, C / G) of dy."""
    normal = (x - mean) * scale
    dnormal = dy * weight[..., None]
    along = (dnormal * normal).mean(axis=(2, 3), keepdims=True)
    dx = scale * (dnormal - dnormal.mean(axis=(2, 3), keepdims=True) - normal * along)
    return dx, (dy * normal).sum(axis=(0, 3)), dy.sum(axis=(0, 3))
