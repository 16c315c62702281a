"""Two-dimensional convolution (cross-correlation, as in all of deep learning): every map-to-map step of the decoder.

    y[b, o, r, c] = bias[o] + sum over p, i, j of weight[o, p, i, j] * x[b, p, r * stride + i - top, c * stride + j - left]

with zeros outside x. It is written as a sum over the kernel's taps (i, j): what a tap sees of x is a strided slice, and the sum
over p is a matrix product. Without its bias, `correlate` is linear in x and in weight; its two adjoints below are the
vjp, and the transposed convolution is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import EllipsisType

import numpy as np

from reference.implementation import twinned

from .checks import Array, Padding, Pair, check_arrays, check_gradient, check_positive, check_shape, padding_pairs, window_count
from .differentiable import differentiable

Vjp = Callable[[Array], tuple[Array, Array, Array | None]]


@differentiable
def conv2d(x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: Padding = 0) -> tuple[Array, Vjp]:
    """Convolve x (B, C, H, W) with weight (O, C, kh, kw), bias (O,) or None, all of one float dtype; result (B, O, h, w).

    `padding`, in pixels of zeros: one number, or ((top, bottom), (left, right)). vjp(dy) -> dx, dweight, dbias, the last None
    without a bias. Raises TypeError for dtypes, ValueError for shapes, stride, padding and a kernel larger than the padded x.
    """
    check_arrays("conv2d", x=x, weight=weight, bias=bias)
    check_shape("conv2d", "x", x, ("B", "C", "H", "W"))
    check_shape("conv2d", "weight", weight, ("O", x.shape[1], "kh", "kw"))
    check_shape("conv2d", "bias", bias, (weight.shape[0],))
    check_positive("conv2d", stride=stride)
    pairs = padding_pairs("conv2d", padding)
    out = window_count("conv2d", x.shape, weight.shape[2:], stride, pairs)
    shape, has_bias = (x.shape[0], weight.shape[0], *out), bias is not None
    y = correlate(x, weight, bias, stride, pairs, out)

    def vjp(dy: Array) -> tuple[Array, Array, Array | None]:
        check_gradient("conv2d", dy, shape, x.dtype)
        dx = correlate_adjoint_x(dy, weight, stride, pairs, x.shape[2:])
        dweight = correlate_adjoint_weight(dy, x, stride, pairs, weight.shape[2:])
        return dx, dweight, dy.sum(axis=(0, 2, 3)) if has_bias else None

    return y, vjp


@twinned
def correlate(x: Array, weight: Array, bias: Array | None, stride: int, padding: tuple[Pair, Pair], out: Pair) -> Array:
    """Return y (B, O, *out) of x (B, C, H, W), weight (O, C, kh, kw) and bias (O,) or None."""
    padded = np.pad(x, ((0, 0), (0, 0), *padding))
    y = np.zeros((x.shape[0], weight.shape[0], out[0] * out[1]), x.dtype)
    for i, j, seen in taps(weight.shape[2:], stride, out):
        y += np.matmul(weight[:, :, i, j], padded[seen].reshape(*x.shape[:2], -1))
    if bias is not None:
        y += bias[:, None]
    return y.reshape(*y.shape[:2], *out)


@twinned
def correlate_adjoint_x(dy: Array, weight: Array, stride: int, padding: tuple[Pair, Pair], size: Pair) -> Array:
    """Return dx (B, C, *size): each tap sends dy back to the pixels that it saw."""
    (top, bottom), (left, right) = padding
    batch, channels = dy.shape[0], weight.shape[1]
    padded = np.zeros((batch, channels, top + size[0] + bottom, left + size[1] + right), dy.dtype)
    flat = dy.reshape(*dy.shape[:2], -1)
    for i, j, seen in taps(weight.shape[2:], stride, dy.shape[2:]):
        padded[seen] += np.matmul(weight[:, :, i, j].T, flat).reshape(batch, channels, *dy.shape[2:])
    return np.ascontiguousarray(padded[:, :, top : top + size[0], left : left + size[1]])


@twinned
def correlate_adjoint_weight(dy: Array, x: Array, stride: int, padding: tuple[Pair, Pair], kernel: Pair) -> Array:
    """Return dweight (O, C, *kernel): each tap's weight gathers dy times what the tap saw, over images and positions."""
    padded = np.pad(x, ((0, 0), (0, 0), *padding))
    dweight = np.empty((dy.shape[1], x.shape[1], *kernel), dy.dtype)
    for i, j, seen in taps(kernel, stride, dy.shape[2:]):
        dweight[:, :, i, j] = np.tensordot(dy, padded[seen], axes=((0, 2, 3), (0, 2, 3)))
    return dweight


def taps(kernel: Pair, stride: int, out: Pair) -> Iterator[tuple[int, int, tuple[EllipsisType, slice, slice]]]:
    """Yield (i, j, index) in row-major order: `padded[index]` (..., *out) is what tap (i, j) of the kernel sees of `padded`."""
    for i, j in np.ndindex(*kernel):
        down = slice(i, i + (out[0] - 1) * stride + 1, stride)
        across = slice(j, j + (out[1] - 1) * stride + 1, stride)
        yield i, j, (..., down, across)
