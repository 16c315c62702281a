"""The affine map and softmax, the arithmetic of attention and MLP, with the pointwise relu and dropout."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from tests.equality import check_vjp
from tests.primitives import (
    U,
    assert_multilinear_in_float32,
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
    roundings,
    seeds,
)

both = pytest.mark.usefixtures("each_implementation")
small = st.integers(1, 6)
shapes = st.lists(small, min_size=1, max_size=4).map(tuple)


# The affine map


@st.composite
def affine_maps(draw: st.DrawFn) -> tuple[tuple[int, ...], ...]:
    inner, outer = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    arrays = ((*draw(st.lists(small, max_size=3)), inner), (outer, inner), (outer,))
    return arrays if draw(st.booleans()) else arrays[:2]


def without_none(*inputs: np.ndarray) -> Any:
    y, vjp = nn.linear(*inputs)
    return y, lambda dy: vjp(dy)[: len(inputs)]


@given(affine_maps(), seeds, layouts)
def test_linear_is_torchs(arrays: tuple[tuple[int, ...], ...], seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    assert_same_as_torch(nn.linear, F.linear, normal_arrays(rng, *arrays, layout=layout), rng)


@given(affine_maps(), seeds)
def test_linear_gradients_are_the_derivatives(arrays: tuple[tuple[int, ...], ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(without_none, normal_arrays(rng, *arrays), rng)


@given(affine_maps(), seeds)
def test_linear_rounds_as_sums_of_products_do(arrays: tuple[tuple[int, ...], ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, (outer, inner) = int(np.prod(arrays[0][:-1])), arrays[1]
    terms = [inner + 1, outer, rows, rows][: 1 + len(arrays)]
    assert_multilinear_in_float32(nn.linear, normal_arrays(rng, *arrays), terms, rng)


def test_linear_without_bias_has_no_bias_gradient() -> None:
    x, weight = np.ones((2, 3)), np.ones((4, 3))
    y, vjp = nn.linear(x, weight)
    assert vjp(y)[2] is None


# Softmax


@st.composite
def axes(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    shape = draw(shapes)
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


@both
@given(axes(), st.floats(0.01, 50), seeds, layouts)
def test_softmax_is_torchs(case: tuple[tuple[int, ...], int], size: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    shape, axis = case
    inputs = [size * array for array in normal_arrays(rng, shape, layout=layout)]
    # dx = y (dy - sum dy y) cancels where one y is near 1: its terms are of the size of dy, near 1.
    assert_same_as_torch(partial(nn.softmax, axis=axis), partial(torch.softmax, dim=axis), inputs, rng, scales=[None, 1.0])


@both
@given(axes(), seeds)
def test_softmax_gradients_are_the_derivatives(case: tuple[tuple[int, ...], int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(partial(nn.softmax, axis=case[1]), normal_arrays(rng, case[0]), rng)


@both
@given(axes(), st.floats(0.01, 20), seeds)
def test_softmax_rounds_within_bounds(case: tuple[tuple[int, ...], int], size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, axis = case
    operation = partial(nn.softmax, axis=axis)
    inputs = [(size * array).astype(np.float32) for array in normal_arrays(rng, shape)]
    actual, dy = results(operation, inputs, None, rng)
    x, dy = inputs[0].astype(np.float64), dy.astype(np.float64)
    (y, dx), _ = results(operation, [x], dy, rng)

    def total(values: np.ndarray) -> np.ndarray:
        return values.sum(axis=axis, keepdims=True)

    # x - max errs by U of itself, which exp turns into a relative error; exp's own is at most 3 ulp; then a sum, a quotient.
    r, exponent = roundings(shape[axis]), U * (x.max(axis=axis, keepdims=True) - x)
    error = y * (exponent + total(y * exponent) + r + 13 * U)
    assert_within(actual[0], y, error, "y")
    inner = total(dy * y)
    bound = error * (np.abs(dy) + np.abs(inner)) + y * (total(np.abs(dy) * (error + (r + U) * y)) + 3 * U * np.abs(inner))
    assert_within(actual[1], dx, bound + 3 * U * np.abs(dy) * y, "dx")


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_of_huge_values_and_of_one(dtype: Any) -> None:
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_array_equal(nn.softmax(np.array([1e30, 1e30, -1e30], dtype))[0], [0.5, 0.5, 0])
        y, vjp = nn.softmax(np.array([[7.0]], dtype))
    np.testing.assert_array_equal([y, vjp(y)], [[[1]], [[0]]])


# The rectifier


@both
@given(shapes, seeds, layouts)
def test_relu_is_torchs(shape: tuple[int, ...], seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = [np.round(array) for array in normal_arrays(rng, shape, layout=layout)]  # zeros are where the gradient is decided
    assert_same_as_torch(nn.relu, F.relu, inputs, rng, scales=[1, 1])


@both
@given(shapes, seeds)
def test_relu_gradients_are_the_derivatives(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    check_vjp(nn.relu, [x + np.copysign(0.1, x)], rng)  # away from the kink


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relu_is_exact(dtype: Any) -> None:
    x = np.array([-1, -0.0, 0, 2, np.inf, np.nan], dtype)
    y, vjp = nn.relu(x)
    np.testing.assert_array_equal(y, np.array([0, 0, 0, 2, np.inf, np.nan], dtype))
    dx = vjp(np.arange(6, dtype=dtype))
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(dx[:5], [0, 0, 0, 3, 4])


# The compiled twins


@given(st.integers(1, 4), lengths, st.sampled_from([0, 1, -1]), st.floats(0.01, 50), seeds, layouts)
def test_the_twin_of_softmax(rows: int, length: int, axis: int, size: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = [size * array for array in normal_arrays(rng, (rows, length), layout=layout)]
    assert_twin_agrees(partial(nn.softmax, axis=axis), inputs, rng, [None, 1.0])


@given(lengths, seeds, layouts)
def test_the_twin_of_relu(length: int, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = [np.round(array) for array in normal_arrays(rng, (3, length), layout=layout)]
    assert_twin_agrees(nn.relu, inputs, rng, [1.0, 1.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("operation", [nn.softmax, nn.relu])
def test_the_twins_at_extremes(operation: Any, dtype: Any) -> None:
    special = extremes(dtype)
    rows = np.random.default_rng(0).standard_normal((len(special), 35)).astype(dtype)
    for place in (0, 17, 34):
        x = rows.copy()
        x[:, place] = special
        assert_twin_agrees_at_extremes(operation, [x], rows[::-1].copy(), 60, scale=4)
    assert_twin_agrees_at_extremes(operation, [np.full((2, 35), -np.inf, dtype)], rows[:2].copy(), 60, scale=4)


@pytest.mark.parametrize(("dtype", "eps", "reach"), [(np.float32, 2 * U, 110), (np.float64, 2.0**-52, 760)])
def test_the_exponential_of_the_twins(dtype: Any, eps: float, reach: float) -> None:
    """Of two logits 0 and -t the second's share over the first's is exp(-t), to 3 roundings of exp's and 3 of the quotients'."""
    t = np.concatenate([np.linspace(0, reach, 4001), np.arange(1, 1075) * np.log(2), [1e-30, 0.0]]).astype(dtype)
    with use("cython"):
        share = nn.softmax(np.stack([np.zeros_like(t), -t], axis=-1))[0].astype(np.longdouble)
    expected = np.exp(-t.astype(np.longdouble))
    allowed = 3 * eps * expected + 2 * float(np.finfo(dtype).smallest_subnormal)
    assert (np.abs(share[:, 1] / share[:, 0] - expected) <= allowed).all()


@pytest.mark.parametrize(("function", "degree"), [("_exp32", 6), ("_exp64", 11)])
def test_the_exponentials_coefficients_are_what_the_docstring_says(function: str, degree: int) -> None:
    source = (Path(nn.__file__).parent / "exponential.pxd").read_text().partition(f" {function}(")[2]
    numbers = re.findall(r"\b[ky] (?:= y )?[*=](?: r \+)? (?:<float>)?([\d.e-]+)\b", source.partition("return")[0])
    high, low, *coefficients = [float(number) for number in numbers]
    with mpmath.workdps(60):
        nodes = [mpmath.log(2) / 2 * mpmath.cos(mpmath.pi * (2 * k + 1) / (2 * degree + 2)) for k in range(degree + 1)]
        vandermonde = mpmath.matrix([[t**i for i in range(degree + 1)] for t in nodes])
        exact = mpmath.lu_solve(vandermonde, mpmath.matrix([mpmath.exp(t) for t in nodes]))
        np.testing.assert_allclose(coefficients[::-1], [float(value) for value in exact], rtol=1e-15)
        assert abs(mpmath.mpf(high) + mpmath.mpf(low) - mpmath.log(2)) < 2.0 ** (-48 if degree == 6 else -85)
        for r in mpmath.linspace(-mpmath.log(2) / 2, mpmath.log(2) / 2, 101):
            value = mpmath.polyval([mpmath.mpf(c) for c in coefficients], r)
            assert abs(value / mpmath.exp(r) - 1) < (2.6e-9 if degree == 6 else 2e-17)
    # k ln 2 is exact: of the first part as many last bits are 0 as k has.
    assert math.frexp(high)[0] * 2 ** (16 if degree == 6 else 42) % 1 == 0


# Dropout


@given(shapes, st.floats(0, 0.95), seeds, layouts)
def test_dropout_keeps_and_scales(shape: tuple[int, ...], p: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) >= p
    inputs = normal_arrays(rng, shape, layout=layout)

    def witness(x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.tensor(mask), x / (1 - p), torch.zeros_like(x))

    assert_same_as_torch(lambda x: nn.dropout(x, mask, p), witness, inputs, rng)
    check_vjp(lambda x: nn.dropout(x, mask, p), inputs, rng)
    assert_multilinear_in_float32(lambda x: nn.dropout(x, mask, p), inputs, [2, 2], rng)
