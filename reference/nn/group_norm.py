"""Group normalisation of maps (Wu and He 2018), in the Hybrid's ResNet embedding network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, check_arrays, check_gradient, check_positive, check_shape

Vjp = Callable[[Array], tuple[Array, Array, Array]]


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
    shape, grouped = x.shape, (x.shape[0], groups, -1)
    flat = x.reshape(grouped)
    centred = flat - flat.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + eps)
    normal = np.multiply(centred, scale, out=centred)
    y = normal.reshape(shape) * weight[:, None, None] + bias[:, None, None]

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        check_gradient("group_norm", dy, shape, normal.dtype)
        dweight = (dy * normal.reshape(shape)).sum(axis=(0, 2, 3))
        dnormal = (dy * weight[:, None, None]).reshape(grouped)
        along = (dnormal * normal).mean(axis=-1, keepdims=True)
        dx = scale * (dnormal - dnormal.mean(axis=-1, keepdims=True) - normal * along)
        return dx.reshape(shape), dweight, dy.sum(axis=(0, 2, 3))

    return y, vjp
