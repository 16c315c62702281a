"""Grouped convolution: the 3x3 of ResNeXt (32 groups) and the depthwise one of EfficientNet (as many groups as channels).

The channels are cut into G groups in their order, and each group is a convolution of its own, from C/G channels to O/G:

    y[b, g, o, r, c] = sum over p, i, j of weight[g, o, p, i, j] * x[b, g, p, r * stride + i - top, c * stride + j - left]

Written as `conv2d` is, a sum over the kernel's taps (i, j) of matrix products, here one product for each group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .checks import Array, Padding, check_arrays, check_gradient, check_positive, check_shape, padding_pairs, window_count
from .conv2d import taps
from .differentiable import differentiable

Vjp = Callable[[Array], tuple[Array, Array]]


@differentiable
def grouped_conv2d(x: Array, weight: Array, groups: int, stride: int = 1, padding: Padding = 0) -> tuple[Array, Vjp]:
    """Convolve x (B, C, H, W) with weight (O, C / groups, kh, kw), both of one float dtype; result (B, O, h, w).

    `padding`, in pixels of zeros: one number, or ((top, bottom), (left, right)). vjp(dy) -> dx, dweight. Raises TypeError for
    dtypes, ValueError for shapes, groups that do not divide C and O, stride, padding and a kernel larger than the padded x.
    """
    check_arrays("grouped_conv2d", x=x, weight=weight)
    check_shape("grouped_conv2d", "x", x, ("B", "C", "H", "W"))
    check_positive("grouped_conv2d", groups=groups, stride=stride)
    if x.shape[1] % groups or len(weight) % groups:
        raise ValueError(
            f"grouped_conv2d: x has shape {x.shape}, weight {weight.shape}: expected numbers of channels that are multiples of "
            f"groups, {groups}"
        )
    check_shape("grouped_conv2d", "weight", weight, ("O", x.shape[1] // groups, "kh", "kw"))
    (top, bottom), (left, right) = pairs = padding_pairs("grouped_conv2d", padding)
    kernel = weight.shape[2:]
    out = window_count("grouped_conv2d", x.shape, kernel, stride, pairs)
    batch, height, width = x.shape[0], x.shape[2], x.shape[3]
    padded_size = top + height + bottom, left + width + right
    matrices = weight.reshape(groups, -1, *weight.shape[1:])  # (G, O/G, C/G, kh, kw)

    def see() -> Array:
        """The padded x, its channels grouped: (B, G, C/G, H', W')."""
        return np.pad(x, ((0, 0), (0, 0), *pairs)).reshape(batch, groups, -1, *padded_size)

    padded = see()
    flat = batch, groups, -1, out[0] * out[1]
    y = np.zeros((batch, groups, matrices.shape[1], out[0] * out[1]), x.dtype)
    for i, j, seen in taps(kernel, stride, out):
        y += np.matmul(matrices[..., i, j], padded[seen].reshape(flat))
    shape = batch, len(weight), *out

    def vjp(dy: Array) -> tuple[Array, Array]:
        check_gradient("grouped_conv2d", dy, shape, x.dtype)
        padded, dpadded = see(), np.zeros((batch, groups, matrices.shape[2], *padded_size), x.dtype)
        dmatrices = np.empty_like(matrices)
        dflat = dy.reshape(flat)
        for i, j, seen in taps(kernel, stride, out):
            sent_back = np.matmul(matrices[..., i, j].swapaxes(-1, -2), dflat)
            dpadded[seen] += sent_back.reshape(batch, groups, -1, *out)
            dmatrices[..., i, j] = np.matmul(dflat, padded[seen].reshape(flat).swapaxes(-1, -2)).sum(axis=0)
        dx = dpadded.reshape(batch, -1, *padded_size)[:, :, top : top + height, left : left + width]
        return np.ascontiguousarray(dx), dmatrices.reshape(weight.shape)

    return y.reshape(shape), vjp
