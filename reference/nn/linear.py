"""The affine map y = x W^T + b on the last axis: the projections of attention, MLP and Read (paper section 3)."""

from __future__ import annotations

from collections.abc import Callable

from .checks import Array, check_arrays, check_gradient, check_shape
from .differentiable import differentiable
from .matmul import product

Vjp = Callable[[Array], tuple[Array, Array, Array | None]]


@differentiable
def linear(x: Array, weight: Array, bias: Array | None = None) -> tuple[Array, Vjp]:
    """Map (..., I) to (..., O) with weight (O, I) and bias (O,) or None, all of one float dtype.

    vjp(dy) -> dx, dweight, dbias, the last None without a bias. Raises TypeError for dtypes, ValueError for shapes.
    """
    check_arrays("linear", x=x, weight=weight, bias=bias)
    check_shape("linear", "weight", weight, ("O", "I"))
    check_shape("linear", "bias", bias, (weight.shape[0],))
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x has shape {x.shape}: expected (..., {weight.shape[1]}), as weight has shape {weight.shape}")
    shape, has_bias = (*x.shape[:-1], weight.shape[0]), bias is not None
    rows = x.reshape(-1, x.shape[-1])
    y = product(rows, weight.T, bias)

    def vjp(dy: Array) -> tuple[Array, Array, Array | None]:
        check_gradient("linear", dy, shape, weight.dtype)
        dy = dy.reshape(len(rows), -1)
        dx = product(dy, weight, None).reshape(*shape[:-1], -1)
        return dx, product(dy.T, rows, None), dy.sum(axis=0) if has_bias else None

    return y.reshape(shape), vjp
