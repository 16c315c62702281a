"""The operators under autocast: as torch does for what a kernel replaces.

Products in the narrow type, sums in the widest of their terms. The losses and the alignment compute in float32 whatever they are
given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from accelerated.operators.losses import depth_loss, upsampled_cross_entropy
from accelerated.operators.measures import confusion, least_squares
from accelerated.operators.network import attention, read_project, upsample_add


def _to_narrow(device: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
    narrow = torch.get_autocast_dtype(device)
    for argument in arguments:
        casts = isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64
        yield argument.to(narrow) if casts else argument


def _to_widest(device: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
    widest = functools.reduce(torch.promote_types, (argument.dtype for argument in arguments))
    return (argument.to(widest) for argument in arguments)


def _as_they_are(device: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
    return iter(arguments)


_AUTOCAST: dict[Any, Callable[[str, tuple[Any, ...]], Iterator[Any]]] = {
    attention: _to_narrow,
    read_project: _to_narrow,
    upsample_add: _to_widest,
    depth_loss: _as_they_are,
    upsampled_cross_entropy: _as_they_are,
    least_squares: _as_they_are,
    confusion: _as_they_are,
}
_library = torch.library.Library("dpt", "FRAGMENT")


def _register(operator: Any, cast: Callable[[str, tuple[Any, ...]], Iterator[Any]], device: str) -> None:
    def autocast(*arguments: Any) -> Any:
        arguments = tuple(cast(device, arguments))
        with torch.autocast(device, enabled=False):
            return operator(*arguments)

    _library.impl(operator._name, autocast, f"Autocast{device.upper()}")


def register() -> None:
    """Tell torch. Once: what is registered stays."""
    for operator, cast in _AUTOCAST.items():
        for device in ("cpu", "cuda"):
            _register(operator, cast, device)
