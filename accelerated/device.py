"""Where a model runs and in which precision, chosen by what the machine has."""

from __future__ import annotations

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


def choose_device() -> Device:
    """Return the GPU where there is one, in bfloat16; else the CPU, in bfloat16 only where it multiplies that natively.

    A CPU without such instructions emulates bfloat16, slower than float32.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda")
        return Device(device, torch.bfloat16, f"{torch.cuda.get_device_name(device)}, bfloat16 autocast")
    cpu, threads = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
    if torch.cpu._is_amx_tile_supported():
        return Device(cpu, torch.bfloat16, f"{threads}, bfloat16 autocast (AMX)")
    if torch.cpu._is_avx512_bf16_supported():
        return Device(cpu, torch.bfloat16, f"{threads}, bfloat16 autocast (AVX512-BF16)")
    return Device(cpu, torch.float32, f"{threads}, float32")
