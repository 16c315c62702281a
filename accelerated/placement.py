"""Where a prediction is computed, in which precision, and what the machine may lack for it: each said in one sentence."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DEVICES = "auto, cpu, cuda, cuda:N, mps or xpu"
SHAPES_COMPILED = 256  # input shapes that one model is compiled for; torch's own limit, 8, would return to eager in silence


class CompilerError(RuntimeError):
    """torch.compile does not work here. The message is one sentence."""


def is_device_name(name: str) -> bool:
    """Whether `name` is one of `DEVICES`, on this machine or another."""
    return re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", name) is not None


def find_device(name: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is the first CUDA GPU where there is one, else the CPU.

    Raises ValueError for another name than `DEVICES`, and for a device that this machine has not.
    """
    name = str(name)
    if not is_device_name(name):
        raise ValueError(f"unknown device {name!r}: expected {DEVICES}")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = 1 if device.type == "cpu" else getattr(torch, device.type).device_count()
    if (device.index or 0) >= count:
        there = f"this machine has {count} of that kind" if count else "torch finds none of that kind on this machine"
        raise ValueError(f"the device {name} is not there: {there}")
    return device


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the floating-point type of that name. Raises ValueError for another than those of `DTYPES`."""
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"unknown dtype {str(name)!r}: expected one of {', '.join(DTYPES)}")
    return dtype


def placed(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return `model` itself where it already is on `device` in `dtype`, else a copy that is.

    Raises ValueError where the device does not compute in that type, MemoryError where it is too small.
    """
    if device.type == "mps" and dtype == torch.float64:
        raise ValueError(f"the device {device} does not compute in float64: expected float32, bfloat16 or float16")
    tensors = [*model.parameters(), *model.buffers()]
    # An index that is not given is that of the current device, which an empty tensor shows.
    place = torch.empty(0, device=device).device
    if all(tensor.device == place and (tensor.dtype == dtype or not tensor.is_floating_point()) for tensor in tensors):
        return model
    with enough_memory("for this model"):
        return copy.deepcopy(model).to(device=device, dtype=dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode, and leave every module of it as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def enough_memory(purpose: str) -> Iterator[None]:
    """Turn every way of running out of memory into MemoryError, "not enough memory" and `purpose`."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise MemoryError(f"not enough memory {purpose}") from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # how torch says it of the CPU
            raise
        raise MemoryError(f"not enough memory {purpose}") from None


def compiled(model: nn.Module) -> Any:
    """Return torch.compile's form of the model, which compiles anew for every shape of input that it meets."""
    return torch.compile(model, dynamic=False)


@contextlib.contextmanager
def working_compiler() -> Iterator[None]:
    """Call a compiled model within. Raises CompilerError where the compiler is missing or fails."""
    from torch._dynamo import config
    from torch._dynamo.exc import TorchDynamoException

    try:
        with config.patch(recompile_limit=SHAPES_COMPILED, fail_on_recompile_limit_hit=True):
            yield
    except TorchDynamoException as error:
        lines = [line for line in str(error).splitlines() if line and not line.endswith("raised:")]
        reason = lines[0] if lines else type(error).__name__
        raise CompilerError(f"torch.compile does not work here, leave it out or install what it lacks: {reason}") from None
