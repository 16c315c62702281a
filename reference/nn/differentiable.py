"""Inference: within `without_vjps()`, a primitive returns its result and nothing that holds what a vjp would need.

A vjp keeps the arrays that its backward pass reads. A whole model's vjp keeps all of them, some gigabytes, which is right for
training and needless where only the result is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

_keeping: ContextVar[bool] = ContextVar("reference_keeping_vjps", default=True)
_Primitive = TypeVar("_Primitive", bound=Callable[..., tuple[Any, Callable]])


@contextmanager
def without_vjps() -> Iterator[None]:
    """Within a `with` block, in this thread or task alone, keep nothing for a backward pass: a vjp raises RuntimeError."""
    token = _keeping.set(False)
    try:
        yield
    finally:
        _keeping.reset(token)


def differentiable(primitive: _Primitive) -> _Primitive:
    """Decorate a primitive: its vjp is dropped at once where none is kept."""

    @functools.wraps(primitive)
    def run(*args: Any, **options: Any) -> tuple[Any, Callable]:
        y, vjp = primitive(*args, **options)
        return y, vjp if _keeping.get() else _not_kept

    return run  # type: ignore[return-value]


def _not_kept(*_: Any) -> NoReturn:
    raise RuntimeError("this result was computed for inference, which keeps nothing for a vjp: use reference.apply for both")
