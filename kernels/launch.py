"""What every kernel's Python function does: check its arrays, then launch where they are, on the host or on a GPU.

Nothing is launched before all is checked, because a kernel itself checks nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np

from kernels import compile as nvrtc
from kernels import host
from kernels.source import DEVICE_ELEMENTS, HOST_ELEMENTS, Source, cached, fingerprint

Array = Any  # numpy.ndarray, or cupy.ndarray where CuPy is installed

LIMIT = 2**31  # kernels take sizes as int


def on_device(array: Array) -> bool:
    """Whether this is a CuPy array. CuPy is not imported to find out: who holds one of its arrays has imported it."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def check(arrays: Mapping[str, Array]) -> None:
    """Check that these arrays, named as in the message, can be given to one kernel.

    All are NumPy arrays or all are CuPy arrays of one device, of one dtype (float32, float16, bfloat16; on the host float64
    too), C-contiguous, aligned, not empty, and of fewer than 2^31 elements. TypeError or ValueError names the one that is not.
    """
    first_name, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        check_array(name, array, tuple(DEVICE_ELEMENTS if on_device(array) else HOST_ELEMENTS), {first_name: first})
        if array.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {array.dtype.name} and {first_name} {first.dtype.name}, expected the same")


def check_array(name: str, array: Array, dtypes: tuple[str, ...], like: Mapping[str, Array]) -> None:
    """Check that one array can be given to a kernel: as `check`, but of one of `dtypes`, where those of `like` are."""
    if not (isinstance(array, np.ndarray) or on_device(array)):
        raise TypeError(f"{name} is a {type(array).__module__}.{type(array).__name__}, expected a NumPy or a CuPy array")
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        expected = " or ".join(dtypes) if len(dtypes) < 3 else f"one of {', '.join(dtypes)}"
        raise TypeError(f"{name} has dtype {array.dtype.str} ({array.dtype.name}), expected {expected}")
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


def check_output(name: str, out: Array, shape: tuple[int, ...], inputs: Mapping[str, Array]) -> None:
    """Check that `out` can be written by a kernel that reads `inputs`: as `check`, of this shape, writable, sharing no memory.

    TypeError or ValueError names what is wrong.
    """
    check({**inputs, name: out})
    check_written(name, out, shape, inputs)


def check_written(name: str, out: Array, shape: tuple[int, ...], inputs: Mapping[str, Array]) -> None:
    """The same of an array that `check` or `check_array` has passed, whatever the dtypes."""
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}, expected {shape}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError(f"{name} is read-only, expected an array to write to")
    check_apart(name, out, inputs)


def check_apart(name: str, out: Array, others: Mapping[str, Array]) -> None:
    """ValueError where an array to write to shares memory with another."""
    for other, array in others.items():
        if address(out) < address(array) + array.nbytes and address(array) < address(out) + out.nbytes:
            raise ValueError(f"{name} overlaps {other} in memory, expected arrays apart")


def place(array: Array) -> str:
    """Where an array lives, in words."""
    return f"GPU {array.device.id}" if on_device(array) else "the host"


def address(array: Array) -> int:
    """The address of the first element of a contiguous array."""
    return array.data.ptr if on_device(array) else array.ctypes.data


def empty(shape: tuple[int, ...], like: Array) -> Array:
    """A new array for a kernel to fill, of the dtype and in the place of `like`. ValueError from 2^31 elements on."""
    count = functools.reduce(lambda product, size: product * int(size), shape, 1)
    if count >= LIMIT:
        raise ValueError(f"the result has shape {shape}, {count} elements, expected fewer than 2^31")
    return new(shape, like.dtype, like)


def new(shape: tuple[int, ...], dtype: np.dtype | type | str, like: Array, value: float | None = None) -> Array:
    """A new array in the place of `like`, full of `value`; where that is None, for a kernel to fill."""
    if not on_device(like):
        return np.empty(shape, dtype) if value is None else np.full(shape, value, dtype)
    cupy = sys.modules["cupy"]
    with like.device:
        return cupy.empty(shape, dtype) if value is None else cupy.full(shape, value, dtype)


Extent = tuple[int, int, int]


def launch(
    source: Source,
    template: str,
    grid: Extent,
    block: Extent,
    arguments: tuple[Any, ...],
    shared: int = 0,
    element: str | None = None,
) -> None:
    """Launch a kernel over `grid` blocks of `block` threads, with `shared` bytes of dynamic shared memory.

    Arguments as the kernel declares them, arrays first; they have passed `check`. `element` is the dtype by whose name the kernel
    is found, by default that of the first array; a kernel without an element type is compiled once for each. On a GPU this
    is queued on CuPy's current stream of their device; on the host it is done on return. Compiled at the first use. RuntimeError
    where the kernel does not exist for this element type or GPU.
    """
    first = arguments[0]
    dtype = element or first.dtype.name
    if not source.has(template, dtype):
        raise RuntimeError(f"{template.format(dtype)} works on tensor cores, for float16 and bfloat16 alone")
    if not on_device(first):
        host.launch(source, template, dtype, grid, block, arguments, shared)
        return
    with first.device:
        function = _device_kernel(source, template.format(DEVICE_ELEMENTS[dtype]), first.device.id)
        if shared > max(48 * 1024, function.max_dynamic_shared_size_bytes):  # more has to be asked for
            function.max_dynamic_shared_size_bytes = shared
        function(grid, block, arguments, shared_mem=shared)


def launch_each(source: Source, template: str, count: int, arguments: tuple[Any, ...], threads: int = 256) -> None:
    """Launch a kernel over `count` elements, one thread each, in blocks of `threads`. As `launch`."""
    launch(source, template, (-(-count // threads), 1, 1), (threads, 1, 1), arguments)


@functools.cache
def _device_kernel(source: Source, name: str, device: int) -> Any:
    """The kernel on this GPU: what `compile_source` returns, unchanged, in a CuPy RawModule."""
    import cupy

    if cupy.cuda.get_current_stream().is_capturing():
        raise RuntimeError(f"{name} is not loaded yet, and this stream is captured: run it once before the capture")
    architecture = int(cupy.cuda.Device(device).compute_capability)
    compiled = nvrtc.compile_source(source, architecture)
    if name not in compiled.symbols:
        raise RuntimeError(f"{name} needs tensor cores that multiply bfloat16, from sm_80 on; GPU {device} is sm_{architecture}")
    # RawModule reads machine code from a file. (Given the source, it would compile it with options of its own: subnormal
    # numbers flushed to zero.)
    path = cached(f"{fingerprint([compiled.cubin])[:32]}.cubin", lambda path: path.write_bytes(compiled.cubin))
    return cupy.RawModule(path=str(path)).get_function(compiled.symbols[name])
