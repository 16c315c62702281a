"""The selections and stencils of the losses, by definition, in both implementations: exactly, where nothing is rounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.implementation import IMPLEMENTATIONS, use
from reference.nn.differences import absolute_differences, absolute_differences_adjoint
from reference.nn.selection import lower_median, smallest
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    U,
    assert_within,
    each_implementation,  # noqa: F401
    extremes,
    implementations,
    lay_out,
    layouts,
    lengths,
    roundings,
    seeds,
)

Array = np.ndarray

dtypes = st.sampled_from([np.float32, np.float64])
kinds = st.sampled_from(["normal", "tied", "constant", "extreme", "near"])
valids = st.sampled_from(["all", "some", "one", "none"])
both = pytest.mark.usefixtures("each_implementation")


def draw_values(kind: str, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> Array:
    if kind == "normal":
        return rng.standard_normal(shape).astype(dtype)
    if kind == "tied":
        return (rng.integers(-3, 4, shape) / 4).astype(dtype)
    if kind == "constant":
        return np.full(shape, -1.5, dtype)
    if kind == "extreme":
        return rng.choice(extremes(dtype), shape)
    # Neighbouring floats, which differ in their last digits alone; and of both signs, for which these ascend and descend.
    return rng.choice([-1, 1], shape).astype(dtype) * (1 + rng.integers(0, 5, shape) * np.finfo(dtype).eps).astype(dtype)


def draw_valid(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if kind == "one":
        valid = np.zeros(shape, bool)
        valid.reshape(len(valid), -1)[:, rng.integers(0, valid[0].size)] = True
        return valid
    return rng.random(shape) < {"all": 2.0, "some": 0.6, "none": 0.0}[kind]


# Selections


def order(value: float) -> float:
    """NaN comes last, after infinity."""
    return (1, 0.0) if np.isnan(value) else (0, float(value))  # type: ignore[return-value]


@given(st.integers(1, 3), lengths, dtypes, kinds, valids, seeds, implementations, layouts)
def test_the_lower_median(rows: int, n: int, dtype: Any, kind: str, which: str, seed: int, name: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    values = lay_out(draw_values(kind, (rows, n), dtype, rng), layout)
    valid = lay_out(draw_valid(which, (rows, n), rng), layout)
    if np.isnan(values[valid]).any():
        values = np.nan_to_num(values)  # an image with NaN is refused before
    with use(name):
        median, first = lower_median(values, valid)
    assert (median.dtype, first.dtype) == (dtype, np.intp)
    for row, m, have, place in zip(values, valid, median, first, strict=True):
        ascending = sorted(row[m])
        want = ascending[(len(ascending) - 1) // 2] if ascending else 0
        assert have == want
        assert place == next((i for i in range(n) if m[i] and row[i] == want), 0)


@given(st.integers(1, 3), lengths, dtypes, kinds, valids, st.floats(0, 1), seeds, implementations, layouts)
def test_the_smallest(
    rows: int, n: int, dtype: Any, kind: str, which: str, kept: float, seed: int, name: str, layout: str
) -> None:
    rng = np.random.default_rng(seed)
    values = lay_out(draw_values(kind, (rows, n), dtype, rng), layout)
    valid = lay_out(draw_valid(which, (rows, n), rng), layout)
    count = (kept * valid.sum(axis=1)).astype(int)
    with use(name):
        chosen = smallest(values, valid, count)
    assert chosen.dtype == bool
    for row, m, k, have in zip(values, valid, count, chosen, strict=True):
        places = sorted(np.flatnonzero(m), key=lambda i, row=row: (order(row[i]), i))[:k]
        np.testing.assert_array_equal(np.flatnonzero(have), sorted(places))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_rank_is_found(dtype: Any) -> None:
    """Values of all sizes, so that each digit of the twin's keys decides somewhere."""
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], 300) * 2.0 ** rng.integers(-30, 30, 300) * (1 + rng.random(300))).astype(dtype)
    values[100:] = 1 + np.arange(200) * np.finfo(dtype).eps  # and neighbours
    rng.shuffle(values)
    ranks = np.argsort(np.argsort(values, kind="stable"))
    with use("cython"):
        for k in range(0, 301, 7):
            [chosen] = smallest(values[None], np.ones((1, 300), bool), np.array([k]))
            np.testing.assert_array_equal(chosen, ranks < k)


