"""The rectifier max(x, 0) of the residual convolution units and heads (paper section 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


@differentiable
def relu(x: Array) -> tuple[Array, Vjp]:
    """Return max(x, 0) for a float array of any shape; vjp(dy) -> dx, which is 0 where x is 0. Raises TypeError for dtypes."""
    check_arrays("relu", x=x)
    y = rectify(x.reshape(-1)).reshape(x.shape)

    def vjp(dy: Array) -> Array:
        check_gradient("relu", dy, y.shape, y.dtype)
        return rectify_adjoint(dy.reshape(-1), y.reshape(-1)).reshape(dy.shape)

    return y, vjp


@twinned
def rectify(x: Array) -> Array:
    """Return max(x, 0) of x (n,)."""
    return np.maximum(x, 0)


@twinned
def rectify_adjoint(dy: Array, y: Array) -> Array:
    """Return dy where y > 0 and 0 elsewhere, of dy, y (n,)."""
    return np.where(y > 0, dy, y.dtype.type(0))
