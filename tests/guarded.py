"""Arrays for kernels between guards of NaN, at any alignment; and what a result rounded to a narrow dtype may err by."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOW = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
U = 2.0**-24  # the relative rounding error of float32
GUARD = 64  # elements on either side


def guarded(values: np.ndarray, shift: int = 0) -> np.ndarray:
    """A copy between NaNs: a read beyond either end spoils the result, and `untouched` finds a write.

    It begins `shift` elements after a multiple of 16 bytes.
    """
    padded = np.full(values.size + 2 * GUARD + 16, np.nan, values.dtype)
    begin = GUARD + -(padded.ctypes.data // values.itemsize) % (16 // values.itemsize) + shift
    padded = padded[begin - GUARD : begin + values.size + GUARD]
    inner = padded[GUARD:-GUARD].reshape(values.shape)
    inner[...] = values
    assert inner.ctypes.data % 16 == shift * values.itemsize % 16
    return inner


def untouched(inner: np.ndarray) -> bool:
    """Whether the NaNs on both sides of an array of `guarded` are still there."""
    padded = inner.base
    begin = (inner.ctypes.data - padded.ctypes.data) // inner.itemsize
    outside = np.concatenate([padded[:begin], padded[begin + inner.size :]])
    return outside.size >= 2 * GUARD and bool(np.isnan(outside.astype(float)).all())


def off(shape: tuple[int, ...], dtype: type, apart: bool) -> np.ndarray:
    """Ones, which begin one element after a multiple of 16 bytes, or at one, and end with the memory they were given."""
    size = int(np.prod(shape))
    return np.ones(size + apart, dtype)[int(apart) :].reshape(shape)


def assert_rounded(actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray) -> None:
    """`allowed` is what float32 arithmetic may err by; a narrower result adds one rounding to its dtype.

    That is half a unit in the last place, or half the smallest subnormal number.
    """
    if actual.dtype != np.float32:
        kind = ml_dtypes.finfo(actual.dtype)
        allowed = allowed + np.maximum(float(kind.eps) / 2 * (np.abs(expected) + allowed), float(kind.smallest_subnormal) / 2)
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{actual.dtype} errs by {(error / np.maximum(allowed, 1e-300)).max():.3g} times the bound"
