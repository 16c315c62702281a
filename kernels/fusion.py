"""Fusion (Section 3.1, Figure 1 right): bilinear upsampling to the skip's size with the skip added, and its gradient.

Maps are (B, C, H, W), or with layout="channels_last" (B, H, W, C), in both cases C-contiguous; NumPy arrays (computed on the
host) or CuPy arrays (on their GPU, on CuPy's current stream), of dtype float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or, on
the host, float64; sums are float32, for float64 float64.

Rung 1 is the naive kernel, channels first alone; rung 2, the default, shares the work between the rows that one thread walks
down. They compute the same sums in the same order. A thread moves 16 bytes at a time where rows (of W elements, or C) are
multiples of that and begin at multiples of it, and one element at a time elsewhere.
"""

from __future__ import annotations

import operator

from kernels.ladder import check_layout, ints, lanes, vector_bytes
from kernels.launch import Array, check, check_output, empty, launch_each
from kernels.source import Source

SOURCE = Source(
    "fusion.cu",
    (
        "upsample_add_naive<{}>",
        "upsample_add_rows<{}, 16>",
        "upsample_add_rows<{}, 1>",
        "upsample_add_channels_last<{}, 16>",
        "upsample_add_channels_last<{}, 1>",
        "upsample_backward_naive<{}>",
        "upsample_backward_rows<{}>",
        "upsample_backward_channels_last<{}, 16>",
        "upsample_backward_channels_last<{}, 1>",
    ),
)
RUNGS = 2
AXES = {"channels_first": "BCHW", "channels_last": "BHWC"}
ROWS = 8  # that one thread walks down at most: each strip of rows reads two rows of x, or dout, of its neighbours
THREADS = 2**17  # that fill a GPU: strips are shorter where there would be fewer
PLANES = 4  # of one thread of upsample_backward_rows
BLOCK = 128


def upsample_add(x: Array, skip: Array, out: Array | None = None, *, layout: str = "channels_first", rung: int = RUNGS) -> Array:
    """`resize(x) + skip`: x (B, C, h, w) is resized bilinearly, align_corners=True, to the size of skip (B, C, H, W).

    With layout="channels_last" x is (B, h, w, C) and skip (B, H, W, C). Returns `out`, by default a new array, of skip's shape.
    The size may grow, shrink or stay. TypeError or ValueError names the array whose type, dtype, shape, layout, size or place is
    wrong, or that `out` overlaps, or the unknown layout or rung.
    """
    _check_maps(layout, rung, x=x, skip=skip)
    (batch, channels, height, width), (*same, out_height, out_width) = _sizes(layout, x.shape), _sizes(layout, skip.shape)
    if same != [batch, channels]:
        raise ValueError(f"x has shape {x.shape} and skip {skip.shape}, expected the same batch size and channels")
    if out is None:
        out = empty(skip.shape, skip)
    check_output("out", out, skip.shape, {"x": x, "skip": skip})
    sides = (height, width, out_height, out_width)
    if rung == 1:
        _launch("upsample_add_naive<{}>", out.size, (x, skip, out), (batch * channels, *sides))
    elif layout == "channels_first":
        piece = vector_bytes(out_width, skip, out)
        columns = batch * channels * (out_width // lanes(piece, out))
        rows = _rows(columns, out_height)
        threads = columns * -(-out_height // rows)
        _launch(f"upsample_add_rows<{{}}, {piece}>", threads, (x, skip, out), (batch * channels, *sides, rows))
    else:
        piece = vector_bytes(channels, x, skip, out)
        columns = batch * out_width * (channels // lanes(piece, out))
        rows = _rows(columns, out_height)
        threads = columns * -(-out_height // rows)
        _launch(f"upsample_add_channels_last<{{}}, {piece}>", threads, (x, skip, out), (batch, channels, *sides, rows))
    return out


def upsample_backward(
    dout: Array, size: tuple[int, int], out: Array | None = None, *, layout: str = "channels_first", rung: int = RUNGS
) -> Array:
    """The gradient in x, (B, C, *size), of `upsample_add(x, skip)`, given that in its result, dout (B, C, H, W).

    With layout="channels_last" dout is (B, H, W, C) and the gradient (B, *size, C). The gradient in skip is dout itself. Returns
    `out`, by default a new array. Each element is a sum in one fixed order, so the result is the same every time, and on either
    rung. Errors as in `upsample_add`; ValueError where size is not two positive integers.
    """
    _check_maps(layout, rung, dout=dout)
    try:
        height, width = (operator.index(length) for length in size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ValueError(f"size is {size!r}, expected the height and width of x, two positive integers")
    batch, channels, out_height, out_width = _sizes(layout, dout.shape)
    shape = (batch, channels, height, width) if layout == "channels_first" else (batch, height, width, channels)
    if out is None:
        out = empty(shape, dout)
    check_output("out", out, shape, {"dout": dout})
    sides = (height, width, out_height, out_width)
    if rung == 1:
        _launch("upsample_backward_naive<{}>", out.size, (dout, out), (batch * channels, *sides))
    elif layout == "channels_first":
        columns = -(-batch * channels // PLANES) * width
        rows = _rows(columns, height)
        threads = columns * -(-height // rows)
        _launch("upsample_backward_rows<{}>", threads, (dout, out), (batch * channels, *sides, rows))
    else:
        piece = vector_bytes(channels, dout, out)
        columns = batch * width * (channels // lanes(piece, out))
        rows = _rows(columns, height)
        threads = columns * -(-height // rows)
        _launch(f"upsample_backward_channels_last<{{}}, {piece}>", threads, (dout, out), (batch, channels, *sides, rows))
    return out


def _check_maps(layout: str, rung: int, **maps: Array) -> None:
    check(maps)
    check_layout(layout, rung, RUNGS)
    for name, array in maps.items():
        if array.ndim != 4:
            raise ValueError(f"{name} has shape {array.shape}, expected ({', '.join(AXES[layout])})")


def _sizes(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """B, C, H, W of a map's shape."""
    return tuple(shape[AXES[layout].index(axis)] for axis in "BCHW")


def _rows(columns: int, height: int) -> int:
    """How many rows a thread walks down, where there are `columns` columns of `height` rows: few enough to fill the GPU."""
    return max(1, min(ROWS, columns * height // THREADS))


def _launch(template: str, threads: int, arrays: tuple[Array, ...], sizes: tuple[int, ...]) -> None:
    launch_each(SOURCE, template, threads, (*arrays, *ints(*sizes)), BLOCK)
