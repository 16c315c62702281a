"""Weight standardisation of the Hybrid's convolutions (Qiao et al. 2019), in the two forms found in published weights.

Each output channel's filter is centred and divided by its spread. The forms differ only in how they guard the division, which
a GroupNorm behind the convolution all but cancels. w: (O, ...); mean, variance and deviation run over all axes but the first and
divide by n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, check_arrays, check_gradient

Vjp = Callable[[Array], Array]


def standardize_weight_variance(w: Array, eps: float = 1e-8) -> tuple[Array, Vjp]:
    """Return (w - mean) / sqrt(var + eps) per output channel of w (O, ...): today's timm; vjp(dy) -> dw."""
    centred, axes = _centre("standardize_weight_variance", w)
    scale = 1 / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + eps)
    y = centred * scale

    def vjp(dy: Array) -> Array:
        check_gradient("standardize_weight_variance", dy, y.shape, y.dtype)
        along = (dy * y).mean(axis=axes, keepdims=True)
        return scale * (dy - dy.mean(axis=axes, keepdims=True) - y * along)

    return y, vjp


def standardize_weight_deviation(w: Array, eps: float = 1e-5) -> tuple[Array, Vjp]:
    """Return (w - mean) / (std + eps) per output channel of w (O, ...): what the authors' files were trained with; vjp(dy) -> dw.

    The deviation of a constant filter has no derivative; it is taken as 0 there.
    """
    centred, axes = _centre("standardize_weight_deviation", w)
    deviation = np.sqrt(np.square(centred).mean(axis=axes, keepdims=True))
    scale = 1 / (deviation + eps)
    y = centred * scale

    def vjp(dy: Array) -> Array:
        check_gradient("standardize_weight_deviation", dy, y.shape, y.dtype)
        along = (dy * y).mean(axis=axes, keepdims=True)
        unit = np.divide(y, deviation * scale, out=np.zeros_like(y), where=deviation > 0)  # centred / deviation
        return scale * (dy - dy.mean(axis=axes, keepdims=True) - unit * along)

    return y, vjp


def _centre(op: str, w: Array) -> tuple[Array, tuple[int, ...]]:
    check_arrays(op, w=w)
    if w.ndim < 2:
        raise ValueError(f"{op}: w has shape {w.shape}: expected (O, ...) with at least two dimensions")
    axes = tuple(range(1, w.ndim))
    return w - w.mean(axis=axes, keepdims=True), axes
