"""Attention (Vaswani et al. 2017, equation 1): softmax(q k^T / sqrt(d)) v, and its gradients.

q is (B, heads, N, d), k and v are (B, heads, M, d), d at most 128: NumPy arrays (computed on the host) or CuPy arrays (on their
GPU, on CuPy's current stream), of dtype float32, float16, bfloat16 (`ml_dtypes.bfloat16`) or, on the host, float64. Sums, the
softmax and the logarithms `lse` are float32, for float64 float64. Products by tensor cores (rung 3) take the softmax's weights
rounded to the dtype of q. No rung has an array of N x M elements, and every result is the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from kernels.ladder import accumulator
from kernels.launch import (
    Array,
    address,
    check,
    check_apart,
    check_output,
    check_written,
    empty,
    launch,
    launch_each,
    new,
    on_device,
    place,
)
from kernels.source import Source

DEPTHS = (64, 128)  # those that the kernels are compiled for: a smaller depth runs in the next larger one


def _source(file: str, kernels: tuple[str, ...], others: tuple[str, ...] = ()) -> Source:
    """The rungs of these kernels, and what they all need."""
    naive = tuple(f"{name}_naive<{{}}>" for name in kernels)
    tiled = tuple(f"{name}_tiled<{{}}, {depth}>" for name in kernels for depth in DEPTHS)
    tensor = tuple(f"{name}_tensor<{{}}, {depth}>" for name in kernels for depth in DEPTHS)
    return Source(file, (*naive, *others, *tiled, *tensor), half=tensor)


SOURCE = _source("attention.cu", ("attend",))
BACKWARD = _source("attention_backward.cu", ("attend_dq", "attend_dkv"), ("attend_delta<{}>",))

THREADS = 128


def attend(
    q: Array, k: Array, v: Array, out: Array | None = None, lse: Array | None = None, rung: int | None = None
) -> tuple[Array, Array]:
    """softmax(q k^T / sqrt(d)) v and, for each row, log(sum(exp(q k^T / sqrt(d)))), which the gradients need.

    Returns `out` (B, heads, N, d), of q's dtype, and `lse` (B, heads, N), float32 (of float64 float64), by default new arrays.
    `rung` is 1 (naive), 2 (tiled) or 3 (tensor cores: float16, from sm_75 on, and bfloat16, from sm_80 on), by default the
    fastest for this dtype and GPU. TypeError or ValueError names the array whose type, dtype, shape, layout, size or place is
    wrong, or that `out` or `lse` overlaps, or the rung.
    """
    inputs = {"q": q, "k": k, "v": v}
    _check_inputs(inputs)
    chosen = _rung(rung, q)
    out = empty(q.shape, q) if out is None else out
    lse = new(q.shape[:-1], accumulator(q), q) if lse is None else lse
    check_output("out", out, q.shape, inputs)
    _check_sums("lse", lse, q)
    check_apart("lse", lse, {**inputs, "out": out})
    arguments = (q, k, v, out, lse)
    if chosen == 1:
        rows = np.int32(lse.size)
        launch_each(SOURCE, "attend_naive<{}>", lse.size, (*arguments, rows, *_sizes(q, k)), THREADS)
    else:
        _launch_blocks("attend", chosen, q.shape, q, k, arguments, _wide(q, k, v, out))
    return out, lse


def attend_backward(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    dout: Array,
    gradients: tuple[Array, Array, Array] | None = None,
    rung: int | None = None,
) -> tuple[Array, Array, Array]:
    """The gradients in q, k and v of `attend`, given its results `out` and `lse`, and the gradient in out, dout (B, heads, N, d).

    Returns `gradients`, dq (B, heads, N, d), dk and dv (B, heads, M, d), by default new arrays. The softmax is computed again,
    from lse. `rung` and errors as in `attend`.
    """
    inputs = {"q": q, "k": k, "v": v, "out": out, "dout": dout}
    _check_inputs(inputs)
    for name in ("out", "dout"):
        if inputs[name].shape != q.shape:
            raise ValueError(f"{name} has shape {inputs[name].shape}, expected {q.shape}, that of q")
    _check_sums("lse", lse, q, written=False)
    chosen = _rung(rung, q)
    if gradients is None:
        gradients = empty(q.shape, q), empty(k.shape, q), empty(k.shape, q)
    if not isinstance(gradients, tuple) or len(gradients) != 3:
        raise TypeError(f"gradients is a {type(gradients).__name__}, expected a tuple of three arrays, dq, dk and dv")
    others = dict(inputs)
    for name, gradient, like in zip(("dq", "dk", "dv"), gradients, (q, k, k), strict=True):
        check_output(name, gradient, like.shape, others)
        check_apart(name, gradient, {"lse": lse})
        others[name] = gradient

    dq, dk, dv = gradients
    delta = new(q.shape[:-1], accumulator(q), q)
    rows, depth, wide = np.int32(lse.size), np.int32(q.shape[-1]), np.int32(_wide(out, dout))
    launch_each(BACKWARD, "attend_delta<{}>", 8 * lse.size, (out, dout, delta, rows, depth, wide), THREADS)
    arguments = (q, k, v, dout, lse, delta)
    if chosen == 1:
        launch_each(BACKWARD, "attend_dq_naive<{}>", lse.size, (*arguments, dq, rows, *_sizes(q, k)), THREADS)
        rows = np.int32(math.prod(k.shape[:-1]))
        launch_each(BACKWARD, "attend_dkv_naive<{}>", int(rows), (*arguments, dk, dv, rows, *_sizes(q, k)), THREADS)
    else:
        aligned = _wide(q, k, v, dout)
        _launch_blocks("attend_dq", chosen, q.shape, q, k, (*arguments, dq), aligned and _wide(dq))
        _launch_blocks("attend_dkv", chosen, k.shape, q, k, (*arguments, dk, dv), aligned and _wide(dk, dv))
    return gradients


def _check_inputs(inputs: Mapping[str, Array]) -> None:
    check(inputs)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    for name in ("q", "k", "v"):
        if inputs[name].ndim != 4:
            raise ValueError(f"{name} has shape {inputs[name].shape}, expected (B, heads, tokens, d)")
    if q.shape[3] > DEPTHS[-1]:
        raise ValueError(f"q has shape {q.shape}, expected d of at most {DEPTHS[-1]}")
    if k.shape != (*q.shape[:2], k.shape[2], q.shape[3]):
        raise ValueError(f"k has shape {k.shape} and q {q.shape}, expected the same B, heads and d")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape} and k {k.shape}, expected the same")


def _rung(rung: int | None, q: Array) -> int:
    """The rung asked for, or the fastest that these elements have where q is."""
    tensor_cores = q.dtype.name in ("float16", "bfloat16")
    if rung is None:
        lacking = q.dtype.name == "bfloat16" and on_device(q) and int(q.device.compute_capability) < 80
        return 3 if tensor_cores and not lacking else 2
    if type(rung) is not int or not 1 <= rung <= 3:
        raise ValueError(f"rung is {rung!r}, expected 1, 2 or 3")
    if rung == 3 and not tensor_cores:
        raise ValueError(f"rung is 3, tensor cores, for float16 and bfloat16, and q has dtype {q.dtype.name}, expected 1 or 2")
    return rung


def _check_sums(name: str, sums: Array, q: Array, written: bool = True) -> None:
    """Check one number for each row of q, of the dtype of sums."""
    check({name: sums})
    if sums.dtype != accumulator(q):
        raise TypeError(f"{name} has dtype {sums.dtype.name}, expected {accumulator(q).name} for q of {q.dtype.name}")
    if place(sums) != place(q):
        raise ValueError(f"{name} is on {place(sums)} and q on {place(q)}, expected one place")
    if written:
        check_written(name, sums, q.shape[:-1], {})
    elif sums.shape != q.shape[:-1]:
        raise ValueError(f"{name} has shape {sums.shape}, expected {q.shape[:-1]}")


def _wide(*arrays: Array) -> bool:
    """Whether all rows of these arrays can be accessed 16 bytes at a time."""
    return all(address(array) % 16 == 0 and array.shape[-1] * array.dtype.itemsize % 16 == 0 for array in arrays)


def _sizes(q: Array, k: Array) -> tuple[np.generic, ...]:
    """What the kernels take after their arrays: queries, keys, depth and scale."""
    depth = q.shape[3]
    return np.int32(q.shape[2]), np.int32(k.shape[2]), np.int32(depth), accumulator(q).type(1 / math.sqrt(depth))


def _launch_blocks(
    name: str, rung: int, shape: tuple[int, ...], q: Array, k: Array, arguments: tuple[Array, ...], wide: bool
) -> None:
    """Launch rung 2 or 3 over the rows of `shape`, (B, heads, rows, d), with the shared memory that the kernels lay out."""
    depth = next(depth for depth in DEPTHS if shape[3] <= depth)
    if rung == 2:
        rows, tile, row_bytes = 4096 // depth, 32 if name == "attend" else 2048 // depth, (depth + 4) * accumulator(q).itemsize
        kept = rows if name == "attend" else 2 * rows
        shared = (kept + 2 * tile) * row_bytes + rows * (tile + 4) * accumulator(q).itemsize
        template = f"{name}_tiled<{{}}, {depth}>"
    else:
        rows, tile, row_bytes = 64, (4096 if name == "attend" else 2048) // depth, (depth + 8) * 2
        kept = rows if name == "attend" else 2 * rows
        shared = (kept + 4 * tile) * row_bytes  # tiles of keys and of values, each twice
        template = f"{name}_tensor<{{}}, {depth}>"
    blocks = shape[0] * shape[1] * -(-shape[2] // rows)
    source = SOURCE if name == "attend" else BACKWARD
    launch(source, template, (blocks, 1, 1), (THREADS, 1, 1), (*arguments, *_sizes(q, k), np.int32(wide)), shared)
