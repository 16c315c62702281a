"""Scaled dot-product attention: one primitive where the formula has three, softmax(q k^T / sqrt(d)) v.

Its twin takes 64 queries at a time, in panels of 8, past all keys, in panels of 48, and holds no more of the weights than that.
So the sizes lie around its cuts, and d, the width of the keys, is not e, that of the values.
"""

from __future__ import annotations

import itertools
import math
import threading
import tracemalloc
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import reference.nn.attention_cython
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from reference.nn import memory
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    U,
    assert_same_as_torch,
    assert_twin_agrees,
    assert_twin_agrees_at_extremes,
    assert_within,
    each_implementation,  # noqa: F401
    extremes,
    implementations,
    lay_out_matrices,
    layouts,
    matrix_layouts,
    normal_arrays,
    results,
    roundings,
    seeds,
)

both = pytest.mark.usefixtures("each_implementation")

QUERIES = (1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 71, 72, 73, 129)
KEYS = (1, 2, 4, 5, 16, 17, 23, 24, 25, 28, 29, 47, 48, 49, 52, 53, 72, 73, 96, 97, 100, 145)
DEPTHS = (1, 2, 7, 8, 15, 16, 17, 33, 47, 48, 49, 64, 65)
WIDTHS = (1, 2, 4, 5, 8, 23, 24, 25, 47, 48, 49, 52, 53, 73, 97)


