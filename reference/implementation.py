"""Which of two implementations the primitives of `reference.nn` run: the NumPy one (the specification) or its compiled twin.

A primitive whose loop is slow in Python has a Cython twin beside it: `nn/conv2d.py` and `nn/conv2d_cython.pyx`. Both take the
same arguments and return the same values up to rounding. The twin is the default where it is compiled; where it is not, the NumPy
form runs, and a warning says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any, TypeVar

IMPLEMENTATIONS = ("numpy", "cython")
_TWINS = (
    "attention_cython",
    "batch_norm_cython",
    "conv2d_cython",
    "differences_cython",
    "gelu_cython",
    "group_norm_cython",
    "layer_norm_cython",
    "matmul_cython",
    "pooling_cython",
    "relu_cython",
    "resize_cython",
    "selection_cython",
    "softmax_cython",
    "winograd_cython",
)
_BUILD = "python setup.py build_ext --inplace"

_chosen: ContextVar[str | None] = ContextVar("reference_implementation", default=None)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@functools.cache
def _compiled() -> bool:
    # A twin that exists but does not load (built for another Python, say) raises its own ImportError: that is no reason to
    # run something else in silence.
    try:
        for twin in _TWINS:
            import_module(f"{__package__}.nn.{twin}")
    except ModuleNotFoundError:
        return False
    return True


@functools.cache
def _default() -> str:
    if _compiled():
        return "cython"
    warnings.warn(  # once, as the answer is cached
        f"the Cython twins are not compiled, so the slow NumPy forms run: compile them with `{_BUILD}` in the checkout",
        RuntimeWarning,
        stacklevel=3,
    )
    return "numpy"


def implementation() -> str:
    """Return the name of the implementation in use: "numpy" or "cython".

    Where nothing was chosen and the twins are not compiled, it is "numpy", and the first call warns that it is the slow one.
    """
    return _chosen.get() or _default()


def use(name: str) -> AbstractContextManager[None]:
    """Run the primitives of `reference.nn` in the implementation `name` ("numpy" or "cython") within a `with` block.

    The choice holds for every call made inside the block, vjps included, in this thread or task alone. Raises ValueError for
    another name, and RuntimeError for "cython" where the extension is not compiled.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"unknown implementation {name!r}: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if name == "cython" and not _compiled():
        raise RuntimeError(f"the Cython twins are not compiled: run `{_BUILD}` in the checkout, or install the package")
    return _using(name)


@contextmanager
def _using(name: str) -> Iterator[None]:
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def twinned(function: _Function) -> _Function:
    """Decorate the NumPy form: the function of the same name in `<its module>_cython` runs instead where "cython" is in use."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if implementation() == "cython":
            return getattr(import_module(f"{function.__module__}_cython"), function.__name__)(*args)
        return function(*args)

    return run  # type: ignore[return-value]
