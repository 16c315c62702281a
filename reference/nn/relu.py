"""The rectifier max(x, 0) of the residual convolution units and heads (paper section 3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, check_arrays, check_gradient

Vjp = Callable[[Array], Array]


def relu(x: Array) -> tuple[Array, Vjp]:
    """Return max(x, 0) for a float array of any shape; vjp(dy) -> dx, which is 0 where x is 0. Raises TypeError for dtypes."""
    check_arrays("relu", x=x)
    y, positive, dtype = np.maximum(x, 0), x > 0, x.dtype

    def vjp(dy: Array) -> Array:
        check_gradient("relu", dy, positive.shape, dtype)
        return np.where(positive, dy, dtype.type(0))

    return y, vjp
