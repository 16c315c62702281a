"""Layer normalisation over the last axis, as in the pre-norm transformer block (paper section 3; Ba et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, check_arrays, check_gradient, check_shape

Vjp = Callable[[Array], tuple[Array, Array, Array]]


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> tuple[Array, Vjp]:
    """Return (x - mean) / sqrt(var + eps) * weight + bias for x (..., D) and weight, bias (D,), all of one float dtype.

    Mean and variance (divided by D) run over the last axis. vjp(dy) -> dx, dweight, dbias.
    Raises TypeError for dtypes, ValueError for shapes.
    """
    check_arrays("layer_norm", x=x, weight=weight, bias=bias)
    check_shape("layer_norm", "weight", weight, (x.shape[-1] if x.ndim else "D",))
    check_shape("layer_norm", "bias", bias, weight.shape)
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + eps)
    normal = np.multiply(centred, scale, out=centred)

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        check_gradient("layer_norm", dy, normal.shape, normal.dtype)
        leading = tuple(range(dy.ndim - 1))
        dnormal = dy * weight
        # Centring and scaling each remove a direction: what is left of dnormal is orthogonal to 1 and (but for eps) to normal.
        along = (dnormal * normal).mean(axis=-1, keepdims=True)
        dx = scale * (dnormal - dnormal.mean(axis=-1, keepdims=True) - normal * along)
        return dx, (dy * normal).sum(axis=leading), dy.sum(axis=leading)

    return normal * weight + bias, vjp
