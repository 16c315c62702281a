"""Tensors as the arrays that kernels take, without a copy, and CuPy on torch's stream and in torch's memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from accelerated.kernel_paths import NO_CUPY

_NUMPY = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.int64: np.dtype(np.int64),
    torch.int32: np.dtype(np.int32),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}


def as_array(tensor: Tensor) -> Any:
    """The same memory as a NumPy array, or of a tensor on a GPU as a CuPy array. TypeError, ValueError where that cannot be."""
    if tensor.dtype not in _NUMPY:
        raise TypeError(f"the tensor has dtype {tensor.dtype}, expected one of {', '.join(map(str, _NUMPY))}")
    if not tensor.is_contiguous():
        raise ValueError(f"the tensor has strides {tensor.stride()} for shape {tuple(tensor.shape)}, expected a contiguous one")
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    if tensor.device.type != "cuda":
        raise ValueError(f"the tensor is on {tensor.device}, expected the CPU or a CUDA device")
    cupy = _cupy()
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), tensor.nbytes, tensor, tensor.device.index)
    return cupy.ndarray(tuple(tensor.shape), _NUMPY[tensor.dtype], cupy.cuda.MemoryPointer(memory, 0))


@contextlib.contextmanager
def cupy_for(tensor: Tensor) -> Iterator[None]:
    """Within the block CuPy works on the tensor's GPU, on torch's stream there and in its memory. No effect on the CPU."""
    if tensor.device.type != "cuda":
        yield
        return
    cuda, device = _cupy().cuda, tensor.device
    stream = cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device.index)
    with torch.cuda.device(device), cuda.Device(device.index), stream, cuda.using_allocator(functools.partial(_memory, device)):
        yield


def _memory(device: torch.device, size: int) -> Any:
    """Memory for CuPy from torch's allocator, whose graphs may keep it; it goes back when CuPy drops it."""
    cuda = _cupy().cuda
    tensor = torch.empty(size, dtype=torch.uint8, device=device)
    return cuda.MemoryPointer(cuda.UnownedMemory(tensor.data_ptr(), size, tensor, device.index), 0)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(NO_CUPY) from error
    return cupy


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read(tensor: Tensor) -> Any:
    """`as_array` of a tensor that a kernel reads: copied where it is not contiguous."""
    return as_array(tensor.contiguous())


def fresh(like: Tensor, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous tensor to be filled, in the place of `like`, of its dtype or another."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
