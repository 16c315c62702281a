"""Layer normalisation over the last axis, as in the pre-norm transformer block (paper section 3; Ba et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient, check_shape
from .differentiable import differentiable

Vjp = Callable[[Array], tuple[Array, Array, Array]]


@differentiable
def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Vjp]:
    """Return (x - mean) / sqrt(var + eps) * weight + bias for x (..., D) and weight, bias (D,), all of one float dtype.

    Mean and variance (divided by D) run over the last axis. vjp(dy) -> dx, dweight, dbias.
    Raises TypeError for dtypes, ValueError for shapes.
    """
    check_arrays("layer_norm", x=x, weight=weight, bias=bias)
    check_shape("layer_norm", "weight", weight, (x.shape[-1] if x.ndim else "D",))
    check_shape("layer_norm", "bias", bias, weight.shape)
    shape, width = x.shape, x.shape[-1]
    rows = x.reshape(-1, width)
    y, mean, scale = standardize_rows(rows, weight, bias, eps)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        check_gradient("layer_norm", dy, shape, rows.dtype)
        dx, dweight, dbias = standardize_rows_adjoint(dy.reshape(-1, width), rows, mean, scale, weight)
        return dx.reshape(shape), dweight, dbias

    return y.reshape(shape), vjp


@twinned
def standardize_rows(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return y (n, D), mean (n, 1) and scale (n, 1) = 1 / sqrt(var + eps) of x (n, D), weight and bias (D,)."""
    mean = x.mean(axis=1, keepdims=True)
    centred = x - mean
    scale = 1 / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + eps)
    return centred * scale * weight + bias, mean, scale


@twinned
def standardize_rows_adjoint(dy: Array, x: Array, mean: Array, scale: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Return dx (n, D), dweight and dbias (D,) of dy (n, D)."""
    normal = (x - mean) * scale
    dnormal = dy * weight
    # Centring and scaling each remove a direction: what is left of dnormal is orthogonal to 1 and (but for eps) to normal.
    along = (dnormal * normal).mean(axis=1, keepdims=True)
    dx = scale * (dnormal - dnormal.mean(axis=1, keepdims=True) - normal * along)
    return dx, (dy * normal).sum(axis=0), dy.sum(axis=0)