class Sizes(NamedTuple):
    stack: tuple[int, ...]
    queries: int
    keys: int
    depth: int
    width: int

    @property
    def operands(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of q, k and v."""
        return (*self.stack, self.queries, self.depth), (*self.stack, self.keys, self.depth), (*self.stack, self.keys, self.width)


stacks = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)])
heads = st.builds(Sizes, stacks, *(st.sampled_from(sizes) for sizes in (QUERIES, KEYS, DEPTHS, WIDTHS)))
small = st.builds(Sizes, stacks, *[st.integers(1, 6)] * 4)
gains = st.sampled_from([1, 30])  # 30: rows that look almost entirely at one token


def composition(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Any:
    """The same by the primitives that it is made of."""
    scale = 1 / math.sqrt(q.shape[-1])
    scores, scores_vjp = nn.matmul(q * scale, k.swapaxes(-1, -2))
    weights, softmax_vjp = nn.softmax(scores)
    y, y_vjp = nn.matmul(weights, v)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        dweights, dv = y_vjp(dy)
        dq, dk = scores_vjp(softmax_vjp(dweights))
        return dq * scale, dk.swapaxes(-1, -2), dv

    return y, vjp


def transposed(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


class Rounding(NamedTuple):
    """Attention in float64, step by step, with a bound on what float32 adds to each: `error` of `value`."""

    value: list[np.ndarray]  # y, dq, dk, dv
    error: list[np.ndarray]
    size: list[np.ndarray]  # the sums of the absolute terms that cancel


def attention_and_its_rounding(q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray) -> Rounding:
    """First-order bounds from the formulas' Jacobians, whatever the order of the sums.

        s = q k^T / sqrt(d),  A = softmax(s),  y = A v,  dA = dy v^T,  ds = A (dA - sum A dA),  dq = ds k / sqrt(d), ...

    An error of a score's is one of exp's exponent, and so a relative one of A; a row's largest score, which is subtracted from
    all, cancels in the quotient, errors included.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    n, m, d, e = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    s = q @ transposed(k) * scale
    least = s.max(axis=-1, keepdims=True) - s
    a = np.exp(-least)
    a /= a.sum(axis=-1, keepdims=True)

    def total(values: np.ndarray) -> np.ndarray:
        return values.sum(axis=-1, keepdims=True)

    # The scores' sums and two factors; the subtraction and, where the scale comes after it, that product.
    exponent = (roundings(d) + 2 * U) * scale * (np.abs(q) @ np.abs(transposed(k))) + 2 * U * least
    # exp errs by 6 U at most, as does every term of the sum; then the sum, the quotient (of two roundings) and the product.
    a_error = a * (exponent + total(a * exponent) + roundings(m) + 15 * U)
    y, y_size = a @ v, a @ np.abs(v)
    y_error = a_error @ np.abs(v) + roundings(m) * y_size
    da, da_size = dy @ transposed(v), np.abs(dy) @ np.abs(transposed(v))
    da_error = roundings(e) * da_size
    inner = total(a * da)
    inner_error = total(a_error * np.abs(da) + a * da_error + (roundings(m) + U) * a * np.abs(da))
    ds, ds_size = a * (da - inner) * scale, a * (da_size + total(a * da_size)) * scale
    ds_error = a_error * (np.abs(da) + np.abs(inner)) + a * (da_error + inner_error) + 3 * U * a * (np.abs(da) + np.abs(inner))
    ds_error = ds_error * scale + 2 * U * np.abs(ds)
    return Rounding(
        [y, ds @ k, transposed(ds) @ q, transposed(a) @ dy],
        [
            y_error,
            ds_error @ np.abs(k) + roundings(m) * (np.abs(ds) @ np.abs(k)),
            transposed(ds_error) @ np.abs(q) + roundings(n) * (transposed(np.abs(ds)) @ np.abs(q)),
            transposed(a_error) @ np.abs(dy) + roundings(n) * (transposed(a) @ np.abs(dy)),
        ],
        [y_size, ds_size @ np.abs(k), transposed(ds_size) @ np.abs(q), transposed(a) @ np.abs(dy)],
    )


def scales(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> list[float]:
    """How large the terms are that cancel in y, dq, dk and dv, for dy of the size of 1."""
    sizes = attention_and_its_rounding(q, k, v, np.ones((*q.shape[:-1], v.shape[-1]))).size
    return [float(size.max()) for size in sizes]


def drawn(rng: np.random.Generator, sizes: Sizes, gain: float = 1, layout: str = "plain") -> list[np.ndarray]:
    q, k, v = normal_arrays(rng, *sizes.operands)
    return [lay_out_matrices(array, layout) for array in (gain * q, k, v)]


# The operation in float64


@both
@settings(max_examples=50)
@given(heads, gains, seeds, matrix_layouts)
def test_attention_is_torchs(sizes: Sizes, gain: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = drawn(rng, sizes, gain, layout)
    assert_same_as_torch(nn.scaled_dot_product_attention, F.scaled_dot_product_attention, inputs, rng, scales(*inputs))


@both
@given(small, seeds, layouts)
def test_attention_gradients_are_the_derivatives(sizes: Sizes, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    check_vjp(nn.scaled_dot_product_attention, drawn(rng, sizes, layout=layout), rng)


@both
@given(heads, gains, seeds, matrix_layouts)
def test_attention_is_two_products_with_a_softmax_between(sizes: Sizes, gain: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = drawn(rng, sizes, gain, layout)
    expected, dy = results(composition, inputs, None, rng)
    actual, _ = results(nn.scaled_dot_product_attention, inputs, dy, rng)
    for have, want, scale in zip(actual, expected, scales(*inputs), strict=True):
        assert_same(have, want, scale=scale)


@both
@given(heads, gains, seeds, matrix_layouts)
def test_the_weights_are_those_of_attention(sizes: Sizes, gain: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = drawn(rng, sizes, gain, layout)
    weights = nn.attention_weights(q, k)
    assert_same(weights, nn.softmax(nn.matmul(q, transposed(k))[0] / math.sqrt(sizes.depth))[0])
    assert_same(weights.sum(axis=-1), np.ones((*sizes.stack, sizes.queries)))
    assert_same(weights @ v, nn.scaled_dot_product_attention(q, k, v)[0])


# The twin


@settings(max_examples=100)
@given(heads, gains, seeds, matrix_layouts, matrix_layouts, matrix_layouts)
def test_the_twin_of_attention(sizes: Sizes, gain: float, seed: int, of_q: str, of_k: str, of_v: str) -> None:
    rng = np.random.default_rng(seed)
    arrays = drawn(rng, sizes, gain)
    inputs = [lay_out_matrices(array, layout) for array, layout in zip(arrays, (of_q, of_k, of_v), strict=True)]
    assert_twin_agrees(nn.scaled_dot_product_attention, inputs, rng, scales(*inputs))


@given(
    batch=st.integers(1, 3),
    number=st.sampled_from([1, 2, 5]),
    tokens=st.sampled_from(KEYS),
    width=st.sampled_from(DEPTHS),
    seed=seeds,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_heads_are_taken_from_where_the_tokens_projection_left_them(
    batch: int, number: int, tokens: int, width: int, seed: int, dtype: Any
) -> None:
    """q, k and v lie in one array, a token's side by side, and the gradient that comes back is such a view as well."""
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((batch, tokens, 3, number, width)).astype(dtype)
    dy = rng.standard_normal((batch, tokens, number, width)).astype(dtype).swapaxes(1, 2)
    views = qkv.transpose(2, 0, 3, 1, 4)
    copies = [np.ascontiguousarray(view) for view in views]
    with use("cython"):
        expected, vjp = nn.scaled_dot_product_attention(*copies)
        gradients = vjp(np.ascontiguousarray(dy))
        actual, _ = results(nn.scaled_dot_product_attention, list(views), dy, rng)
    # The same numbers are summed in the same order forward. Backward the layout decides which operand is cut into columns.
    np.testing.assert_array_equal(actual[0], expected)
    exact = attention_and_its_rounding(*(array.astype(np.float64) for array in (*copies, dy)))
    for i, (have, want) in enumerate(zip(actual[1:], gradients, strict=True), start=1):
        if dtype == np.float32:
            assert_within(have, want.astype(np.float64), 2 * exact.error[i])
        else:
            assert_same(have, want, scale=float(exact.size[i].max()))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_a_row_that_looks_at_one_token_returns_its_value_exactly(name: str, dtype: Any) -> None:
    """Keys on a circle, and queries so long that each sees only the key that it points at: nothing else is left to round."""
    rng = np.random.default_rng(0)
    shapes = itertools.product(QUERIES, KEYS)
    for (queries, keys), depth, width in zip(shapes, itertools.cycle(DEPTHS[1:]), itertools.cycle(WIDTHS), strict=False):
        angle = 2 * math.pi * np.arange(keys) / keys
        k = np.zeros((2, keys, depth))
        k[..., 0], k[..., -1] = np.cos(angle), np.sin(angle)
        seen = rng.integers(keys, size=(2, queries))
        q = 1e7 * np.take_along_axis(k, seen[..., None], axis=1)
        v = rng.standard_normal((2, keys, width)).astype(dtype)
        with use(name):
            y = nn.scaled_dot_product_attention(q.astype(dtype), k.astype(dtype), v)[0]
        np.testing.assert_array_equal(y, np.take_along_axis(v, seen[..., None], axis=1))


@pytest.mark.parametrize("name", ["numpy", "cython"])
@settings(max_examples=50)
@given(sizes=heads, gain=st.sampled_from([0.1, 1, 8]), seed=seeds)
def test_attention_rounds_within_bounds(name: str, sizes: Sizes, gain: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = [array.astype(np.float32) for array in drawn(rng, sizes, gain)]
    with use(name):
        actual, dy = results(nn.scaled_dot_product_attention, inputs, None, rng)
    exact = attention_and_its_rounding(*(array.astype(np.float64) for array in (*inputs, dy)))
    for have, want, bound, what in zip(actual, exact.value, exact.error, ("y", "dq", "dk", "dv"), strict=True):
        assert_within(have, want, bound, what)


@given(heads, seeds, implementations)
def test_the_bound_is_of_what_float64_computes(sizes: Sizes, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = drawn(rng, sizes)
    with use(name):
        actual, dy = results(nn.scaled_dot_product_attention, inputs, None, rng)
    exact = attention_and_its_rounding(*inputs, dy)
    for have, want, size in zip(actual, exact.value, exact.size, strict=True):
        assert_same(have, want, scale=float(size.max()))


# Extremes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize(("depth", "width"), [(1, 1), (1, 9), (20, 50)])
def test_the_twin_at_extremes(which: str, depth: int, width: int, dtype: Any) -> None:
    special, rng = extremes(dtype), np.random.default_rng(0)
    shapes = (15, 9, depth), (15, 53, depth), (15, 53, width), (15, 9, width)
    q, k, v, dy = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    # A score's roundings are of the sum of its absolute terms; the weights have them as relative errors, own and average.
    scores = float((np.abs(q) @ np.abs(transposed(k))).max()) / math.sqrt(depth)
    rounded = math.ceil(2 * (depth + 4) * scores) + 53 + 30
    for place in (0, 3, 8):
        inputs = {"q": q.copy(), "k": k.copy(), "v": v.copy()}
        inputs[which][:, place, 0] = special
        for n, value in enumerate(special):
            size = max(1.0, float(abs(value))) if np.isfinite(value) else 1.0
            head = [array[n] for array in inputs.values()]
            with np.errstate(over="ignore"):
                scale = min(50 * 16 * size, float(np.finfo(dtype).max))
            assert_twin_agrees_at_extremes(nn.scaled_dot_product_attention, head, dy[n], rounded, scale=scale)


@both
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e10, 1e15])
def test_huge_scores_do_not_overflow(size: float, dtype: Any) -> None:
    q = size * np.array([[1, 0], [0, 1], [1, 1]], dtype)
    k = size * np.array([[1, 0], [0, 1]], dtype)
    v = np.array([[1, 2, 3], [5, 6, 7]], dtype)
    with np.errstate(over="raise", invalid="raise"):
        y, vjp = nn.scaled_dot_product_attention(q, k, v)
        np.testing.assert_array_equal(y, [[1, 2, 3], [5, 6, 7], [3, 4, 5]])
        np.testing.assert_array_equal(nn.attention_weights(q, k), [[1, 0], [0, 1], [0.5, 0.5]])
        _, dk, dv = vjp(np.array([[1, 0, 0], [1, 0, 0], [1, 0, 0]], dtype))
    np.testing.assert_array_equal(dv, [[1.5, 0, 0], [1.5, 0, 0]])
    assert np.isfinite(dk).all()


@pytest.mark.parametrize("name", ["numpy", "cython"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_representable_does_not_overflow_on_the_way(dtype: Any, name: str) -> None:
    """Values whose sum is infinite, though their mean is one of them; scores that are finite once divided by sqrt(d)."""
    largest = float(np.finfo(dtype).max)
    with use(name):
        v = np.full((5, 3), largest / 2, dtype)
        y = nn.scaled_dot_product_attention(np.zeros((2, 4), dtype), np.zeros((5, 4), dtype), v)[0]
        np.testing.assert_allclose(y, np.full((2, 3), largest / 2, dtype), rtol=8 * float(np.finfo(dtype).eps))
        q, k = np.full((2, 64), math.sqrt(largest / 32), dtype), np.array([[1], [-1]], dtype) * math.sqrt(largest / 32)
        y = nn.scaled_dot_product_attention(q, np.repeat(k, 64, axis=1).astype(dtype), np.array([[1], [2]], dtype))[0]
        np.testing.assert_array_equal(y, [[1], [1]])


@both
@settings(max_examples=50)
@given(heads, seeds, st.sampled_from(["q", "k", "v"]))
def test_a_nan_spoils_what_it_reaches_and_no_more(sizes: Sizes, seed: int, which: str) -> None:
    """In a query its row; in a key every row of its head; in a value its column of its head."""
    rng = np.random.default_rng(seed)
    inputs = dict(zip("qkv", drawn(rng, sizes), strict=True))
    place = tuple(int(rng.integers(n)) for n in inputs[which].shape)
    inputs[which][place] = np.nan
    *head, row, column = place
    spoilt = np.zeros((*sizes.stack, sizes.queries, sizes.width), bool)
    spoilt[(*head, *{"q": (row,), "k": (), "v": (slice(None), column)}[which])] = True
    y = nn.scaled_dot_product_attention(*inputs.values())[0]
    np.testing.assert_array_equal(np.isnan(y), spoilt)


@both
def test_one_token_returns_its_value() -> None:
    q, k, v = np.array([[3.0, -1.0]]), np.array([[2.0, 5.0]]), np.array([[7.0, 8.0, 9.0]])
    y, vjp = nn.scaled_dot_product_attention(q, k, v)
    np.testing.assert_array_equal(y, v)
    for gradient, expected in zip(vjp(y), (0 * q, 0 * k, v), strict=True):
        np.testing.assert_array_equal(gradient, expected)


def test_a_hand_computed_attention() -> None:
    """Scores 0 and 2 ln 3 over sqrt(4): weights 1/4 and 3/4."""
    q, k = np.array([[1.0, 1, 1, 1]]), np.array([[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]])
    for name in ("numpy", "cython"):
        with use(name):
            assert_same(nn.attention_weights(q, k), np.array([[0.25, 0.75]]))
            y, vjp = nn.scaled_dot_product_attention(q, k, np.array([[4.0], [8.0]]))
            assert_same(y, np.array([[7.0]]))
            dq, dk, dv = vjp(np.array([[1.0]]))
            # ds = A (dA - 7) with dA = (4, 8): -3/4 and 3/4.
            assert_same(dq, np.array([[0.75 * 2 * math.log(3) / 2, 0, 0, 0]]))
            assert_same(dk, np.array([[-0.375] * 4, [0.375] * 4]))
            assert_same(dv, np.array([[0.25], [0.75]]))


# What runs, and in how much memory


def test_the_twin_is_what_runs() -> None:
    x = np.ones((2, 3))
    with mock.patch.object(reference.nn.attention_cython, "attend", side_effect=ZeroDivisionError):
        with use("numpy"):
            nn.scaled_dot_product_attention(x, x, x)
        with use("cython"), pytest.raises(ZeroDivisionError):
            nn.scaled_dot_product_attention(x, x, x)


def test_the_twin_holds_a_few_rows_of_the_weights_and_its_vjp_none() -> None:
    q, k, v = (np.ones((6, 1200, 16), np.float32) for _ in range(3))
    weights, seen = 6 * 1200 * 1200 * 4, []

    def measure() -> None:  # in a thread of its own, which has no workspace yet
        memory.release()
        tracemalloc.start()
        with use("cython"):
            kept = nn.scaled_dot_product_attention(q, k, v)
        seen.extend(tracemalloc.get_traced_memory())
        tracemalloc.stop()
        del kept

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    current, peak = seen
    assert current < weights / 4
    assert peak < weights / 4


@both
def test_the_weights_are_not_kept_for_the_vjp() -> None:
    q, k, v = (np.ones((3, 300, 8), np.float32) for _ in range(3))
    nn.scaled_dot_product_attention(q, k, v)  # this thread has its workspace now
    tracemalloc.start()
    kept = nn.scaled_dot_product_attention(q, k, v)
    current = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert current < 3 * 300 * 300 * 4 / 4
    del kept
