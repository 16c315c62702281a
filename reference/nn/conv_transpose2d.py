"""Transposed convolution: the adjoint of convolution, which spreads every pixel over a kernel-sized patch.

    y[b, o, r * stride + i, c * stride + j] += weight[p, o, i, j] * x[b, p, r, c]

Reassemble's upsamplings by 4 and 2 (paper section 3, Resample_s) are the case kernel = stride, where the patches tile the result.
"""

from __future__ import annotations

from collections.abc import Callable

from .checks import Array, check_arrays, check_gradient, check_positive, check_shape
from .conv2d import correlate, correlate_adjoint_weight, correlate_adjoint_x
from .differentiable import differentiable

Vjp = Callable[[Array], tuple[Array, Array, Array | None]]

_NO_PADDING = ((0, 0), (0, 0))


@differentiable
def conv_transpose2d(x: Array, weight: Array, bias: Array | None = None, stride: int = 1) -> tuple[Array, Vjp]:
    """Map x (B, I, H, W) with weight (I, O, kh, kw), bias (O,) or None, to (B, O, (H - 1) stride + kh, (W - 1) stride + kw).

    All of one float dtype. vjp(dy) -> dx, dweight, dbias, the last None without a bias.
    Raises TypeError for dtypes, ValueError for shapes and stride.
    """
    check_arrays("conv_transpose2d", x=x, weight=weight, bias=bias)
    check_shape("conv_transpose2d", "x", x, ("B", "I", "H", "W"))
    check_shape("conv_transpose2d", "weight", weight, (x.shape[1], "O", "kh", "kw"))
    check_shape("conv_transpose2d", "bias", bias, (weight.shape[1],))
    check_positive("conv_transpose2d", stride=stride)
    height, width = ((n - 1) * stride + k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True))
    has_bias = bias is not None
    # The convolution whose adjoint this is has input (B, O, height, width), output x, and `weight` as it stands.
    y = correlate_adjoint_x(x, weight, stride, _NO_PADDING, (height, width))
    shape = y.shape
    if bias is not None:
        y += bias[:, None, None]

    def vjp(dy: Array) -> tuple[Array, Array, Array | None]:
        check_gradient("conv_transpose2d", dy, shape, x.dtype)
        dx = correlate(dy, weight, None, stride, _NO_PADDING, x.shape[2:])
        dweight = correlate_adjoint_weight(x, dy, stride, _NO_PADDING, weight.shape[2:])
        return dx, dweight, dy.sum(axis=(0, 2, 3)) if has_bias else None

    return y, vjp
