"""Grouped convolution against torch, against the ungrouped one, and the rounding of its float32 form."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from tests.equality import assert_same, check_vjp
from tests.primitives import assert_multilinear_in_float32, assert_same_as_torch, layouts, normal_arrays, seeds


class Case(NamedTuple):
    shapes: tuple[tuple[int, ...], ...]  # of x and weight
    groups: int
    stride: int
    padding: Any


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """From one group to depthwise, with as many or more channels out than in."""
    groups, batch, per_group, out_per_group = (draw(st.integers(1, most)) for most in (4, 2, 3, 3))
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    padding = tuple((draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(2))
    size = [draw(st.integers(max(1, k - sum(pair)), k + 5)) for k, pair in zip(kernel, padding, strict=True)]
    shapes = (batch, groups * per_group, *size), (groups * out_per_group, per_group, *kernel)
    return Case(shapes, groups, draw(st.integers(1, 3)), padding)


def convolve(case: Case) -> Any:
    return lambda x, weight: nn.grouped_conv2d(x, weight, case.groups, case.stride, case.padding)


def torch_convolve(case: Case) -> Any:
    down, across = case.padding
    return lambda x, weight: F.conv2d(F.pad(x, (*across, *down)), weight, None, case.stride, groups=case.groups)


@settings(max_examples=60)
@given(convolutions(), seeds, layouts)
def test_it_is_torchs(case: Case, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    assert_same_as_torch(convolve(case), torch_convolve(case), normal_arrays(rng, *case.shapes, layout=layout), rng)


@given(convolutions(), seeds)
def test_gradients_are_the_derivatives(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(convolve(case), normal_arrays(rng, *case.shapes), rng)


@given(convolutions(), seeds)
def test_each_group_is_a_convolution_of_its_own(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = normal_arrays(rng, *case.shapes)
    y, _ = convolve(case)(x, weight)
    xs, weights = np.split(x, case.groups, axis=1), np.split(weight, case.groups)
    parts = [nn.conv2d(*pair, None, case.stride, case.padding)[0] for pair in zip(xs, weights, strict=True)]
    assert_same(y, np.concatenate(parts, axis=1), scale=float(np.abs(x).max() * np.abs(weight).sum(axis=(1, 2, 3)).max()))


@given(convolutions(), seeds)
def test_it_rounds_as_sums_of_products_do(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = normal_arrays(rng, *case.shapes)
    out, per_group, *kernel = case.shapes[1]
    taps, positions = int(np.prod(kernel)), convolve(case)(*inputs)[0].size // out
    terms = [per_group * taps + 1, out // case.groups * taps + 1, positions]
    assert_multilinear_in_float32(convolve(case), inputs, terms, rng)


def test_a_hand_computed_depthwise_convolution() -> None:
    x = np.array([[[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]])
    weight = np.array([[[[1.0, 10.0]]], [[[100.0, 1000.0]]]])
    y, vjp = nn.grouped_conv2d(x, weight, 2)
    np.testing.assert_array_equal(y, [[[[21.0, 32.0]], [[5400.0, 6500.0]]]])
    dx, dweight = vjp(np.array([[[[1.0, 2.0]], [[3.0, 4.0]]]]))
    np.testing.assert_array_equal(dx, [[[[1.0, 12.0, 20.0]], [[300.0, 3400.0, 4000.0]]]])
    np.testing.assert_array_equal(dweight, [[[[5.0, 8.0]]], [[[32.0, 39.0]]]])


X, W = np.ones((1, 4, 6, 5)), np.ones((6, 2, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], W, 2), r"grouped_conv2d: x has shape \(4, 6, 5\): expected \(B, C, H, W\)"),
        ((X, W, 4), r"x has shape \(1, 4, 6, 5\), weight \(6, 2, 3, 3\): expected .* multiples of groups, 4"),
        ((X[:, :3], W, 2), r"x has shape \(1, 3, 6, 5\), weight .* multiples of groups, 2"),
        ((X, W, 1), r"weight has shape \(6, 2, 3, 3\): expected \(O, 4, kh, kw\)"),
        ((X, W, 0), r"groups is 0"),
        ((X, W, 2, 0), r"stride is 0"),
        ((X, W, 2, 1, -1), r"padding is .*-1"),
        ((X, np.ones((6, 2, 3, 8)), 2, 1, 1), r"x has shape \(1, 4, 6, 5\), padded 8 x 7.*3 x 8"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nn.grouped_conv2d(*arguments)


def test_wrong_dtypes_and_gradients_are_named() -> None:
    with pytest.raises(TypeError, match=r"grouped_conv2d: weight \(shape \(6, 2, 3, 3\)\) is float32 but x is float64"):
        nn.grouped_conv2d(X, W.astype(np.float32), 2)
    y, vjp = nn.grouped_conv2d(X, W, 2)
    for dy in (y[..., :1], y[None], y.astype(np.float32)):
        with pytest.raises(ValueError, match="grouped_conv2d: dy is"):
            vjp(dy)
