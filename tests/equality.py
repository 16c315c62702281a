"""How the tests decide that two arrays are equal. Every bound here is derived, none is tuned.

Logic is compared in float64: two correct implementations differ by rounding alone, so `assert_same` allows 1e-10 of the
largest expected value. Vector-Jacobian products are compared with finite differences by `check_vjp`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

LOGIC = 1e-10  # float64, one operation
MODEL = 1e-9  # float64, a whole model or a training step


def assert_same(actual: Any, expected: Any, rtol: float = LOGIC, scale: float | None = None, what: str = "values") -> None:
    """Assert that two float arrays agree to `rtol` of `scale`, by default the largest absolute expected value.

    Give `scale` (the sum of the absolute terms that cancel) where the true value is zero by an invariance.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert np.isfinite(expected).all(), f"{what}: the expected values are not finite"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    if actual.size == 0:
        return
    allowed = rtol * (float(np.abs(expected).max()) if scale is None else scale)
    error = np.abs(actual - expected)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    assert error[worst] <= allowed, (
        f"{what}: {actual[worst]!r} at {tuple(int(i) for i in worst)}, expected {expected[worst]!r}: "
        f"they differ by {error[worst]:.3g}, allowed is {allowed:.3g}"
    )


def assert_same_dict(actual: Mapping[str, Any], expected: Mapping[str, Any], rtol: float = LOGIC) -> None:
    """Assert that two dictionaries of arrays have the same keys and, key by key, the same values."""
    missing, extra = sorted(set(expected) - set(actual)), sorted(set(actual) - set(expected))
    assert not missing and not extra, f"missing keys {missing}, unexpected keys {extra}"
    for key in expected:
        assert_same(actual[key], expected[key], rtol, what=key)


def check_vjp(
    function: Callable[..., tuple[np.ndarray, Callable]],
    inputs: Sequence[np.ndarray],
    rng: np.random.Generator,
    tolerance: float = 1e-7,
) -> None:
    """Compare a vector-Jacobian product with central differences along one random direction per input.

    `function(*inputs)` returns `y, vjp`; `vjp(dy)` returns one gradient per input (a single array for a single input). The
    five-point difference with step 1e-3 of the input's size errs by about step^4 + eps / step, near 1e-12 of the terms summed;
    1e-7 leaves room for the fifth derivative and still catches any wrong term.
    """
    y, vjp = function(*inputs)
    dy = rng.standard_normal(y.shape)
    gradients = vjp(dy)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    assert len(gradients) == len(inputs), f"{len(gradients)} gradients for {len(inputs)} inputs"
    for i, (x, dx) in enumerate(zip(inputs, gradients, strict=True)):
        assert dx.shape == x.shape, f"gradient {i}: shape {dx.shape}, expected {x.shape}"
        assert dx.dtype == x.dtype, f"gradient {i}: dtype {dx.dtype}, expected {x.dtype}"
        direction = rng.standard_normal(x.shape)
        step = 1e-3

        def along(t: float, i: int = i, x: np.ndarray = x, direction: np.ndarray = direction) -> np.ndarray:
            moved = [*inputs[:i], x + t * direction, *inputs[i + 1 :]]
            return dy * function(*moved)[0]

        terms = (8 * (along(step) - along(-step)) - (along(2 * step) - along(-2 * step))) / (12 * step)
        analytic = dx * direction
        scale = max(float(np.abs(terms).sum()), float(np.abs(analytic).sum()))
        error = abs(float(terms.sum()) - float(analytic.sum()))
        assert error <= tolerance * scale, f"gradient {i}: {analytic.sum()!r}, by differences {terms.sum()!r}, scale {scale:.3g}"
