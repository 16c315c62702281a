"""The float32 noise floor of a whole model: what one rounding per primitive does to its output.

The float64 reference runs with the output of every primitive multiplied by 1 + u, u uniform within half a float32 eps, several
times; the largest relative 2-norm of the change is the floor. A float32 implementation rounds at least as often, and sums in
float32 inside its primitives, so four times the floor is what a sound one needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from reference import dpt, fusion, nn, transformer

HALF_EPS = 2.0**-24
FACTOR = 4
SUMS = (  # operations that end in a sum: it rounds, too
    (dpt, "embed"),
    (transformer, "attention_residual"),
    (transformer, "mlp_residual"),
    (fusion, "residual_conv_unit"),
)


def _noisy(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, np.ndarray):
        return value * (1 + HALF_EPS * rng.uniform(-1, 1, value.shape))
    if isinstance(value, dict):
        return {key: _noisy(part, rng) for key, part in value.items()}
    if isinstance(value, tuple):
        parts = [_noisy(part, rng) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _perturb(operation: Callable, rng: np.random.Generator) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        y, vjp = operation(*args, **kwargs)
        return _noisy(y, rng), lambda dy: _noisy(vjp(dy), rng)

    return run


@contextmanager
def rounding(seed: int) -> Iterator[None]:
    """Within the block, every primitive of the reference errs by one float32 rounding, forward and backward."""
    rng = np.random.default_rng(seed)
    skipped = {"same_padding", "attention_weights", "without_vjps"}  # they return no vjp
    with pytest.MonkeyPatch.context() as patch:
        for name in nn.__all__:
            if name not in skipped and inspect.isfunction(getattr(nn, name)):
                patch.setattr(nn, name, _perturb(getattr(nn, name), rng))
        for module, name in SUMS:
            patch.setattr(module, name, _perturb(getattr(module, name), rng))
        yield


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Relative 2-norm of a - b."""
    return float(np.linalg.norm((a.astype(np.float64) - b).ravel()) / np.linalg.norm(b.ravel()))


def floor(compute: Callable[[], np.ndarray], exact: np.ndarray, seeds: int = 5) -> float:
    """The largest relative change of `compute()` under one rounding per primitive."""
    changes = []
    for seed in range(seeds):
        with rounding(seed):
            changes.append(relative(compute(), exact))
    return max(changes)
