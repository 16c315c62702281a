"""The product of two stacks of matrices: attention's scores and its weighted sums (Vaswani et al. 2017, equation 1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, check_arrays, check_gradient

Vjp = Callable[[Array], tuple[Array, Array]]


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
        return np.matmul(dy, b.swapaxes(-1, -2)), np.matmul(a.swapaxes(-1, -2), dy)

    return np.matmul(a, b), vjp