@both
def test_zeros_of_both_signs_are_equal() -> None:
    values, valid = np.array([[0.0, -0.0, 1, -0.0, 0, -1]]), np.ones((1, 6), bool)
    np.testing.assert_array_equal(smallest(values, valid, np.array([3])), [[True, True, False, False, False, True]])
    np.testing.assert_array_equal(lower_median(values, valid), [[0], [0]])


def test_neither_selection_changes_what_it_is_given() -> None:
    values, valid, count = np.array([[3.0, 1, 2]]), np.ones((1, 3), bool), np.array([2])
    for name in IMPLEMENTATIONS:
        with use(name):
            lower_median(values, valid)
            smallest(values, valid, count)
    np.testing.assert_array_equal(values, [[3, 1, 2]])
    assert valid.all()
    assert count == 2


# Differences

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), lengths)


@given(shapes, kinds.filter(lambda kind: kind != "extreme"), valids, seeds, implementations, layouts)
def test_differences_count_where_both_pixels_are_valid(
    shape: tuple[int, ...], kind: str, which: str, seed: int, name: str, layout: str
) -> None:
    rng = np.random.default_rng(seed)
    maps, valid = draw_values(kind, shape, np.float64, rng), draw_valid(which, shape, rng)
    known = np.where(valid, maps, np.nan)  # a difference with NaN is NaN, which nansum leaves out
    across, down = np.diff(known, axis=2), np.diff(known, axis=1)
    expected = np.nansum(np.abs(across), axis=(1, 2)) + np.nansum(np.abs(down), axis=(1, 2))
    dsum, slopes = rng.standard_normal(shape[0]), np.zeros(shape)
    across, down = np.sign(np.nan_to_num(across)), np.sign(np.nan_to_num(down))
    slopes[:, :, 1:] += across
    slopes[:, :, :-1] -= across
    slopes[:, 1:] += down
    slopes[:, :-1] -= down
    maps = lay_out(np.where(valid, maps, rng.choice(extremes(np.float64), shape)), layout)
    valid = lay_out(valid, layout)
    with use(name):
        assert_same(absolute_differences(maps, valid), expected, scale=1 + float(np.abs(expected).max()))
        gradient = absolute_differences_adjoint(lay_out(dsum, layout if layout != "transposed" else "plain"), maps, valid)
    assert_same(gradient, dsum[:, None, None] * slopes, scale=4 * float(np.abs(dsum).max()))


@both
@given(shapes.filter(lambda s: s[1] * s[2] > 1), seeds)
def test_gradients_of_differences_are_the_derivatives(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps = rng.permutation(int(np.prod(shape))).reshape(shape) * 1.0  # no two within reach of the steps
    valid = rng.random(shape) < 0.8

    def operation(hundredths: Array) -> Any:
        maps = 100 * hundredths  # so that the steps of the differences are small beside 1
        return absolute_differences(maps, valid), lambda dsum: 100 * absolute_differences_adjoint(dsum, maps, valid)

    check_vjp(operation, [maps / 100], rng)


@given(shapes, seeds, implementations)
def test_differences_in_float32(shape: tuple[int, ...], seed: int, name: str) -> None:
    """A difference errs by one rounding of itself; then come the sums. Signs are exact, and add up to at most 4."""
    rng = np.random.default_rng(seed)
    maps, valid = rng.standard_normal(shape).astype(np.float32), rng.random(shape) < 0.8
    dsum = rng.standard_normal(shape[0]).astype(np.float32)
    with use("numpy"):
        expected = absolute_differences(maps.astype(float), valid)
        slopes = absolute_differences_adjoint(dsum.astype(float), maps.astype(float), valid)
    with use(name):
        sums, gradient = absolute_differences(maps, valid), absolute_differences_adjoint(dsum, maps, valid)
    assert_within(sums, expected, roundings(1 + 2 * shape[1] * shape[2]) * expected)
    assert_within(gradient, slopes, 3 * U * 4 * np.abs(dsum)[:, None, None] * np.ones(shape))


@both
def test_a_nan_at_a_valid_pixel_is_not_hidden() -> None:
    maps = np.zeros((2, 4, 40))
    maps[1, 2, 20] = np.nan
    valid = np.ones(maps.shape, bool)
    np.testing.assert_array_equal(np.isnan(absolute_differences(maps, valid)), [False, True])
    gradient = absolute_differences_adjoint(np.ones(2), maps, valid)
    np.testing.assert_array_equal(np.argwhere(np.isnan(gradient)), [(1, 1, 20), (1, 2, 19), (1, 2, 20), (1, 2, 21), (1, 3, 20)])
