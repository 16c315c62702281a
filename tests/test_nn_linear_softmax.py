"""The affine map and softmax, the arithmetic of attention and MLP, with the pointwise relu and dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reference import nn
from tests.equality import check_vjp
from tests.primitives import (
    U,
    assert_multilinear_in_float32,
    assert_same_as_torch,
    assert_within,
    layouts,
    normal_arrays,
    results,
    roundings,
    seeds,
)

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


# Products of stacks of matrices


@st.composite
def products(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    leading, (n, k, m) = draw(st.lists(small, max_size=2)), (draw(small) for _ in range(3))
    return (*leading, n, k), (*leading, k, m)


@given(products(), seeds, layouts)
def test_matmul_is_torchs(arrays: tuple[tuple[int, ...], ...], seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    assert_same_as_torch(nn.matmul, torch.matmul, normal_arrays(rng, *arrays, layout=layout), rng)
    check_vjp(nn.matmul, normal_arrays(rng, *arrays), rng)


@given(products(), seeds)
def test_matmul_rounds_as_sums_of_products_do(arrays: tuple[tuple[int, ...], ...], seed: int) -> None:
    (*_, n, k), (*_, m) = arrays
    rng = np.random.default_rng(seed)
    assert_multilinear_in_float32(nn.matmul, normal_arrays(rng, *arrays), [k, m, n], rng)


# Softmax


@st.composite
def axes(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    shape = draw(shapes)
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


@given(axes(), st.floats(0.01, 50), seeds, layouts)
def test_softmax_is_torchs(case: tuple[tuple[int, ...], int], size: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    shape, axis = case
    inputs = [size * array for array in normal_arrays(rng, shape, layout=layout)]
    # dx = y (dy - sum dy y) cancels where one y is near 1: its terms are of the size of dy, near 1.
    assert_same_as_torch(partial(nn.softmax, axis=axis), partial(torch.softmax, dim=axis), inputs, rng, scales=[None, 1.0])


@given(axes(), seeds)
def test_softmax_gradients_are_the_derivatives(case: tuple[tuple[int, ...], int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(partial(nn.softmax, axis=case[1]), normal_arrays(rng, case[0]), rng)


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_of_huge_values_and_of_one(dtype: Any) -> None:
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_array_equal(nn.softmax(np.array([1e30, 1e30, -1e30], dtype))[0], [0.5, 0.5, 0])
        y, vjp = nn.softmax(np.array([[7.0]], dtype))
    np.testing.assert_array_equal([y, vjp(y)], [[[1]], [[0]]])


# The rectifier


@given(shapes, seeds, layouts)
def test_relu_is_torchs(shape: tuple[int, ...], seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = [np.round(array) for array in normal_arrays(rng, shape, layout=layout)]  # zeros are where the gradient is decided
    assert_same_as_torch(nn.relu, F.relu, inputs, rng, scales=[1, 1])


@given(shapes, seeds)
def test_relu_gradients_are_the_derivatives(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    check_vjp(nn.relu, [x + np.copysign(0.1, x)], rng)  # away from the kink


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relu_is_exact(dtype: Any) -> None:
    x = np.array([-1, -0.0, 0, 2, np.inf, np.nan], dtype)
    y, vjp = nn.relu(x)
    np.testing.assert_array_equal(y, np.array([0, 0, 0, 2, np.inf, np.nan], dtype))
    dx = vjp(np.arange(6, dtype=dtype))
    assert y.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(dx[:5], [0, 0, 0, 3, 4])


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
