"""Bilinear resizing against torch, in both implementations and with both conventions for the corners."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from reference.nn.resize import source_positions
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    U,
    assert_same_as_torch,
    assert_twin_agrees,
    assert_twin_agrees_at_extremes,
    assert_within,
    extremes,
    implementations,
    layouts,
    lengths,
    normal_arrays,
    results,
    roundings,
    seeds,
)

Size = tuple[int, int]

shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
sizes = st.tuples(st.integers(1, 14), st.integers(1, 14))


def resize(size: Size, align_corners: bool) -> Any:
    return partial(nn.resize_bilinear, size=size, align_corners=align_corners)


@settings(max_examples=150)
@given(shapes, sizes, st.booleans(), seeds, implementations, layouts)
def test_it_is_torchs(shape: tuple[int, ...], size: Size, align_corners: bool, seed: int, name: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    witness = partial(F.interpolate, size=size, mode="bilinear", align_corners=align_corners)
    with use(name):
        assert_same_as_torch(resize(size, align_corners), witness, normal_arrays(rng, shape, layout=layout), rng)


@given(shapes, sizes, st.booleans(), seeds, implementations)
def test_gradients_are_the_derivatives(shape: tuple[int, ...], size: Size, align_corners: bool, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name):
        check_vjp(resize(size, align_corners), normal_arrays(rng, shape), rng)


@given(shapes, sizes, st.booleans(), seeds)
def test_the_twin_is_the_numpy_form(shape: tuple[int, ...], size: Size, align_corners: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = normal_arrays(rng, shape)
    with use("numpy"):
        expected, dy = results(resize(size, align_corners), inputs, None, rng)
    with use("cython"):
        actual, _ = results(resize(size, align_corners), inputs, dy, rng)
    for have, want in zip(actual, expected, strict=True):
        assert_same(have, want, rtol=1e-14, scale=1 + float(np.abs(want).max()))


@given(lengths, lengths, st.integers(1, 7), st.integers(1, 7), st.booleans(), seeds, layouts)
def test_the_twin_at_the_lengths_of_its_loops(
    width: int, wide: int, height: int, tall: int, align_corners: bool, seed: int, layout: str
) -> None:
    rng = np.random.default_rng(seed)
    inputs = normal_arrays(rng, (1, 2, height, width), layout=layout)
    assert_twin_agrees(resize((tall, wide), align_corners), inputs, rng, [1, 1 + wide * tall])


def test_more_planes_than_parts() -> None:
    rng = np.random.default_rng(0)
    assert_twin_agrees(resize((5, 4), True), normal_arrays(rng, (3, 50, 3, 3)), rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_twin_at_extremes(dtype: Any) -> None:
    """A NaN or an infinity reaches the pixels that read it and no others; places on a pixel give the neighbour weight 0.

    The largest numbers are left out: whether the sum of two overflows is for the order of operations to say.
    """
    rng, special = np.random.default_rng(0), extremes(dtype)
    x = rng.standard_normal((len(special), 1, 6, 20)).astype(dtype)
    x[:, 0, 2, 9] = special
    x = x[~(np.isfinite(special) & (np.abs(special) > 100))]
    for size in ((11, 39), (3, 7)):
        dy = rng.standard_normal((len(x), 1, *size)).astype(dtype)
        dy[:, 0, 1, 4] = x[:, 0, 2, 9]
        assert_twin_agrees_at_extremes(resize(size, True), [x], dy, 8, scale=4)


def matrices(n: int, out: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the (out, n) matrix of one axis, and the same plus how far one relative rounding of each weight can move it."""
    axis = source_positions(n, out, align_corners, np.dtype(np.float64))
    exact, moved = np.zeros((out, n)), np.zeros((out, n))
    for i, (before, after, weight) in enumerate(zip(*axis, strict=True)):
        exact[i, before] += 1 - weight
        exact[i, after] += weight
        moved[i, [before, after]] += weight
    return exact, exact + moved


@given(shapes, sizes, st.booleans(), seeds, implementations)
def test_float32_rounds_weights_and_sums(shape: tuple[int, ...], size: Size, align_corners: bool, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = [array.astype(np.float32) for array in normal_arrays(rng, shape)]
    with use(name):
        actual, dy = results(resize(size, align_corners), inputs, None, rng)
    (rows, rows_size), (columns, columns_size) = (matrices(n, out, align_corners) for n, out in zip(shape[2:], size, strict=True))
    x, dy = inputs[0].astype(np.float64), dy.astype(np.float64)
    # A weight, its complement, a product and a sum, for each axis: eight roundings.
    assert_within(actual[0], rows @ x @ columns.T, 8 * U * (rows_size @ np.abs(x) @ columns_size.T), "y")
    readers = int((rows > 0).sum(axis=0).max() + (columns > 0).sum(axis=0).max())
    bound = roundings(8 + readers) * (rows_size.T @ np.abs(dy) @ columns_size)
    assert_within(actual[1], rows.T @ dy @ columns, bound, "dx")


@pytest.mark.parametrize("name", ["numpy", "cython"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_size_changes_nothing(name: str, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(dtype)
    with use(name):
        for align_corners in (False, True):
            np.testing.assert_array_equal(nn.resize_bilinear(x, (5, 7), align_corners)[0], x)


@given(st.integers(2, 40), st.integers(2, 90))
def test_aligned_corners_meet_exactly(n: int, out: int) -> None:
    axis = source_positions(n, out, True, np.dtype(np.float64))
    place = axis.before + axis.weight
    np.testing.assert_array_equal(place[[0, -1]], [0, n - 1])
    np.testing.assert_allclose(np.diff(place), (n - 1) / (out - 1), rtol=1e-12)


@given(st.integers(1, 40), st.integers(1, 90))
def test_unaligned_positions_are_symmetric_and_even(n: int, out: int) -> None:
    axis = source_positions(n, out, False, np.dtype(np.float64))
    place = axis.before * (1 - axis.weight) + axis.after * axis.weight
    np.testing.assert_allclose(place + place[::-1], n - 1, atol=1e-12)  # though only the lower end is clamped in so many words
    inside = (place > 0) & (place < n - 1)
    np.testing.assert_allclose(np.diff(place[inside]), n / out, rtol=1e-9)
