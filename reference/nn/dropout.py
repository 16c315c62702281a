"""Dropout with an explicit mask (before the segmentation classifiers, paper section 5.2): the caller draws it, so it is pure."""

from __future__ import annotations

from collections.abc import Callable

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


@differentiable
def dropout(x: Array, mask: Array, p: float) -> tuple[Array, Vjp]:
    """Return x * mask / (1 - p): `mask`, bool of x's shape, is True where a value is kept, which has probability 1 - p.

    vjp(dy) -> dx. Raises TypeError for dtypes, ValueError for shapes and for p outside [0, 1).
    """
    check_arrays("dropout", x=x)
    if mask.dtype != bool:
        raise TypeError(f"dropout: mask has dtype {mask.dtype}: expected bool, True where a value is kept")
    if mask.shape != x.shape:
        raise ValueError(f"dropout: mask has shape {mask.shape}: expected {x.shape}, as x")
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}: expected a probability in [0, 1)")
    dtype = x.dtype
    scale = dtype.type(1 / (1 - p))

    def vjp(dy: Array) -> Array:
        check_gradient("dropout", dy, mask.shape, dtype)
        return dy * mask * scale

    return x * mask * scale, vjp
