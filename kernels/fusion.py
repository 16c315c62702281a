"""Fusion (Section 3.1, Figure 1 right): bilinear upsampling to the skip's size with the skip added, and its gradient.

Maps are (B, C, H, W), NumPy arrays (computed on the host) or CuPy arrays (on their GPU, on CuPy's current stream), of dtype
float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or, on the host, float64; sums are float32, for float64 float64.
"""

from __future__ import annotations

import operator

import numpy as np

from kernels.launch import Array, check, check_output, empty, launch_each
from kernels.source import Source

SOURCE = Source("fusion.cu", ("upsample_add_naive<{}>", "upsample_backward_naive<{}>"))


def upsample_add(x: Array, skip: Array, out: Array | None = None) -> Array:
    """`resize(x) + skip`: x (B, C, h, w) is resized bilinearly, align_corners=True, to the size of skip (B, C, H, W).

    Returns `out`, by default a new array, of skip's shape. The size may grow, shrink or stay. TypeError or ValueError names
    the array whose type, dtype, shape, layout, size or place is wrong, or that `out` overlaps.
    """
    _check_maps(x=x, skip=skip)
    if x.shape[:2] != skip.shape[:2]:
        raise ValueError(f"x has shape {x.shape} and skip {skip.shape}, expected the same batch size and channels")
    if out is None:
        out = empty(skip.shape, skip)
    check_output("out", out, skip.shape, {"x": x, "skip": skip})
    launch_each(SOURCE, "upsample_add_naive<{}>", out.size, (x, skip, out, *_sizes(x, skip)))
    return out


def upsample_backward(dout: Array, size: tuple[int, int], out: Array | None = None) -> Array:
    """The gradient in x, (B, C, *size), of `upsample_add(x, skip)`, given that in its result, dout (B, C, H, W).

    That in skip is dout itself. Returns `out`, by default a new array. Each element is a sum in one fixed order, so the
    result is the same every time. Errors as in `upsample_add`; ValueError where size is not two positive integers.
    """
    _check_maps(dout=dout)
    try:
        height, width = (operator.index(length) for length in size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"size is {size!r}, expected the height and width of x, two positive integers")
    shape = (*dout.shape[:2], height, width)
    if out is None:
        out = empty(shape, dout)
    check_output("out", out, shape, {"dout": dout})
    launch_each(SOURCE, "upsample_backward_naive<{}>", out.size, (dout, out, *_sizes(out, dout)))
    return out


def _check_maps(**maps: Array) -> None:
    check(maps)
    for name, array in maps.items():
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}, expected (B, C, H, W)")


def _sizes(x: Array, out: Array) -> tuple[np.int32, ...]:
    """What the kernels take after their arrays: planes, and the height and width of x and of the output."""
    return tuple(np.int32(n) for n in (x.shape[0] * x.shape[1], *x.shape[2:], *out.shape[2:]))
