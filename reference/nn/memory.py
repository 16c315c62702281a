"""Memory for the compiled twins, used again instead of being asked for anew.

New memory costs time: the system hands it out cleared, page by page, and takes it back when a large array is freed, so that a map
of 75 MB costs more to get than to compute. So large results take the place of freed ones, and what a twin needs only during
a call is kept by the thread for the next. All of it is asked for in arrays so large that NumPy asks for large pages.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np

from .checks import Array

LARGE = 1 << 22  # bytes from which an array is worth keeping, and from which NumPy asks for large pages
KEPT = 1 << 29  # bytes of freed results that are kept at most
WORKSPACE = 1 << 26  # bytes of one workspace that are kept at most

_freed: list[Array] = []
_lock = threading.Lock()
_workspaces = threading.local()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Return a C-contiguous array of any values, as np.empty does, in the memory of a freed one if there is one that fits."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    block = _take(size)
    array = np.frombuffer(block.data, dtype, math.prod(shape))
    # The base, a view of the block's memory that is this array's own, is kept alive by all views of the array.
    weakref.finalize(array.base, _give_back, block).atexit = False
    return array.reshape(shape)


def empty_like(array: Array) -> Array:
    """Return `empty` of the shape and dtype of `array`."""
    return empty(array.shape, array.dtype)


def workspace(use: str, entries: int, dtype: np.dtype) -> Array:
    """Return at least `entries` numbers of any values, which stay valid until this thread asks again for the same use."""
    size = max(entries * dtype.itemsize, LARGE)
    if size > WORKSPACE:
        return np.empty(entries, dtype)
    memory = getattr(_workspaces, use, None)
    if memory is None or memory.nbytes < size:
        memory = np.empty(size, np.uint8)
        setattr(_workspaces, use, memory)
    return memory[: size // dtype.itemsize * dtype.itemsize].view(dtype)


def release() -> None:
    """Give all freed memory that is kept back to the system; arrays in use stay as they are."""
    global _freed
    _freed = []  # a new list, not an empty one: another thread may be choosing from it


def _take(size: int) -> Array:
    """Return the smallest freed block of at least `size` bytes that is less than half too large, or a new one."""
    # While the list is in use nothing is taken from it, nor given back: the user may be this very thread, interrupted by the
    # garbage collector, and waiting for it would never end.
    if _lock.acquire(blocking=False):
        try:
            freed = _freed
            fitting = [k for k, block in enumerate(freed) if size <= block.nbytes < 1.5 * size]
            if fitting:
                return freed.pop(min(fitting, key=lambda k: freed[k].nbytes))
        finally:
            _lock.release()
    return np.empty(size, np.uint8)


def _give_back(block: Array) -> None:
    if _lock.acquire(blocking=False):
        try:
            freed = _freed
            freed.append(block)
            while sum(kept.nbytes for kept in freed) > KEPT:
                freed.pop(0)
        finally:
            _lock.release()
