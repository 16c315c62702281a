"""Bilinear resizing: the fusion blocks' and heads' upsampling, and the resizing of position embeddings (paper section 3).

It is separable and linear: along each axis an output position reads the source at a fractional place, that is, blends its two
neighbours. An axis is three short arrays: the neighbour before the place, the one after it, and the weight of the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reference.implementation import twinned

from .checks import Array, Pair, check_arrays, check_gradient, check_positive, check_shape
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


class Axis(NamedTuple):
    """Where along one axis each of n output positions reads: x[before] * (1 - weight) + x[after] * weight."""

    before: Array  # (n,) intp
    after: Array  # (n,) intp
    weight: Array  # (n,) of the map's dtype, in [0, 1]


@differentiable
def resize_bilinear(x: Array, size: Pair, align_corners: bool) -> tuple[Array, Vjp]:
    """Resize x (B, C, H, W), float, to (B, C, h, w) with size = (h, w), without antialiasing; vjp(dy) -> dx.

    `align_corners` True puts the centres of the corner pixels of x and y on each other, False the corners of the images. Raises
    TypeError for dtypes, ValueError for shapes and sizes.
    """
    check_arrays("resize_bilinear", x=x)
    check_shape("resize_bilinear", "x", x, ("B", "C", "H", "W"))
    check_positive("resize_bilinear", height=size[0], width=size[1])
    rows = source_positions(x.shape[2], size[0], align_corners, x.dtype)
    columns = source_positions(x.shape[3], size[1], align_corners, x.dtype)
    shape, source, dtype = (*x.shape[:2], *size), x.shape[2:], x.dtype

    def vjp(dy: Array) -> Array:
        check_gradient("resize_bilinear", dy, shape, dtype)
        return interpolate_adjoint(dy, rows, columns, source)

    return interpolate(x, rows, columns), vjp


def source_positions(n: int, out: int, align_corners: bool, dtype: np.dtype) -> Axis:
    """Return where `out` positions read an axis of length n: i (n - 1) / (out - 1), or max(0, (i + 1/2) n / out - 1/2)."""
    i = np.arange(out)
    # One division of whole numbers each, so that positions on a pixel are exactly on it.
    place = i * (n - 1) / max(out - 1, 1) if align_corners else np.maximum((2 * i + 1) * n - out, 0) / (2 * out)
    before = place.astype(np.intp)
    return Axis(before, np.minimum(before + 1, n - 1), (place - before).astype(dtype))


@twinned
def interpolate(x: Array, rows: Axis, columns: Axis) -> Array:
    """Return x (B, C, H, W) read at `rows` and `columns`: (B, C, h, w)."""
    weight = rows.weight[:, None]
    tall = x[:, :, rows.before] * (1 - weight) + x[:, :, rows.after] * weight
    return tall[..., columns.before] * (1 - columns.weight) + tall[..., columns.after] * columns.weight


@twinned
def interpolate_adjoint(dy: Array, rows: Axis, columns: Axis, size: Pair) -> Array:
    """Return dx (B, C, *size): every output position hands its gradient to the two neighbours it blended, axis by axis."""
    dtall = np.zeros((*dy.shape[:3], size[1]), dy.dtype)
    for i, (before, after, weight) in enumerate(zip(*columns, strict=True)):
        dtall[..., before] += dy[..., i] * (1 - weight)
        dtall[..., after] += dy[..., i] * weight
    dx = np.zeros((*dy.shape[:2], *size), dy.dtype)
    for i, (before, after, weight) in enumerate(zip(*rows, strict=True)):
        dx[:, :, before] += dtall[:, :, i] * (1 - weight)
        dx[:, :, after] += dtall[:, :, i] * weight
    return dx
