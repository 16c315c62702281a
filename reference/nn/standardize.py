"""Weight standardisation of the Hybrid's convolutions (Qiao et al. 2019), in the two forms found in published weights.

Each output channel's filter is centred and divided by its spread. The forms differ only in how they guard the division, which
a GroupNorm behind the convolution all but cancels. w: (O, ...); mean, variance and deviation run over all axes but the first and
divide by n.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .batch_norm import affine, channel_sums, combine, moments
from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


@differentiable
def standardize_weight_variance(w: Array, eps: float = 1e-8) -> tuple[Array, Vjp]:
    """Return (w - mean) / sqrt(var + eps) per output channel of w (O, ...): today's timm; vjp(dy) -> dw."""
    filters = _filters("standardize_weight_variance", w)
    mean, var = moments(filters)
    scale = 1 / np.sqrt(var + eps)
    y = affine(filters, mean, scale, np.zeros_like(mean)).reshape(w.shape)

    def vjp(dy: Array) -> Array:
        check_gradient("standardize_weight_variance", dy, y.shape, y.dtype)
        return _adjoint(dy, filters, mean, scale, scale**3)

    return y, vjp


@differentiable
def standardize_weight_deviation(w: Array, eps: float = 1e-5) -> tuple[Array, Vjp]:
    """Return (w - mean) / (std + eps) per output channel of w (O, ...): what the authors' files were trained with; vjp(dy) -> dw.

    The deviation of a constant filter has no derivative; it is taken as 0 there.
    """
    filters = _filters("standardize_weight_deviation", w)
    mean, var = moments(filters)
    deviation = np.sqrt(var)
    scale = 1 / (deviation + eps)
    y = affine(filters, mean, scale, np.zeros_like(mean)).reshape(w.shape)

    def vjp(dy: Array) -> Array:
        check_gradient("standardize_weight_deviation", dy, y.shape, y.dtype)
        slope = np.divide(scale**2, deviation, out=np.zeros_like(scale), where=deviation > 0)
        return _adjoint(dy, filters, mean, scale, slope)

    return y, vjp


def _filters(op: str, w: Array) -> Array:
    """Return w as one image of O channels (1, O, n), for which batch normalisation has the sums and maps that are needed here."""
    check_arrays(op, w=w)
    if w.ndim < 2:
        raise ValueError(f"{op}: w has shape {w.shape}: expected (O, ...) with at least two dimensions")
    return w.reshape(1, len(w), -1)


def _adjoint(dy: Array, filters: Array, mean: Array, scale: Array, slope: Array) -> Array:
    """Return dw = scale (dy - mean dy) - slope (w - mean) mean(dy (w - mean)), of the shape of dy."""
    n, dy_filters = filters.shape[2], dy.reshape(filters.shape)
    plain, along = channel_sums(dy_filters, filters, mean)
    return combine(dy_filters, filters, mean, scale, -scale * plain / n, -slope * along / n).reshape(dy.shape)
