"""Read and Concatenate (Section 3.1, equations 5 and 6) behind their product: bias, readout and GELU, from tokens to a map.

GELU(W [t; t0] + bias) for every patch token t and the readout token t0: with W = [W_t W_r], what is left behind the products
is an addition, GELU, and turning N tokens of D channels into a map. These kernels do it in one pass, and its gradient in another.

Arrays are NumPy arrays (computed on the host) or CuPy arrays (on their GPU, on CuPy's current stream), C-contiguous, of dtype
float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or, on the host, float64; sums are float32, for float64 float64. Rung 1 is the
naive kernel, channels first alone; rung 2, the default, transposes tiles through shared memory.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

from kernels.ladder import accumulator, check_layout, ints, lanes, vector_bytes
from kernels.launch import Array, check, check_output, empty, launch, launch_each, new
from kernels.source import Source

_PIECES = ("{}, 16, 16", "{}, 16, 1", "{}, 1, 1")
SOURCE = Source(
    "reassemble.cu",
    (
        "read_project_naive<{}>",
        *(f"read_project_tiles<{pieces}>" for pieces in _PIECES),
        "read_project_channels_last<{}, 16>",
        "read_project_channels_last<{}, 1>",
        "read_project_backward_naive<{}>",
        *(f"read_project_backward_tiles<{pieces}>" for pieces in _PIECES),
        "read_project_backward_channels_last<{}, 16>",
        "read_project_backward_channels_last<{}, 1>",
        "read_project_sum_parts<{}>",
        "read_project_sum_images<{}>",
    ),
)
RUNGS = 2
THREADS = 256  # of a block of rung 2
LINE = 128  # bytes of a side of its squares


class ReadGradients(NamedTuple):
    """dtokens (B, N, D), dreadout (B, D) and dbias (D,)."""

    dtokens: Array
    dreadout: Array
    dbias: Array


def read_project(
    tokens: Array,
    readout: Array,
    bias: Array,
    grid: tuple[int, int],
    out: Array | None = None,
    *,
    layout: str = "channels_first",
    rung: int = RUNGS,
) -> Array:
    """`GELU(tokens + readout + bias)` as a map (B, D, h, w), or with layout="channels_last" (B, h, w, D); GELU is the exact one.

    tokens (B, N, D), N = h w in row-major order of the `grid` (h, w): the patch tokens times W_t. readout (B, D): the readout
    token times W_r. bias (D,). Returns `out`, by default a new array. TypeError or ValueError names the array whose type, dtype,
    shape, layout, size or place is wrong, or that `out` overlaps, or a grid, layout or rung that is none.
    """
    batch, count, width = _check(tokens, readout, bias)
    check_layout(layout, rung, RUNGS)
    shape = _map_shape(batch, count, width, grid, layout)
    if out is None:
        out = empty(shape, tokens)
    check_output("out", out, shape, {"tokens": tokens, "readout": readout, "bias": bias})
    arrays, sizes = (tokens, readout, bias, out), ints(batch, count, width)
    if rung == 1:
        launch_each(SOURCE, "read_project_naive<{}>", out.size, (*arrays, *sizes))
    elif layout == "channels_last":
        piece = vector_bytes(width, *arrays)
        launch_each(SOURCE, f"read_project_channels_last<{{}}, {piece}>", out.size // lanes(piece, out), (*arrays, *sizes))
    else:
        blocks = batch * _squares(count, tokens) * _squares(width, tokens)
        template = f"read_project_tiles<{{}}, {_pieces(arrays[:3], out)}>"
        launch(SOURCE, template, (blocks, 1, 1), (THREADS, 1, 1), (*arrays, *sizes[1:]))
    return out


def read_project_backward(
    dout: Array,
    tokens: Array,
    readout: Array,
    bias: Array,
    out: ReadGradients | None = None,
    *,
    layout: str = "channels_first",
    rung: int = RUNGS,
) -> ReadGradients:
    """The gradients of `read_project(tokens, readout, bias, ...)`, given that in its result, dout (B, D, h, w) or (B, h, w, D).

    Returns `out` (dtokens, dreadout, dbias), by default new arrays. Sums have one fixed order for given sizes, rung and layout,
    so the result is the same every time. Errors as in `read_project`.
    """
    check({"dout": dout, "tokens": tokens, "readout": readout, "bias": bias})
    batch, count, width = _check(tokens, readout, bias)
    check_layout(layout, rung, RUNGS)
    if dout.ndim != 4:
        raise ValueError(f"dout has shape {dout.shape}, expected four dimensions")
    grid = dout.shape[2:] if layout == "channels_first" else dout.shape[1:3]
    shape = _map_shape(batch, grid[0] * grid[1], width, grid, layout)
    if dout.shape != shape or grid[0] * grid[1] != count:
        raise ValueError(f"dout has shape {dout.shape} and tokens {tokens.shape}, expected a map of these tokens")
    if out is None:
        out = ReadGradients(*(empty(array.shape, array) for array in (tokens, readout, bias)))
    inputs = {"dout": dout, "tokens": tokens, "readout": readout, "bias": bias}
    for name, array, like in zip(ReadGradients._fields, out, (tokens, readout, bias), strict=True):
        check_output(name, array, like.shape, inputs)
        inputs[name] = array  # the next must not overlap it either
    dtokens, dreadout, dbias = out
    parts = 1 if rung == 1 else _squares(count, tokens)
    sums = new((batch, parts, width), accumulator(tokens), tokens)
    arrays, sizes = (dout, tokens, readout, bias, dtokens, sums), ints(batch, count, width)
    if rung == 1:
        launch_each(SOURCE, "read_project_backward_naive<{}>", batch * width, (*arrays, *sizes))
    else:
        if layout == "channels_last":
            template = f"read_project_backward_channels_last<{{}}, {vector_bytes(width, *arrays[:5])}>"
        else:
            template = f"read_project_backward_tiles<{{}}, {_pieces(arrays[1:5], dout)}>"
        blocks = batch * parts * _squares(width, tokens)
        launch(SOURCE, template, (blocks, 1, 1), (THREADS, 1, 1), (*arrays, *sizes[1:]))
    totals = ints(batch, parts, width)
    launch_each(SOURCE, "read_project_sum_parts<{}>", batch * width, (dreadout, sums, *totals))
    launch_each(SOURCE, "read_project_sum_images<{}>", width, (dbias, sums, *totals))
    return ReadGradients(dtokens, dreadout, dbias)


def _check(tokens: Array, readout: Array, bias: Array) -> tuple[int, int, int]:
    """B, N, D."""
    check({"tokens": tokens, "readout": readout, "bias": bias})
    if tokens.ndim != 3:
        raise ValueError(f"tokens has shape {tokens.shape}, expected (B, N, D)")
    batch, count, width = tokens.shape
    for name, array, expected in (("readout", readout, (batch, width)), ("bias", bias, (width,))):
        if array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape} and tokens {tokens.shape}, expected {expected}")
    return batch, count, width


def _map_shape(batch: int, count: int, width: int, grid: tuple[int, int], layout: str) -> tuple[int, ...]:
    try:
        height, columns = (operator.index(length) for length in grid)
    except (TypeError, ValueError):
        height = columns = 0
    if height < 1 or columns < 1 or height * columns != count:
        raise ValueError(f"grid is {grid!r}, expected two positive integers whose product is the number of tokens, {count}")
    return (batch, width, height, columns) if layout == "channels_first" else (batch, height, columns, width)


def _squares(length: int, array: Array) -> int:
    """How many squares of rung 2 a side of this length takes."""
    return -(-length * array.dtype.itemsize // LINE)


def _pieces(token_arrays: tuple[Array, ...], map_array: Array) -> str:
    """The template's two accesses: of rows of D elements, and of rows of N = h w, 16 bytes at a time where they can be."""
    piece = vector_bytes(token_arrays[0].shape[-1], *token_arrays)
    columns = map_array.shape[2] * map_array.shape[3]
    return f"{piece}, {vector_bytes(columns, map_array) if piece > 1 else 1}"
