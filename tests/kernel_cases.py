"""Every rung of every kernel, forward and backward, on small arrays: one table for schedules, sanitizers and GPUs.

    results = CASES["fusion, rung 1"](np.random.default_rng(0), np.dtype("float32"), lambda array: array)

The last argument puts an array in its place: itself for the host, `cupy.asarray` for a GPU. Sizes are multiples of nothing, or of
16 bytes where a rung has a form of its own for that; there are several images, blocks and tiles, masked pixels, ignored labels.
Where an operation gives a block or a thread more work than such sizes have, it is told to give less.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np

from kernels import alignment, attention, confusion, cross_entropy, fusion, losses, reassemble
from kernels.ladder import accumulator
from kernels.launch import on_device

Place = Callable[[np.ndarray], Any]
Case = Callable[[np.random.Generator, np.dtype, Place], tuple[Any, ...]]

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)  # those of a GPU


def attend(
    rung: int, shape: tuple[int, int, int, int], keys: int, rng: np.random.Generator, dtype: np.dtype, place: Place
) -> tuple:
    """Attention of (B, heads, N, d) to `keys` others; beyond rung 2 for 16-bit types alone."""
    batch, heads, _, depth = shape
    q, dout = (place(rng.standard_normal(shape).astype(dtype)) for _ in range(2))
    k, v = (place(rng.standard_normal((batch, heads, keys, depth)).astype(dtype)) for _ in range(2))
    out, lse = attention.attend(q, k, v, rung=rung)
    return out, lse, *attention.attend_backward(q, k, v, out, lse, dout, rung=rung)


def read(
    rung: int, layout: str, width: int, grid: tuple[int, int], rng: np.random.Generator, dtype: np.dtype, place: Place
) -> tuple:
    """Read-project of two images of `grid` tokens of `width` channels."""
    tokens = place(rng.standard_normal((2, grid[0] * grid[1], width)).astype(dtype))
    readout, bias = (place(rng.standard_normal(shape).astype(dtype)) for shape in ((2, width), (width,)))
    dout = place(rng.standard_normal((2, width, *grid) if layout == "channels_first" else (2, *grid, width)).astype(dtype))
    out = reassemble.read_project(tokens, readout, bias, grid, layout=layout, rung=rung)
    return out, *reassemble.read_project_backward(dout, tokens, readout, bias, layout=layout, rung=rung)


def upsample(rung: int, layout: str, size: tuple[int, ...], rng: np.random.Generator, dtype: np.dtype, place: Place) -> tuple:
    """Upsampling of (2, C, h, w) to (2, C, H, W), `size` being (C, h, w, H, W); a thread walks down three rows."""
    channels, *sides = size
    maps = [(2, channels, *side) if layout == "channels_first" else (2, *side, channels) for side in (sides[:2], sides[2:])]
    x, skip, dout = (place(rng.standard_normal(shape).astype(dtype)) for shape in (maps[0], maps[1], maps[1]))
    with patch.multiple(fusion, THREADS=1, ROWS=3):
        dx = fusion.upsample_backward(dout, (sides[0], sides[1]), layout=layout, rung=rung)
        return fusion.upsample_add(x, skip, layout=layout, rung=rung), dx


def depth(
    rung: int, size: tuple[int, int], threads: int, chunk: int, rng: np.random.Generator, dtype: np.dtype, place: Place
) -> tuple:
    """The depth loss of an image, one without a valid pixel, and one with ties, in blocks of `threads` and `chunk` pixels."""
    prediction, target = rng.uniform(1, 2, (3, *size)), rng.uniform(1, 2, (3, *size))
    prediction[2] = np.round(prediction[2], 1)
    mask = rng.random((3, *size)) < 0.8
    mask[1] = False
    wide = accumulator(np.empty(0, dtype))
    arrays = place(prediction.astype(dtype)), place(target.astype(wide)), place(mask)
    with patch.multiple(losses, THREADS=threads, SMALL_CHUNK=chunk):
        loss, saved = losses.depth_loss(*arrays, rung=rung)
        return loss, losses.depth_loss_backward(place(np.full(1, 8, wide)), arrays[0], saved)


def entropy(rung: int, size: tuple[int, ...], ids: type, rng: np.random.Generator, dtype: np.dtype, place: Place) -> tuple:
    """Cross-entropy of logits (B, K, h, w) at labels (B, H, W), `size` being (B, K, h, w, H, W).

    A fifth of the labels are ignored, and of several images all of the second. The counts among the results are whole numbers.
    """
    labels = rng.integers(0, size[1], (size[0], *size[4:])).astype(ids)
    labels[rng.random(labels.shape) < 0.2] = 255
    labels[1:2] = 255
    logits, labels = place(rng.standard_normal(size[:4]).astype(dtype)), place(labels)
    forward = cross_entropy.cross_entropy(logits, labels, rung=rung)
    dloss = place(np.full(1, 8, accumulator(np.empty(0, dtype))))
    dlogits = cross_entropy.cross_entropy_backward(dloss, logits, labels, forward, rung=rung)
    return forward.loss, forward.log_sum_exp, forward.totals[:1], forward.totals[1:].astype(np.int64), dlogits


def fit(rung: int, size: tuple[int, int], rng: np.random.Generator, dtype: np.dtype, place: Place) -> tuple:
    """Least squares of an image, one without a valid pixel, and one that is constant."""
    prediction, target = rng.uniform(1, 2, (3, *size)), rng.uniform(1, 2, (3, *size))
    prediction[2] = 1.5
    mask = rng.random((3, *size)) < 0.8
    mask[1] = False
    maps = place(prediction.astype(dtype)), place(target.astype(dtype)), place(mask)
    with patch.object(alignment, "PIXELS", 1):
        return tuple(alignment.least_squares(*maps, rung=rung))


def count(rung: int, rng: np.random.Generator, dtype: np.dtype, place: Place) -> tuple:
    """The confusion matrix of two maps of class ids, which have no element type: `dtype` is not used."""
    label = np.repeat(rng.integers(0, 7, (2, 9, 60)), 11, axis=2).astype(np.uint8)
    label[rng.random(label.shape) < 0.1] = 255
    prediction = np.where(rng.random(label.shape) < 0.5, rng.integers(0, 7, label.shape), label % 7).astype(np.int32)
    return (confusion.confusion(place(prediction), place(label), 7, rung=rung),)


CASES: dict[str, Case] = {
    **{
        f"attention, depth {shape[3]}, rung {rung}": partial(attend, rung, shape, keys)
        for rung in (1, 2, 3)
        for shape, keys in (((2, 1, 70, 24), 37), ((1, 1, 35, 72), 70), ((1, 2, 9, 13), 5), ((2, 1, 5, 101), 9))
    },
    "reassemble, rung 1": partial(read, 1, "channels_first", 37, (9, 11)),
    **{
        f"reassemble, {layout}, {kind}, rung 2": partial(read, 2, layout, width, grid)
        for layout in ("channels_first", "channels_last")
        for kind, width, grid in (("odd", 37, (9, 11)), ("even width", 40, (9, 11)), ("even", 40, (8, 8)))
    },
    "fusion, rung 1": partial(upsample, 1, "channels_first", (3, 5, 7, 11, 13)),
    **{
        f"fusion, {layout}, {kind}, rung 2": partial(upsample, 2, layout, size)
        for layout in ("channels_first", "channels_last")
        for kind, size in (("odd", (3, 5, 7, 11, 13)), ("even", (8, 5, 8, 10, 16)))
    },
    **{
        f"losses, {size[0]} x {size[1]}, rung {rung}": partial(depth, rung, size, threads, chunk)
        for rung in (1, 2)
        for size, threads, chunk in (((13, 17), losses.THREADS, losses.SMALL_CHUNK), ((9, 11), 64, 32), ((10, 12), 64, 32))
    },
    **{
        f"cross_entropy, {size[1]} classes, rung {rung}": partial(entropy, rung, size, ids)
        for rung in (1, 2)
        for size, ids in (((3, 3, 4, 5, 9, 36), np.uint8), ((1, 18, 3, 4, 5, 7), np.int64))
    },
    **{
        f"alignment, {size[0]} x {size[1]}, rung {rung}": partial(fit, rung, size)
        for rung in (1, 2)
        for size in ((15, 23), (16, 24))
    },
    **{f"confusion, rung {rung}": partial(count, rung) for rung in (1, 2, 3)},
}


def exists(name: str, dtype: np.dtype) -> bool:
    """Whether this rung is there for elements of `dtype`: tensor cores multiply 16-bit numbers alone."""
    return not (name.startswith("attention") and name.endswith("rung 3")) or dtype in (FLOAT16, BFLOAT16)


def run(name: str, dtype: np.dtype, place: Place = lambda array: array) -> list[np.ndarray]:
    """What a case gives, on the host, always of the same draw."""
    found = CASES[name](np.random.default_rng(0), dtype, place)
    return [array.get() if on_device(array) else np.asarray(array) for array in found]
