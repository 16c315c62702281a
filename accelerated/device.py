"""Where a model runs and in which precision, chosen by what the machine has."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A device, the dtype that suits its matrix units, and both in words."""

    device: torch.device
    dtype: torch.dtype  # float32: no autocast
    words: str

    def autocast(self) -> AbstractContextManager:
        """Return the context in which the model runs; float32 is left alone."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_device(threads: int = 0) -> Device:
    """Return the GPU where there is one, in bfloat16; else the CPU, in bfloat16 only where it multiplies that natively.

    A CPU without such instructions emulates bfloat16, slower than float32. `threads` is how many CPU threads torch shall use
    from now on; 0 means one per core that this process may use, whatever OMP_NUM_THREADS says.
    """
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    if torch.cuda.is_available():
        device = torch.device("cuda")
        return Device(device, torch.bfloat16, f"{torch.cuda.get_device_name(device)}, bfloat16 autocast")
    cpu, words = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
    if torch.cpu._is_amx_tile_supported():
        return Device(cpu, torch.bfloat16, f"{words}, bfloat16 autocast (AMX)")
    if torch.cpu._is_avx512_bf16_supported():
        return Device(cpu, torch.bfloat16, f"{words}, bfloat16 autocast (AVX512-BF16)")
    return Device(cpu, torch.float32, f"{words}, float32")
