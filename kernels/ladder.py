"""What the functions that climb a ladder share: its rungs, accesses of 16 bytes, layouts, whole numbers, class ids."""

from __future__ import annotations

import operator

import numpy as np

from kernels.launch import Array, address, on_device

VECTOR = 16  # bytes: the most that a thread of a GPU moves by one instruction
ID_DTYPES = ("uint8", "int32", "int64")  # of maps of class ids, one of which, `ignore_index`, marks pixels that do not count
LAYOUTS = ("channels_first", "channels_last")  # of a map in memory: (B, C, H, W) or (B, H, W, C)


def whole(name: str, value: int, least: int, most: int) -> int:
    """This argument as an int. ValueError unless it is a whole number from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or not least <= number <= most:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
    return number


def check_rung(rung: int, rungs: int) -> None:
    """ValueError where `rung` is not a whole number from 1 (naive) to `rungs`."""
    whole("rung", rung, 1, rungs)


def check_layout(layout: str, rung: int, rungs: int) -> None:
    """ValueError where the layout of a map is unknown, or has no such rung: the naive kernels are channels first."""
    check_rung(rung, rungs)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout == "channels_last" and rung == 1:
        raise ValueError("rung is 1, expected more: channels last, there is no naive kernel")


def vector_bytes(length: int, *arrays: Array) -> int:
    """How a thread accesses these arrays, each made of rows of `length` elements: 16 bytes at a time where all rows allow.

    Otherwise 1, which stands for one element at a time.
    """
    fits = all(length * array.dtype.itemsize % VECTOR == 0 and address(array) % VECTOR == 0 for array in arrays)
    return VECTOR if fits else 1


def lanes(piece: int, array: Array) -> int:
    """Elements in what a thread accesses at a time, as `vector_bytes` says."""
    return max(1, piece // array.dtype.itemsize)


def accumulator(like: Array) -> np.dtype:
    """The dtype that kernels for elements of the dtype of `like` compute in: float64 for float64, otherwise float32."""
    return np.dtype(np.float64 if like.dtype == np.float64 else np.float32)


def ints(*sizes: int) -> tuple[np.int32, ...]:
    """Sizes as a kernel takes them."""
    return tuple(np.int32(size) for size in sizes)


def on_host(array: Array) -> np.ndarray:
    """The array's values on the host, when what was queued before is done."""
    return array.get() if on_device(array) else array
