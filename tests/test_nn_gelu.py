"""GELU and the normal distribution beneath it: the coefficients computed afresh, then torch, scipy and mpmath as witnesses."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.special
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reference import nn
from reference.nn.gelu import MILLS, standard_normal
from tests.equality import check_vjp
from tests.primitives import (
    U,
    assert_same_as_torch,
    assert_twin_agrees,
    assert_twin_agrees_at_extremes,
    assert_within,
    each_implementation,  # noqa: F401
    extremes,
    layouts,
    lengths,
    normal_arrays,
    results,
    seeds,
)

both = pytest.mark.usefixtures("each_implementation")

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def mills(u: mpmath.mpf) -> mpmath.mpf:
    return mpmath.exp(u * u / 2) * mpmath.erfc(u / mpmath.sqrt(2)) / 2


@pytest.mark.parametrize(("dtype", "c", "error"), [(np.float32, 3, 8e-9), (np.float64, 4, 2e-18)])
def test_the_coefficients_are_what_the_docstring_says(dtype: type, c: int, error: float) -> None:
    limit, p, q = MILLS[np.dtype(dtype)]
    n = len(p)
    with mpmath.workdps(80):
        end = mpmath.mpf(limit - c) / (limit + c)
        nodes = [(mpmath.cos(mpmath.pi * (2 * k + 1) / (4 * n)) + 1) / 2 * (end + 1) - 1 for k in range(2 * n)]
        system, right = mpmath.matrix(2 * n, 2 * n), mpmath.matrix(2 * n, 1)
        for k, t in enumerate(nodes):
            u = c * (1 + t) / (1 - t)
            for i in range(n):
                system[k, i], system[k, n + i] = u**i, -mills(u) * u**i
            right[k] = mills(u) * u**n
        solution = mpmath.lu_solve(system, right)
        np.testing.assert_allclose([*p, *q[:-1]], [float(value) for value in solution], rtol=1e-15)
        assert q[-1] == 1
        exact_p, exact_q = list(solution)[:n], [*list(solution)[n:], mpmath.mpf(1)]
        for u in mpmath.linspace(0, mpmath.sqrt(limit), 100):
            value = mpmath.polyval(exact_p[::-1], u * u) / mpmath.polyval(exact_q[::-1], u * u)
            assert abs(value / mills(u * u) - 1) < error


@pytest.mark.parametrize(("dtype", "eps", "reach"), [(np.float32, 2 * U, 13.0), (np.float64, 2.0**-52, 37.5)])
def test_the_normal_distribution_has_its_relative_accuracy_in_both_tails(dtype: type, eps: float, reach: float) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-reach, reach, 301), rng.standard_normal(300), [0.0, 1e-30, -1e-30]]).astype(dtype)
    distribution, density = standard_normal(x)
    assert distribution.dtype == density.dtype == dtype
    with mpmath.workdps(40):
        for value, phi, u in zip(distribution, density, map(mpmath.mpf, x.tolist()), strict=True):
            allowed = (3 + u * u / 2) * eps
            assert abs(mpmath.mpf(float(value)) / mpmath.ncdf(u) - 1) <= allowed, u
            assert abs(mpmath.mpf(float(phi)) / mpmath.npdf(u) - 1) <= allowed, u


def test_it_gives_scipys_erf() -> None:
    z = np.concatenate([np.linspace(-6, 6, 20001), np.logspace(-300, 0, 1000)])
    erf = 2 * standard_normal(np.sqrt(2) * z)[0] - 1
    assert np.abs(erf - scipy.special.erf(z)).max() <= 4 * np.finfo(float).eps
    erf32 = 2 * standard_normal((np.sqrt(2) * z).astype(np.float32))[0] - 1
    assert np.abs(erf32 - scipy.special.erf(z)).max() <= 8 * U


@both
@given(shapes, st.floats(0.1, 12), seeds, layouts)
def test_it_is_torchs(shape: tuple[int, ...], size: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    # torch forms 1 + erf, so its values err by eps |x| even where they are tiny: compare at the size of x.
    inputs = [size * array for array in normal_arrays(rng, shape, layout=layout)]
    scale = float(np.abs(inputs[0]).max())
    assert_same_as_torch(nn.gelu, F.gelu, inputs, rng, scales=[scale, 1 + scale])


@both
def test_many_blocks_are_one_array() -> None:
    x = np.random.default_rng(1).standard_normal((3, 20000))
    y, vjp = nn.gelu(x)
    expected = x * scipy.special.ndtr(x)
    assert np.abs(y - expected).max() < 1e-14
    slope = scipy.special.ndtr(x) + x * np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    assert np.abs(vjp(np.ones_like(x)) - slope).max() < 1e-14


@both
@given(shapes, seeds)
def test_gradients_are_the_derivatives(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(nn.gelu, normal_arrays(rng, shape), rng)


@both
@given(shapes, st.floats(0.1, 6), seeds)
def test_float32_rounds_as_the_exponent_does(shape: tuple[int, ...], size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = [(size * array).astype(np.float32) for array in normal_arrays(rng, shape)]
    actual, dy = results(nn.gelu, inputs, None, rng)
    x, dy = inputs[0].astype(np.float64), dy.astype(np.float64)
    distribution, density = scipy.special.ndtr(x), np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    relative = (5 + x * x / 2) * 2 * U  # two more products than Phi and phi themselves
    lost = 2.0**-149 * (1 + np.abs(x))  # Phi and phi rounded to a subnormal, then multiplied by x
    assert_within(actual[0], x * distribution, relative * np.abs(x) * distribution + lost, "y")
    size = distribution + np.abs(x) * density
    assert_within(actual[1], dy * (distribution + x * density), np.abs(dy) * (relative * size + lost), "dx")


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extremes(dtype: type) -> None:
    big = float(np.finfo(dtype).max)
    x = np.array([big, -big, 50, -50, 0, np.nan], dtype)
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        y, vjp = nn.gelu(x)
        slope = vjp(np.ones_like(x))
    np.testing.assert_array_equal(y, np.array([big, 0, 50, 0, 0, np.nan], dtype))
    np.testing.assert_array_equal(slope, np.array([1, 0, 1, 0, 0.5, np.nan], dtype))


@given(lengths, st.floats(0.1, 40), seeds, layouts)
def test_the_twin_is_the_numpy_form(length: int, size: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    assert_twin_agrees(nn.gelu, [size * array for array in normal_arrays(rng, (3, length), layout=layout)], rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_twin_is_the_numpy_form_at_extremes(dtype: type) -> None:
    """Of the tail, where x^2 / 2 is near 40, the exponent's rounding makes 40 in the value; the products of it add a few."""
    x = np.tile(np.concatenate([extremes(dtype), np.linspace(-9, 9, 20).astype(dtype)]), 3)
    for dy in (np.ones_like(x), x[::-1].copy()):
        assert_twin_agrees_at_extremes(nn.gelu, [x], dy, 100)
