"""What every primitive demands of its arguments, in one place: the errors name the operation, the argument and its shape."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Pair: TypeAlias = tuple[int, int]
Padding: TypeAlias = int | tuple[Pair, Pair]

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def check_arrays(op: str, **arrays: Array | None) -> None:
    """Demand that the arrays (None is skipped) are float32 or all float64, and that none is empty."""
    first: tuple[str, Any] | None = None
    for name, array in arrays.items():
        if array is None:
            continue
        if not isinstance(array, np.ndarray) or array.dtype not in _DTYPES:
            kind = f"dtype {array.dtype} and shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"{op}: {name} has {kind}: expected a NumPy array of native float32 or float64")
        if array.size == 0:
            raise ValueError(f"{op}: {name} has shape {array.shape}: every dimension must be at least 1")
        if first is None:
            first = name, array.dtype
        elif array.dtype != first[1]:
            raise TypeError(
                f"{op}: {name} (shape {array.shape}) is {array.dtype} but {first[0]} is {first[1]}: expected one dtype for all"
            )


def check_shape(op: str, name: str, array: Array | None, expected: tuple[int | str, ...]) -> None:
    """Demand the shape `expected`, where a string names a dimension of any length; None is skipped."""
    if array is None:
        return
    matches = array.ndim == len(expected) and all(
        isinstance(want, str) or have == want for have, want in zip(array.shape, expected, strict=True)
    )
    if not matches:
        shape = ", ".join(map(str, expected)) + ("," if len(expected) == 1 else "")
        raise ValueError(f"{op}: {name} has shape {array.shape}: expected ({shape})")


def check_gradient(op: str, dy: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Demand that the gradient handed to a vjp has the shape and dtype of the operation's result."""
    if not isinstance(dy, np.ndarray) or dy.shape != shape or dy.dtype != dtype:
        have = f"{dy.dtype} of shape {dy.shape}" if isinstance(dy, np.ndarray) else type(dy).__name__
        raise ValueError(f"{op}: dy is {have}: expected {dtype} of shape {shape}, as the result")


def check_positive(op: str, **numbers: int) -> None:
    """Demand whole numbers of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer) or number < 1:
            raise ValueError(f"{op}: {name} is {number!r}: expected a whole number of at least 1")


def padding_pairs(op: str, padding: Padding) -> tuple[Pair, Pair]:
    """Return padding as ((top, bottom), (left, right)); a number pads all four sides."""
    if isinstance(padding, int | np.integer):
        padding = ((int(padding), int(padding)), (int(padding), int(padding)))
    try:
        (top, bottom), (left, right) = padding
        valid = all(isinstance(side, int | np.integer) and side >= 0 for side in (top, bottom, left, right))
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{op}: padding is {padding!r}: expected a number >= 0 or ((top, bottom), (left, right)) of such")
    return (int(top), int(bottom)), (int(left), int(right))


def window_count(op: str, shape: tuple[int, ...], kernel: Pair, stride: int, padding: tuple[Pair, Pair]) -> Pair:
    """Return how many windows fit down and across a (..., H, W) map: the height and width of a convolution's result."""
    down, across = (size + sum(pair) for size, pair in zip(shape[-2:], padding, strict=True))
    if down < kernel[0] or across < kernel[1]:
        raise ValueError(f"{op}: x has shape {shape}, padded {down} x {across}: the kernel, {kernel[0]} x {kernel[1]}, is larger")
    return (down - kernel[0]) // stride + 1, (across - kernel[1]) // stride + 1
