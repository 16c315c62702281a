"""Convolution and transposed convolution against torch, in both implementations, and the rounding of their float32 forms."""

from __future__ import annotations

import tracemalloc
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import reference.nn.conv2d_cython
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    assert_multilinear_in_float32,
    assert_same_as_torch,
    implementations,
    layouts,
    normal_arrays,
    results,
    seeds,
)


class Case(NamedTuple):
    shapes: tuple[tuple[int, ...], ...]  # of x, weight and perhaps bias
    stride: int
    padding: Any


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    batch, channels, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        padding: Any = draw(st.integers(0, 3))
        pairs = ((padding, padding), (padding, padding))
    else:
        padding = pairs = tuple((draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(2))  # may exceed the kernel
    least = (max(1, k - sum(pair)) for k, pair in zip(kernel, pairs, strict=True))
    size = [draw(st.integers(n, n + 7)) for n in least]
    shapes = ((batch, channels, *size), (out, channels, *kernel), (out,))
    return Case(shapes if draw(st.booleans()) else shapes[:2], draw(st.integers(1, 5)), padding)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    batch, channels, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, size = ((draw(st.integers(1, 4)), draw(st.integers(1, 4))) for _ in range(2))
    shapes = ((batch, channels, *size), (channels, out, *kernel), (out,))
    return Case(shapes if draw(st.booleans()) else shapes[:2], draw(st.integers(1, 5)), 0)


def convolve(case: Case) -> Any:
    return lambda x, weight, bias=None: nn.conv2d(x, weight, bias, case.stride, case.padding)


def spread(case: Case) -> Any:
    return lambda x, weight, bias=None: nn.conv_transpose2d(x, weight, bias, case.stride)


def torch_convolve(case: Case) -> Any:
    pairs = ((case.padding,) * 2,) * 2 if isinstance(case.padding, int) else case.padding
    return lambda x, weight, bias=None: F.conv2d(F.pad(x, (*pairs[1], *pairs[0])), weight, bias, case.stride)


@settings(max_examples=150)
@given(convolutions(), seeds, implementations, layouts)
def test_conv2d_is_torchs(case: Case, seed: int, name: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name):
        assert_same_as_torch(convolve(case), torch_convolve(case), normal_arrays(rng, *case.shapes, layout=layout), rng)


@settings(max_examples=100)
@given(transposed_convolutions(), seeds, implementations, layouts)
def test_conv_transpose2d_is_torchs(case: Case, seed: int, name: str, layout: str) -> None:
    rng = np.random.default_rng(seed)

    def witness(x: Any, weight: Any, bias: Any = None) -> Any:
        return F.conv_transpose2d(x, weight, bias, case.stride)

    with use(name):
        assert_same_as_torch(spread(case), witness, normal_arrays(rng, *case.shapes, layout=layout), rng)


@given(convolutions(), seeds, implementations)
def test_conv2d_gradients_are_the_derivatives(case: Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name):
        check_vjp(without_none(convolve(case)), normal_arrays(rng, *case.shapes), rng)


@given(transposed_convolutions(), seeds, implementations)
def test_conv_transpose2d_gradients_are_the_derivatives(case: Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name):
        check_vjp(without_none(spread(case)), normal_arrays(rng, *case.shapes), rng)


def without_none(operation: Any) -> Any:
    def run(*inputs: np.ndarray) -> Any:
        y, vjp = operation(*inputs)
        return y, lambda dy: vjp(dy)[: len(inputs)]

    return run


@given(convolutions(), seeds, implementations)
def test_conv2d_rounds_as_sums_of_products_do(case: Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    _, channels, *_ = case.shapes[0]
    out, _, *kernel = case.shapes[1]
    inputs, taps = normal_arrays(rng, *case.shapes), int(np.prod(kernel))
    positions = convolve(case)(*inputs)[0].size // out
    terms = [channels * taps + 1, out * taps, positions, positions][: 1 + len(inputs)]
    with use(name):
        assert_multilinear_in_float32(convolve(case), inputs, terms, rng)


@given(transposed_convolutions(), seeds, implementations)
def test_conv_transpose2d_rounds_as_sums_of_products_do(case: Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    batch, channels, *size = case.shapes[0]
    _, out, *kernel = case.shapes[1]
    inputs, taps = normal_arrays(rng, *case.shapes), int(np.prod(kernel))
    outputs = spread(case)(*inputs)[0].size // out
    terms = [channels * taps + 1, out * taps, batch * int(np.prod(size)), outputs][: 1 + len(inputs)]
    with use(name):
        assert_multilinear_in_float32(spread(case), inputs, terms, rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(case=convolutions(), seed=seeds, block=st.integers(1, 300))
def test_the_twin_is_the_numpy_form_whatever_its_blocks(dtype: Any, case: Case, seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = [array.astype(dtype) for array in normal_arrays(rng, *case.shapes)]
    with use("numpy"):
        expected, dy = results(convolve(case), inputs, None, rng)
    # Whatever a block holds (one row, some, all), the same products are summed, so only rounding may differ.
    with use("cython"), mock.patch.object(reference.nn.conv2d_cython, "_BLOCK", block):
        actual, _ = results(convolve(case), inputs, dy, rng)
    for have, want in zip(actual, expected, strict=True):
        assert_same(have, want, rtol=1000 * np.finfo(dtype).eps, scale=float(np.abs(want).max()) + 1)


def test_the_twin_is_what_runs() -> None:
    x, weight = np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1))
    with mock.patch.object(reference.nn.conv2d_cython, "correlate", side_effect=ZeroDivisionError):
        with use("numpy"):
            nn.conv2d(x, weight)
        with use("cython"), pytest.raises(ZeroDivisionError):
            nn.conv2d(x, weight)


@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_memory_stays_below_the_matrix_of_all_windows(name: str) -> None:
    x, weight = np.ones((1, 48, 128, 128), np.float32), np.ones((8, 48, 3, 3), np.float32)
    with use(name):
        tracemalloc.start()
        y, vjp = nn.conv2d(x, weight, None, 1, 1)
        vjp(y)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 9 * x.nbytes, f"{peak / 1e6:.0f} MB at most, 9 copies of x are {9 * x.nbytes / 1e6:.0f} MB"


@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_a_hand_computed_convolution(name: str) -> None:
    x = np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
    weight = np.array([[[[1.0, 10.0], [100.0, 1000.0]]]])
    with use(name):
        y, vjp = nn.conv2d(x, weight, np.array([0.5]), 1, ((1, 0), (0, 0)))
        np.testing.assert_array_equal(y, [[[[2100.5], [4321.5]]]])
        dx, dweight, dbias = vjp(np.array([[[[1.0], [2.0]]]]))
        np.testing.assert_array_equal(dx, [[[[102.0, 1020.0], [200.0, 2000.0]]]])
        np.testing.assert_array_equal(dweight, [[[[2.0, 4.0], [7.0, 10.0]]]])
        np.testing.assert_array_equal(dbias, [3.0])
