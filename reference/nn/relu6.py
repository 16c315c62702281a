"""The rectifier clipped at 6, min(max(x, 0), 6): the activation of EfficientNet-Lite, the encoder of MiDaS v2.1 small."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


@differentiable
def relu6(x: Array) -> tuple[Array, Vjp]:
    """Return min(max(x, 0), 6) for a float array of any shape; vjp(dy) -> dx, 0 at 0 and 6. Raises TypeError for dtypes."""
    check_arrays("relu6", x=x)
    y, between, dtype = np.clip(x, 0, 6), (x > 0) & (x < 6), x.dtype

    def vjp(dy: Array) -> Array:
        check_gradient("relu6", dy, between.shape, dtype)
        return np.where(between, dy, dtype.type(0))

    return y, vjp
