"""Max pooling against torch, and TF 'SAME' padding from its definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from tests.equality import check_vjp
from tests.primitives import (
    assert_same_as_torch,
    assert_twin_agrees,
    assert_twin_agrees_at_extremes,
    assert_within,
    each_implementation,  # noqa: F401
    extremes,
    lay_out,
    layouts,
    lengths,
    results,
    roundings,
    seeds,
)

both = pytest.mark.usefixtures("each_implementation")


class Case(NamedTuple):
    shape: tuple[int, ...]
    kernel: int
    stride: int
    padding: Any


@st.composite
def pools(draw: st.DrawFn) -> Case:
    kernel = draw(st.integers(1, 4))
    sides = st.integers(0, kernel - 1)
    pairs = ((draw(sides), draw(sides)), (draw(sides), draw(sides)))
    size = [draw(st.integers(n, n + 6)) for n in (max(1, kernel - sum(pair)) for pair in pairs)]
    return Case((draw(st.integers(1, 2)), draw(st.integers(1, 3)), *size), kernel, draw(st.integers(1, 5)), pairs)


def pool(case: Case) -> Any:
    return lambda x: nn.max_pool2d(x, case.kernel, case.stride, case.padding)


@both
@settings(max_examples=100)
@given(pools(), seeds, layouts, st.booleans())
def test_it_is_torchs_ties_included(case: Case, seed: int, layout: str, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(case.shape)
    (top, bottom), (left, right) = case.padding

    def witness(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (left, right, top, bottom), value=-np.inf)
        return F.max_pool2d(padded, case.kernel, case.stride)

    assert_same_as_torch(pool(case), witness, [np.round(x) if ties else x], rng, scales=[1, 1])


@both
@given(pools(), seeds)
def test_gradients_are_the_derivatives(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.permutation(int(np.prod(case.shape))).reshape(case.shape) * 0.1  # no two values near each other
    check_vjp(pool(case), [x], rng)


@both
@given(pools(), seeds)
def test_float32_selects_exactly_and_adds_gradients(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(case.shape).astype(np.float32)
    (y, dx), dy = results(pool(case), [x], None, rng)
    (y64, dx64), _ = results(pool(case), [x.astype(np.float64)], dy.astype(np.float64), rng)
    np.testing.assert_array_equal(y, y64)
    (_, size), _ = results(pool(case), [x.astype(np.float64)], np.abs(dy).astype(np.float64), rng)
    assert y.dtype == np.float32
    assert_within(dx, dx64, roundings(case.kernel**2) * size, "dx")


@both
def test_a_number_pads_all_sides_and_padding_never_wins() -> None:
    x = -np.arange(1.0, 7.0).reshape(1, 1, 2, 3)
    y, _ = nn.max_pool2d(x, 3, 2, 1)
    np.testing.assert_array_equal(y, nn.max_pool2d(x, 3, 2, ((1, 1), (1, 1)))[0])
    np.testing.assert_array_equal(y, [[[[-1, -2]]]])


@both
def test_nan_is_seen() -> None:
    x = np.array([[[[1.0, np.nan], [2.0, 3.0]]]])
    assert np.isnan(nn.max_pool2d(x, 2, 1)[0]).all()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.integers(1, 8))
def test_same_padding_is_the_least_that_yields_a_window_per_stride(height: int, width: int, kernel: int, stride: int) -> None:
    for n, (before, after) in zip((height, width), nn.same_padding((height, width), kernel, stride), strict=True):
        total, windows = before + after, -(-n // stride)
        assert before >= 0
        assert after - before in (0, 1)
        assert (n + total - kernel) // stride + 1 == windows or (kernel < stride and total == 0)
        assert total == 0 or (n + total - 1 - kernel) // stride + 1 < windows


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        ((384, 480), 7, 2, ((2, 3), (2, 3))),  # the Hybrid's stem
        ((192, 191), 3, 2, ((0, 1), (1, 1))),  # its max-pool, an even and an odd side
        ((96, 7), 1, 2, ((0, 0), (0, 0))),  # a strided 1x1 shortcut
    ],
)
def test_same_padding_of_the_stem(size: tuple[int, int], kernel: int, stride: int, expected: Any) -> None:
    assert nn.same_padding(size, kernel, stride) == expected


@given(lengths.filter(lambda n: n > 2), st.integers(1, 3), st.sampled_from([1, 2, 3]), seeds, layouts, st.booleans())
def test_the_twin_is_the_numpy_form(width: int, kernel: int, stride: int, seed: int, layout: str, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x = lay_out(rng.standard_normal((2, 2, 5, width)), layout)
    assert_twin_agrees(pool(Case(x.shape, kernel, stride, kernel // 2)), [np.round(x) if ties else x], rng, [1, 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_twin_is_the_numpy_form_at_extremes(dtype: Any) -> None:
    """Among them windows of -inf alone, which the padding may win, and of several NaN, of which the first wins."""
    rng = np.random.default_rng(0)
    x = rng.choice(extremes(dtype), (2, 3, 9, 33))
    x[0, 0, :5] = -np.inf
    x[0, 1, 2:5, 7:20] = np.nan
    for stride in (1, 2, 3):
        case = Case(x.shape, 3, stride, 1)
        dy = rng.standard_normal(pool(case)(x)[0].shape).astype(dtype)
        assert_twin_agrees_at_extremes(pool(case), [x], dy, 9, scale=4)


@pytest.mark.parametrize("padding", [3, 4, ((0, 0), (0, 5))])
def test_padding_must_be_less_than_the_kernel(padding: Any) -> None:
    with pytest.raises(ValueError, match="expected less than the kernel, 3"):
        nn.max_pool2d(np.ones((1, 1, 9, 9)), 3, 1, padding)
