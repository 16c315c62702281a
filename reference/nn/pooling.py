"""Max pooling and TF 'SAME' padding: the stem of the Hybrid's ResNet embedding network."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.implementation import twinned

from .checks import Array, Padding, Pair, check_arrays, check_gradient, check_positive, check_shape, padding_pairs, window_count
from .conv2d import taps
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


@differentiable
def max_pool2d(x: Array, kernel: int, stride: int, padding: Padding = 0) -> tuple[Array, Vjp]:
    """Return the maximum of each kernel x kernel window of x (B, C, H, W), windows `stride` apart: (B, C, h, w).

    `padding`, of -inf, is one number or ((top, bottom), (left, right)), and smaller than the kernel. vjp(dy) -> dx: a window's
    gradient goes to its first maximum in row-major order. Raises TypeError for dtypes, ValueError for the rest.
    """
    check_arrays("max_pool2d", x=x)
    check_shape("max_pool2d", "x", x, ("B", "C", "H", "W"))
    check_positive("max_pool2d", kernel=kernel, stride=stride)
    pairs = padding_pairs("max_pool2d", padding)
    if max(*pairs[0], *pairs[1]) >= kernel:
        raise ValueError(f"max_pool2d: padding is {padding}: expected less than the kernel, {kernel}")
    out = window_count("max_pool2d", x.shape, (kernel, kernel), stride, pairs)
    padded = np.pad(x, ((0, 0), (0, 0), *pairs), constant_values=-np.inf)
    y, winner = window_maxima(padded, kernel, stride, out)
    shape, padded_size, dtype = x.shape, padded.shape[2:], x.dtype

    def vjp(dy: Array) -> Array:
        check_gradient("max_pool2d", dy, winner.shape, dtype)
        dpadded = window_maxima_adjoint(dy, winner, kernel, stride, padded_size)
        (top, _), (left, _) = pairs
        return dpadded[:, :, top : top + shape[2], left : left + shape[3]]

    return y, vjp


@twinned
def window_maxima(x: Array, kernel: int, stride: int, out: Pair) -> tuple[Array, Array]:
    """Return y (B, C, *out) and the winning tap of each window of x (B, C, H, W), which is padded: the first maximum, or NaN."""
    seen = np.stack([x[index] for _, _, index in taps((kernel, kernel), stride, out)])
    winner = seen.argmax(axis=0)
    return np.take_along_axis(seen, winner[None], axis=0)[0], winner


@twinned
def window_maxima_adjoint(dy: Array, winner: Array, kernel: int, stride: int, size: Pair) -> Array:
    """Return dx (B, C, *size): each window hands its gradient to the pixel that its winning tap saw."""
    dx = np.zeros((*dy.shape[:2], *size), dy.dtype)
    for i, j, index in taps((kernel, kernel), stride, dy.shape[2:]):
        dx[index] += np.where(winner == i * kernel + j, dy, dy.dtype.type(0))
    return dx


def same_padding(size: Pair, kernel: int, stride: int) -> tuple[Pair, Pair]:
    """Return ((top, bottom), (left, right)) so that an (H, W) map yields ceil(H / stride) x ceil(W / stride) windows.

    TensorFlow's 'SAME': an odd pixel of padding goes to the bottom and the right. All are whole numbers of pixels >= 1.
    """
    check_positive("same_padding", height=size[0], width=size[1], kernel=kernel, stride=stride)
    (top, down), (left, across) = (_same_axis(n, kernel, stride) for n in size)
    return (top, down), (left, across)


def _same_axis(n: int, kernel: int, stride: int) -> Pair:
    windows = -(-n // stride)
    total = max((windows - 1) * stride + kernel - n, 0)
    return total // 2, total - total // 2
