"""Label maps, (B, H, W) class ids, and the other arrays beside those of the element type: what kernels that take them check.

Ids are uint8, int32 or int64. One of them, `ignore_index`, marks the pixels that do not count.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping

import numpy as np

from kernels.launch import LIMIT, Array, address, on_device, place

ID_DTYPES = ("uint8", "int32", "int64")


def check_array(name: str, array: Array, dtypes: tuple[str, ...], like: Mapping[str, Array]) -> None:
    """Check that this array can be given to a kernel: as `launch.check`, of one of `dtypes`, where the array in `like` is.

    TypeError or ValueError names what is wrong.
    """
    if not (isinstance(array, np.ndarray) or on_device(array)):
        raise TypeError(f"{name} is a {type(array).__module__}.{type(array).__name__}, expected a NumPy or a CuPy array")
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        raise TypeError(f"{name} has dtype {array.dtype.str} ({array.dtype.name}), expected {' or '.join(dtypes)}")
    for other, neighbour in like.items():
        if place(array) != place(neighbour):
            raise ValueError(f"{name} is on {place(array)} and {other} on {place(neighbour)}, expected one place")
    if array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}, which is empty")
    if array.size >= LIMIT:
        raise ValueError(f"{name} has shape {array.shape}, {array.size} elements, expected fewer than 2^31")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides} for shape {array.shape}, expected a C-contiguous array")
    if address(array) % array.dtype.itemsize:
        raise ValueError(f"{name} begins at an address that is no multiple of its {array.dtype.itemsize}-byte elements")


def check_written(name: str, out: Array, shape: tuple[int, ...], inputs: Mapping[str, Array]) -> None:
    """Check that a kernel can write this shape to `out`, which `check_array` has passed, while it reads `inputs`."""
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}, expected {shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{name} is read-only, expected an array to write to")
    for other, array in inputs.items():
        if address(out) < address(array) + array.nbytes and address(array) < address(out) + out.nbytes:
            raise ValueError(f"{name} overlaps {other} in memory, expected arrays apart")


def whole(name: str, value: int, least: int, most: int) -> int:
    """This argument as an int. ValueError unless it is a whole number from `least` to `most`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {least} to {most}")
    return number


def unfilled(shape: tuple[int, ...], dtype: str, like: Array) -> Array:
    """A new array in the place of `like`, for a kernel to fill."""
    if not on_device(like):
        return np.empty(shape, dtype)
    with like.device:
        return sys.modules["cupy"].empty(shape, dtype)


def filled(shape: tuple[int, ...], value: int, dtype: str, like: Array) -> Array:
    """A new array in the place of `like`, full of `value`."""
    if not on_device(like):
        return np.full(shape, value, dtype)
    with like.device:
        return sys.modules["cupy"].full(shape, value, dtype)


def on_host(array: Array) -> np.ndarray:
    """The array's values on the host, when what was queued before is done."""
    return array.get() if on_device(array) else array
