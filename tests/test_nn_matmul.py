"""The product of stacks of matrices, with which linear maps, attention and the adjoints of convolutions are computed.

Its twin cuts the operands into panels and blocks and copies them into the order in which it reads them, and takes y^T = b^T a^T
where that copies less. So the sizes lie around its cuts, the operands lie in memory in every way, and of small whole numbers,
whose products and sums are exact in whatever order, the result is demanded bit for bit.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import reference.nn.matmul_cython
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from reference.nn.matmul import product
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    assert_multilinear_in_float32,
    assert_same_as_torch,
    assert_twin_agrees,
    assert_twin_agrees_at_extremes,
    each_implementation,  # noqa: F401
    extremes,
    implementations,
    lay_out,
    lay_out_matrices,
    layouts,
    matrix_layouts,
    normal_arrays,
    seeds,
)

both = pytest.mark.usefixtures("each_implementation")
dtypes = st.sampled_from([np.float32, np.float64])

# Around what the twin cuts into: panels of 8 rows and of 48 columns or half of that, up to 4 columns one by one, 32 rows written
# together, 256 rows of a task; 16 terms transposed together, 256 summed in one go. Any side may be rows or columns.
SIDES = (1, 2, 4, 5, 7, 8, 9, 23, 24, 25, 31, 32, 33, 47, 48, 49, 52, 53, 65, 72, 73, 97, 128, 257)
DEPTHS = (1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 255, 256, 257, 513)
sides, depths = st.sampled_from(SIDES), st.sampled_from(DEPTHS)
stacks = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)])


class Sizes(NamedTuple):
    stack: tuple[int, ...]
    rows: int
    terms: int
    columns: int

    @property
    def operands(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (*self.stack, self.rows, self.terms), (*self.stack, self.terms, self.columns)


@st.composite
def products(draw: st.DrawFn) -> Sizes:
    sizes = Sizes(draw(stacks), draw(sides), draw(depths), draw(sides))
    if sizes.rows * sizes.terms * sizes.columns > 1 << 20:
        return sizes._replace(stack=())
    return sizes


small = st.builds(Sizes, stacks, *[st.integers(1, 6)] * 3)


def whole_numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, layout: str = "plain") -> np.ndarray:
    """Numbers of which 2^18 products can be added in float32 without rounding."""
    array = rng.integers(-8, 9, shape).astype(dtype)
    return lay_out_matrices(array, layout) if array.ndim > 1 else lay_out(array, layout)


def assert_exact(actual: np.ndarray, expected: np.ndarray, dtype: Any) -> None:
    """`expected`: whole numbers in float64."""
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


# Whole numbers: nothing is rounded, so nothing is allowed


@settings(max_examples=200)
@given(products(), seeds, matrix_layouts, matrix_layouts, matrix_layouts, dtypes, implementations)
def test_products_of_whole_numbers_are_exact(
    sizes: Sizes, seed: int, of_a: str, of_b: str, of_dy: str, dtype: Any, name: str
) -> None:
    rng = np.random.default_rng(seed)
    (a, b) = (whole_numbers(rng, shape, dtype, way) for shape, way in zip(sizes.operands, (of_a, of_b), strict=True))
    dy = whole_numbers(rng, (*sizes.stack, sizes.rows, sizes.columns), dtype, of_dy)
    with use(name):
        y, vjp = nn.matmul(a, b)
        da, db = vjp(dy)
    a, b, dy = (array.astype(np.float64) for array in (a, b, dy))
    assert_exact(y, np.matmul(a, b), dtype)
    assert_exact(da, np.matmul(dy, b.swapaxes(-1, -2)), dtype)
    assert_exact(db, np.matmul(a.swapaxes(-1, -2), dy), dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("of_a", ["plain", "matrices transposed"])
@pytest.mark.parametrize("of_b", ["plain", "matrices transposed"])
def test_every_pair_of_sides(of_a: str, of_b: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    with use("cython"):
        for i, (rows, columns) in enumerate(itertools.product(SIDES, SIDES)):
            shapes = Sizes((), rows, DEPTHS[i % len(DEPTHS)], columns).operands
            a, b = (whole_numbers(rng, shape, dtype, way) for shape, way in zip(shapes, (of_a, of_b), strict=True))
            bias = whole_numbers(rng, (columns,), dtype)
            assert_exact(product(a, b, bias), np.matmul(a.astype(np.float64), b.astype(np.float64)) + bias, dtype)


# More than a group of panels of columns (768), than the rows of one task (256, where there are enough of them), with tails of
# every kind, and both with more rows than columns and with fewer.
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("way", ["plain", "matrices transposed"])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes((), 300, 5, 769),
        Sizes((), 9, 17, 773),
        Sizes((), 773, 17, 780),
        Sizes((), 1030, 9, 53),
        Sizes((), 53, 9, 1030),
        Sizes((5,), 258, 260, 52),
        Sizes((2,), 261, 3, 1540),
        Sizes((), 1, 2000, 1),
        Sizes((), 1, 700, 900),
        Sizes((), 900, 700, 1),
    ],
)
def test_large_products_of_whole_numbers_are_exact(sizes: Sizes, way: str, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (whole_numbers(rng, shape, dtype, way) for shape in sizes.operands)
    bias = whole_numbers(rng, (sizes.columns,), dtype)
    with use("cython"):
        assert_exact(product(a, b, bias), np.matmul(a.astype(np.float64), b.astype(np.float64)) + bias, dtype)


@settings(max_examples=100)
@given(products(), seeds, layouts, layouts, layouts, dtypes, implementations)
def test_linear_maps_of_whole_numbers_are_exact(
    sizes: Sizes, seed: int, of_x: str, of_weight: str, of_bias: str, dtype: Any, name: str
) -> None:
    rng = np.random.default_rng(seed)
    x = whole_numbers(rng, (*sizes.stack, sizes.rows, sizes.terms), dtype, of_x)
    weight, bias = (
        whole_numbers(rng, shape, dtype, way)
        for shape, way in (((sizes.columns, sizes.terms), of_weight), ((sizes.columns,), of_bias))
    )
    dy = whole_numbers(rng, (*sizes.stack, sizes.rows, sizes.columns), dtype, of_x)
    with use(name):
        y, vjp = nn.linear(x, weight, bias)
        dx, dweight, dbias = vjp(dy)
    x, weight, dy = (array.astype(np.float64) for array in (x, weight, dy))
    rows, drows = x.reshape(-1, sizes.terms), dy.reshape(-1, sizes.columns)
    assert_exact(y, np.matmul(x, weight.T) + bias, dtype)
    assert_exact(dx, np.matmul(dy, weight), dtype)
    assert_exact(dweight, drows.T @ rows, dtype)
    assert_exact(dbias, drows.sum(axis=0), dtype)


@settings(max_examples=100)
@given(products(), seeds, matrix_layouts, st.sampled_from(["a", "b", "both"]), dtypes, implementations)
def test_one_matrix_serves_a_whole_stack(sizes: Sizes, seed: int, layout: str, shared: str, dtype: Any, name: str) -> None:
    """Repeated without being copied: its distance to the next of the stack is 0."""
    rng = np.random.default_rng(seed)
    a, b = (
        np.broadcast_to(whole_numbers(rng, shape[-2:], dtype, layout), shape)
        if shared in (which, "both")
        else whole_numbers(rng, shape, dtype, layout)
        for which, shape in zip("ab", sizes.operands, strict=True)
    )
    with use(name):
        assert_exact(nn.matmul(a, b)[0], np.matmul(a.astype(np.float64), b.astype(np.float64)), dtype)


@given(products(), seeds, implementations, st.sampled_from(["rows", "columns"]))
def test_one_row_or_column_serves_a_whole_matrix(sizes: Sizes, seed: int, name: str, what: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (whole_numbers(rng, shape, np.float32) for shape in sizes.operands)
    if what == "rows":
        a, b = np.broadcast_to(a[..., :1, :], a.shape), np.broadcast_to(b[..., :1, :], b.shape)
    else:
        a, b = np.broadcast_to(a[..., :1], a.shape), np.broadcast_to(b[..., :1], b.shape)
    with use(name):
        assert_exact(nn.matmul(a, b)[0], np.matmul(a.astype(np.float64), b.astype(np.float64)), np.float32)


# Any numbers


@both
@given(products(), seeds, matrix_layouts)
def test_matmul_is_torchs(sizes: Sizes, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = [lay_out_matrices(array, layout) for array in normal_arrays(rng, *sizes.operands)]
    assert_same_as_torch(nn.matmul, torch.matmul, inputs, rng)


@both
@given(small, seeds, layouts)
def test_matmul_gradients_are_the_derivatives(sizes: Sizes, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(nn.matmul, normal_arrays(rng, *sizes.operands, layout=layout), rng)


@both
@given(products(), seeds)
def test_matmul_rounds_as_sums_of_products_do(sizes: Sizes, seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms = [sizes.terms, sizes.columns, sizes.rows]
    assert_multilinear_in_float32(nn.matmul, normal_arrays(rng, *sizes.operands), terms, rng)


@both
@given(products(), seeds, layouts)
def test_linear_is_torchs_whatever_its_size(sizes: Sizes, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    shapes = (*sizes.stack, sizes.rows, sizes.terms), (sizes.columns, sizes.terms), (sizes.columns,)
    assert_same_as_torch(nn.linear, F.linear, normal_arrays(rng, *shapes, layout=layout), rng)


@given(products(), seeds, matrix_layouts)
def test_the_twin_of_matmul(sizes: Sizes, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    assert_twin_agrees(nn.matmul, [lay_out_matrices(array, layout) for array in normal_arrays(rng, *sizes.operands)], rng)


@given(products(), seeds, matrix_layouts, matrix_layouts)
def test_the_twin_of_a_product_with_a_bias(sizes: Sizes, seed: int, of_a: str, of_b: str) -> None:
    rng = np.random.default_rng(seed)
    a, b = (lay_out_matrices(rng.standard_normal(shape), way) for shape, way in zip(sizes.operands, (of_a, of_b), strict=True))
    bias = rng.standard_normal(sizes.columns)
    with use("numpy"):
        expected = product(a, b, bias)
    with use("cython"):
        assert_same(product(a, b, bias), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("columns", [1, 9, 24, 50])
def test_the_twin_at_extremes(columns: int, dtype: Any) -> None:
    special, rng = extremes(dtype), np.random.default_rng(0)
    a, dy = (rng.standard_normal((len(special), n)).astype(dtype) for n in (35, columns))
    b = rng.standard_normal((35, columns)).astype(dtype)
    for place in (0, 16, 34):
        x = a.copy()
        x[:, place] = special
        # Sums of up to 50 terms, of which each is at most about 16 where it is not one of the extremes.
        assert_twin_agrees_at_extremes(nn.matmul, [x, b], dy, 60, scale=50 * 16)
        assert_twin_agrees_at_extremes(nn.matmul, [b.T.copy(), x.T.copy()], dy.T.copy(), 60, scale=50 * 16)


@both
@pytest.mark.parametrize("what", [np.nan, np.inf])
@given(sizes=products(), seed=seeds, layout=matrix_layouts)
def test_what_is_not_finite_spoils_its_row_or_column_alone(sizes: Sizes, seed: int, layout: str, what: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = (np.abs(array) + 1 for array in normal_arrays(rng, *sizes.operands))
    row, column = int(rng.integers(sizes.rows)), int(rng.integers(sizes.columns))
    k = int(rng.integers(sizes.terms))
    spoilt = np.zeros((*sizes.stack, sizes.rows, sizes.columns), bool)
    for array, place in ((a, (..., row, k)), (b, (..., k, column))):
        good = array[place].copy()
        array[place] = what
        spoilt[...] = False
        spoilt[(..., row, slice(None)) if array is a else (..., column)] = True
        with np.errstate(invalid="ignore"):
            y = nn.matmul(lay_out_matrices(a, layout), lay_out_matrices(b, layout))[0]
        array[place] = good
        np.testing.assert_array_equal(y[spoilt], what)
        assert np.isfinite(y[~spoilt]).all()


def test_a_hand_computed_product() -> None:
    a, b, bias = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), np.array([[1.0, 10.0], [100.0, 1000.0]]), np.array([0.5, 0.25])
    for name in ("numpy", "cython"):
        with use(name):
            np.testing.assert_array_equal(product(a, b, bias), [[201.5, 2010.25], [403.5, 4030.25], [605.5, 6050.25]])
            y, vjp = nn.matmul(a, b)
            np.testing.assert_array_equal(y, [[201, 2010], [403, 4030], [605, 6050]])
            da, db = vjp(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
            np.testing.assert_array_equal(da, [[1, 100], [10, 1000], [0, 0]])
            np.testing.assert_array_equal(db, [[1, 3], [2, 4]])


@pytest.mark.parametrize("operation", [nn.matmul, partial(nn.linear, bias=np.ones(3))])
def test_the_twin_is_what_runs(operation: Any) -> None:
    x = np.ones((3, 3))
    with mock.patch.object(reference.nn.matmul_cython, "product", side_effect=ZeroDivisionError):
        with use("numpy"):
            operation(x, x)
        with use("cython"), pytest.raises(ZeroDivisionError):
            operation(x, x)
