"""Where a model runs and in which precision, chosen by what the machine has."""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import NamedTuple

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's <malloc.h>


class Device(NamedTuple):
    """A device, the dtype that suits its matrix units, and both in words."""

    device: torch.device
    dtype: torch.dtype  # float32: no autocast
    words: str

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model runs; float32 is left alone."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_device(threads: int = 0) -> Device:
    """Return the GPU where there is one, in bfloat16; else the CPU, in bfloat16 only where it multiplies that natively.

    A CPU without such instructions emulates bfloat16, slower than float32. `threads` is how many CPU threads torch shall use
    from now on; 0 means one per core that this process may use, shared among the processes that torchrun has started here,
    whatever OMP_NUM_THREADS says.
    """
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(cores, 1))
    if torch.cuda.is_available():
        device = torch.device("cuda")
        return Device(device, torch.bfloat16, f"{torch.cuda.get_device_name(device)}, bfloat16 autocast")
    cpu, words = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
    if torch.cpu._is_amx_tile_supported():
        return Device(cpu, torch.bfloat16, f"{words}, bfloat16 autocast (AMX)")
    if torch.cpu._is_avx512_bf16_supported():
        return Device(cpu, torch.bfloat16, f"{words}, bfloat16 autocast (AVX512-BF16)")
    return Device(cpu, torch.float32, f"{words}, float32")


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors on the CPU give back, for the next ones; elsewhere, do nothing.

    A training step allocates the same large tensors every time. By default each is mapped anew, and the kernel fills its pages
    with zeros first: 10 to 15 % of a step of the small models.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
