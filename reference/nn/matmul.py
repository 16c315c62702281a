"""The product of two stacks of matrices: attention's scores and its weighted sums (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], tuple[Array, Array]]


@differentiable
def matmul(a: Array, b: Array) -> tuple[Array, Vjp]:
    """Return a b for a (..., N, K) and b (..., K, M) of one float dtype and the same leading axes; vjp(dy) -> da, db.

    Raises TypeError for dtypes, ValueError for shapes.
    """
    check_arrays("matmul", a=a, b=b)
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: a has shape {a.shape} and b {b.shape}: expected (..., N, K) and (..., K, M)")
    shape = (*a.shape[:-1], b.shape[-1])

    def vjp(dy: Array) -> tuple[Array, Array]:
        check_gradient("matmul", dy, shape, a.dtype)
        return product(dy, b.swapaxes(-1, -2), None), product(a.swapaxes(-1, -2), dy, None)

    return product(a, b, None), vjp


@twinned
def product(a: Array, b: Array, bias: Array | None) -> Array:
    """Return a b + bias of a (..., N, K), b (..., K, M) and bias (M,) or None: (..., N, M)."""
    y = np.matmul(a, b)
    if bias is not None:
        y += bias
    return y
