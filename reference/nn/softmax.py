"""Softmax: exp(x_i) / sum_j exp(x_j) along one axis, the weights of attention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


@differentiable
def softmax(x: Array, axis: int = -1) -> tuple[Array, Vjp]:
    """Return the softmax of a float array of any shape along `axis`; vjp(dy) -> dx.

    Raises TypeError for other dtypes, ValueError for an axis that x does not have.
    """
    check_arrays("softmax", x=x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"softmax: axis is {axis} but x has shape {x.shape}: expected an axis of x")
    y = proportions(x, axis)

    def vjp(dy: Array) -> Array:
        check_gradient("softmax", dy, y.shape, y.dtype)
        return proportions_adjoint(dy, y, axis)

    return y, vjp


@twinned
def proportions(x: Array, axis: int) -> Array:
    """Return exp(x) / sum exp(x) along `axis`."""
    # Subtracting the maximum changes nothing, as it cancels in the quotient, and keeps exp from overflowing.
    y = np.exp(x - x.max(axis=axis, keepdims=True))
    y /= y.sum(axis=axis, keepdims=True)
    return y


@twinned
def proportions_adjoint(dy: Array, y: Array, axis: int) -> Array:
    """Return dx of dy and y = proportions(x): all of y moves where one x does, as the sum stays 1."""
    dx = dy * y
    dx -= y * dx.sum(axis=axis, keepdims=True)
    return dx
