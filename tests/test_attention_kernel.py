"""kernels/attention: every rung against the reference in float64, and within derived bounds below; what its wrappers refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import host
from kernels.attention import attend, attend_backward
from kernels.source import Source
from reference import nn
from tests.equality import assert_same

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF = [np.dtype(np.float16), BFLOAT16]
LOW_RUNGS = [(dtype, rung) for dtype in (np.dtype(np.float32), *HALF) for rung in (1, 2, 3) if rung < 3 or dtype in HALF]
U = 2.0**-24  # the relative rounding error of float32


class Case(NamedTuple):
    """One call: (B, heads), queries, keys, depth; how large the scores are; which arrays lie askew; the order of threads."""

    stack: tuple[int, int]
    queries: int
    keys: int
    depth: int
    gain: float
    askew: int  # -1: all begin one element behind a multiple of 16 bytes; n: the n-th array alone does; 0: none
    seed: int

    def place(self, values: np.ndarray, n: int) -> np.ndarray:
        """A guarded copy of the call's n-th array: q 1, k 2, v 3, dout 4, out 5, lse 6, dq 7, dk 8, dv 9."""
        return guarded(values, int(self.askew in (-1, n)))

    def unwritten(self, shape: tuple[int, ...], dtype: object, n: int) -> np.ndarray:
        return self.place(np.full(shape, np.nan, dtype), n)


# Multiples of nothing; on both sides of the rows of a block (64, 32), of a tile (64, 32, 16) and of two of them, and one row.
TOKENS = st.one_of(st.integers(1, 70), st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 129]))
DEPTHS = st.one_of(st.integers(1, 128), st.sampled_from([8, 16, 48, 64, 64, 64, 72, 128]))
SEEDS = st.integers(0, 2**32 - 1)
GAINS = st.sampled_from([2.0**-12, 1.0, 6.0])  # the last: rows that look almost entirely at one token
ASKEW = st.one_of(st.sampled_from([0, 0, -1]), st.integers(1, 9))
CASES = st.builds(Case, st.sampled_from([(1, 1), (1, 2), (2, 1)]), TOKENS, TOKENS, DEPTHS, GAINS, ASKEW, SEEDS)
FEW = st.integers(1, 20)
SMALL = st.builds(Case, st.just((1, 2)), FEW, FEW, st.sampled_from([5, 24, 72]), st.just(1.0), st.sampled_from([0, -1]), SEEDS)
CORNERS = [
    Case((1, 1), 1, 1, 1, 1.0, 0, 0),
    Case((1, 2), 70, 130, 64, 1.0, 0, 1),
    Case((2, 1), 35, 66, 128, 1.0, 0, 2),
    Case((1, 1), 130, 3, 33, 1.0, -1, 3),
    *(Case((1, 1), 3, 2, 8, 1.0, n, n) for n in range(1, 10)),
]


def with_corners(test):
    for case in CORNERS:
        test = example(case)(test)
    return settings(max_examples=15)(given(CASES)(test))


def guarded(values: np.ndarray, shift: int = 0) -> np.ndarray:
    """A copy between NaNs, `shift` elements behind a multiple of 16 bytes: `untouched` finds a write, and a read spoils."""
    padded = np.full(values.size + 128 + shift, np.nan, values.dtype)
    inner = padded[64 + shift : 64 + shift + values.size].reshape(values.shape)
    inner[...] = values
    return inner


def untouched(*arrays: np.ndarray) -> bool:
    """Whether all around these arrays is still NaN, and nothing in them."""
    for inner in arrays:
        outer = inner.base.astype(float)
        if np.isnan(outer).sum() != outer.size - inner.size or np.isnan(inner.astype(float)).any():
            return False
    return True


class Exact(NamedTuple):
    """Attention and its gradients in float64, of inputs as they are, and the sums of the absolute terms that cancel in each."""

    out: np.ndarray
    lse: np.ndarray
    gradients: tuple[np.ndarray, np.ndarray, np.ndarray]
    sizes: list[float]  # of out, dq, dk and dv


def draw(case: Case, dtype: np.dtype) -> list[np.ndarray]:
    """q, k, v and dout."""
    rng = np.random.default_rng(case.seed)
    queries, keys = (*case.stack, case.queries, case.depth), (*case.stack, case.keys, case.depth)
    drawn = [rng.standard_normal(shape) for shape in (queries, keys, keys, queries)]
    drawn[0] *= case.gain
    return [case.place(array.astype(dtype), n) for n, array in enumerate(drawn, 1)]


def transposed(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray) -> Exact:
    q, k, v, dout = (array.astype(np.float64) for array in (q, k, v, dout))
    out, vjp = nn.scaled_dot_product_attention(q, k, v)
    scale = 1 / math.sqrt(q.shape[-1])
    s = q @ transposed(k) * scale
    top = s.max(axis=-1, keepdims=True)
    lse = (top + np.log(np.exp(s - top).sum(axis=-1, keepdims=True)))[..., 0]
    a = nn.attention_weights(q, k)
    ds = a * (np.abs(dout) @ np.abs(transposed(v)) + (np.abs(dout) * np.abs(out)).sum(-1, keepdims=True)) * scale
    sizes = [a @ np.abs(v), ds @ np.abs(k), transposed(ds) @ np.abs(q), transposed(a) @ np.abs(dout)]
    return Exact(out, lse, vjp(dout), [float(size.max()) for size in sizes])


# Float64: the formula


@pytest.mark.parametrize("rung", [1, 2])
@with_corners
def test_kernel_attend_is_the_reference(rung, case):
    q, k, v, dout = draw(case, np.dtype(np.float64))
    expected = exact(q, k, v, dout)
    out, lse = case.unwritten(q.shape, q.dtype, 5), case.unwritten(q.shape[:-1], q.dtype, 6)
    with host.schedule(case.seed):
        returned = attend(q, k, v, out, lse, rung)
    assert returned[0] is out and returned[1] is lse
    assert_same(out, expected.out, scale=expected.sizes[0])
    assert_same(lse, expected.lse, scale=max(1.0, float(np.abs(expected.lse).max())))
    assert untouched(q, k, v, out, lse)
    for returned_again, before in zip(attend(q, k, v, rung=rung), (out, lse), strict=True):
        assert_same(returned_again, before, rtol=0, what="under another order of threads")


@pytest.mark.parametrize("rung", [1, 2])
@with_corners
def test_kernel_attend_backward_is_the_vjp(rung, case):
    q, k, v, dout = draw(case, np.dtype(np.float64))
    expected = exact(q, k, v, dout)
    out, lse = case.place(expected.out, 5), case.place(expected.lse, 6)
    gradients = tuple(case.unwritten(x.shape, x.dtype, n) for n, x in enumerate((q, k, v), 7))
    with host.schedule(case.seed):
        assert attend_backward(q, k, v, out, lse, dout, gradients, rung) is gradients
    for name, actual, of_it, size in zip(("dq", "dk", "dv"), gradients, expected.gradients, expected.sizes[1:], strict=True):
        assert_same(actual, of_it, scale=size, what=name)
    assert untouched(q, k, v, dout, out, lse, *gradients)
    for again, before in zip(attend_backward(q, k, v, out, lse, dout, rung=rung), gradients, strict=True):
        assert_same(again, before, rtol=0, what="under another order of threads")


# Float32, float16, bfloat16: bounds of the first order


class Rounding(NamedTuple):
    """How a rung rounds, relative to what it rounds."""

    unit: float  # to the dtype of the arrays
    least: float  # half the smallest number of that dtype
    weight: float  # what is given to the second product: the dtype's unit in rung 3, 0 else
    weight_least: float
    tensor_cores: bool

    def total(self, terms: int) -> float:
        """A sum of products. A tensor core aligns 16 exact ones and the sum so far to the largest, and cuts off what is smaller
        than its last place, 2 U: so, of the sum of the absolute terms, at most 17 * 2 U for every 16 terms."""
        return 34 * U * -(-terms // 16) if self.tensor_cores else (terms + 1) * U


def rounding(dtype: np.dtype, rung: int) -> Rounding:
    kind = ml_dtypes.finfo(dtype)
    unit, least = float(kind.eps) / 2, float(kind.smallest_subnormal) / 2
    return Rounding(unit, least, unit if rung == 3 else 0, least if rung == 3 else 0, rung == 3)


def assert_within(actual: np.ndarray, expected: np.ndarray, allowed: np.ndarray, by: Rounding, what: str) -> None:
    """The last rounding added, that of the result to its dtype."""
    allowed = allowed + np.maximum(by.unit * (np.abs(expected) + allowed), by.least)
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{what}, {actual.dtype}: errs by {(error / allowed).max():.3g} times the bound"


def assert_forward(q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, lse: np.ndarray, rung: int) -> None:
    """Every rounding of softmax(s) v.

    An error of a score is one of exp's exponent, and so a relative one of its weight; a row's largest score, which is subtracted
    from all, cancels in the quotient, errors included. Going from one tile to the next multiplies by an exp more. exp errs by 6 U
    at most.
    """
    by = rounding(out.dtype, rung)
    q, k, v = (array.astype(np.float64) for array in (q, k, v))
    scale, keys = 1 / math.sqrt(q.shape[-1]), k.shape[-2]
    s = q @ transposed(k) * scale
    least = s.max(axis=-1, keepdims=True) - s
    a = nn.attention_weights(q, k)
    # The sum of a score, its scale; of the exponent: the subtraction and, where it comes later, the scale with log2(e).
    score = (by.total(q.shape[-1]) + 3 * U) * scale * (np.abs(q) @ np.abs(transposed(k)))
    weight = score + 6 * U * least + 6 * U + 7 * U * -(-keys // 32)
    # The weights' sum has `keys` additions and as many roundings by the corrections; then the quotient and its product.
    of_total = (a * weight).sum(axis=-1, keepdims=True) + (keys + -(-keys // 32)) * U
    a_error = a * (weight + of_total + by.weight + 3 * U) + by.weight_least
    size = np.abs(v)
    assert_within(out, a @ v, a_error @ size + by.total(keys) * (a @ size), by, "out")
    top = s.max(axis=-1)
    log_total = np.log(np.exp(-least).sum(axis=-1))
    lse_error = of_total[..., 0] + score.max(axis=-1) + 4 * U * (log_total + np.abs(top)) + U * np.abs(top + log_total)
    assert_within(lse, top + log_total, lse_error, rounding(np.dtype(np.float32), 1), "lse")


def assert_backward(arrays: tuple[np.ndarray, ...], gradients: tuple[np.ndarray, ...], rung: int) -> None:
    """Every rounding of the gradients, of q, k, v and dout, and of out and lse, here in float64, as rounded to their dtypes.

    Rung 3 rounds the weights and the scores' gradients once more, to the dtype.
    """
    by = rounding(arrays[0].dtype, rung)
    q, k, v, dout, out, lse = (array.astype(np.float64) for array in arrays)
    scale, depth = 1 / math.sqrt(q.shape[-1]), q.shape[-1]
    s, row_lse = q @ transposed(k) * scale, lse[..., None]
    a = nn.attention_weights(q, k)
    score = (by.total(depth) + 3 * U) * scale * (np.abs(q) @ np.abs(transposed(k)))
    a_error = a * (score + 3 * U * (np.abs(s) + np.abs(row_lse)) + U * np.abs(row_lse) + 6 * U)

    dweight = dout @ transposed(v)
    dweight_error = by.total(depth) * (np.abs(dout) @ np.abs(transposed(v)))
    delta = (dout * out).sum(axis=-1, keepdims=True)
    out_error = np.maximum(by.unit * np.abs(out), by.least)  # as it was given
    delta_error = (np.abs(dout) * ((depth + 4) * U * np.abs(out) + out_error)).sum(axis=-1, keepdims=True)
    ds = a * (dweight - delta)
    ds_error = a_error * np.abs(dweight - delta) + a * (dweight_error + delta_error) + 3 * U * np.abs(ds)
    ds_error = ds_error + np.maximum(by.weight * (np.abs(ds) + ds_error), by.weight_least)
    a_error = a_error + np.maximum(by.weight * a, by.weight_least)

    def bound(error: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        size = np.abs(values)
        return error @ size + (by.total(weights.shape[-1]) + 2 * U) * (np.abs(weights) @ size)

    dq, dk, dv = gradients
    assert_within(dq, scale * (ds @ k), scale * bound(ds_error, ds, k), by, "dq")
    assert_within(dk, scale * (transposed(ds) @ q), scale * bound(transposed(ds_error), transposed(ds), q), by, "dk")
    assert_within(dv, transposed(a) @ dout, bound(transposed(a_error), transposed(a), dout), by, "dv")


@pytest.mark.parametrize(("dtype", "rung"), LOW_RUNGS, ids=str)
@with_corners
def test_kernel_attend_rounds_as_its_dtype_must(dtype, rung, case):
    q, k, v, _ = draw(case, dtype)
    out, lse = case.unwritten(q.shape, dtype, 5), case.unwritten(q.shape[:-1], np.float32, 6)
    with host.schedule(case.seed):
        attend(q, k, v, out, lse, rung)
    assert_forward(q, k, v, out, lse, rung)
    assert untouched(q, k, v, out, lse)
    again = attend(q, k, v, rung=rung)
    assert again[0].tobytes() == out.tobytes() and again[1].tobytes() == lse.tobytes(), "under another order of threads"


@pytest.mark.parametrize(("dtype", "rung"), LOW_RUNGS, ids=str)
@with_corners
def test_kernel_attend_backward_rounds_as_its_dtype_must(dtype, rung, case):
    q, k, v, dout = draw(case, dtype)
    expected = exact(q, k, v, dout)
    out, lse = case.place(expected.out.astype(dtype), 5), case.place(expected.lse.astype(np.float32), 6)
    gradients = tuple(case.unwritten(x.shape, dtype, n) for n, x in enumerate((q, k, v), 7))
    with host.schedule(case.seed):
        attend_backward(q, k, v, out, lse, dout, gradients, rung)
    assert_backward((q, k, v, dout, expected.out, expected.lse), gradients, rung)
    assert untouched(q, k, v, dout, out, lse, *gradients)
    again = attend_backward(q, k, v, out, lse, dout, rung=rung)
    assert [x.tobytes() for x in again] == [x.tobytes() for x in gradients], "under another order of threads"


@pytest.mark.parametrize("rung", [1, 2, 3])
@settings(max_examples=4)
@given(SMALL)
@example(Case((1, 1), 35, 36, 72, 1.0, 0, 5))  # three tiles of the keys, and of the queries
def test_kernel_attention_has_no_race(rung, case):
    dtype = HALF[case.seed % 2] if rung == 3 else np.dtype(np.float32)
    q, k, v, dout = draw(case, dtype)
    with host.schedule(case.seed, races=True):
        out, lse = attend(q, k, v, rung=rung)
        attend_backward(q, k, v, out, lse, dout, rung=rung)
    assert_forward(q, k, v, out, lse, rung)


# What the numbers may be


@pytest.mark.parametrize("rung", [1, 2, 3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_kernel_attention_keeps_large_scores_and_nan_where_they_are(rung, sign):
    """Scores near -2000 or 2000, whose exponentials no float holds; and a NaN stays in the rows of the query that has it."""
    dtype = np.dtype(np.float16) if rung == 3 else np.dtype(np.float32)
    q, k, v, dout = draw(Case((1, 1), 40, 70, 16, 1.0, 0, 0), dtype)
    q[...], k[...] = 20, sign * 25 + k / 64
    expected = exact(q, k, v, dout)
    assert (sign * expected.lse > 1900).all()
    out, lse = attend(q, k, v, rung=rung)
    assert_forward(q, k, v, out, lse, rung)
    gradients = attend_backward(q, k, v, expected.out.astype(dtype), expected.lse.astype(np.float32), dout, rung=rung)
    assert_backward((q, k, v, dout, expected.out, expected.lse), gradients, rung)
    q[0, 0, 33, 2] = np.nan
    spoilt, spoilt_lse = attend(q, k, v, rung=rung)
    nan = np.isnan(spoilt.astype(float)).all(axis=-1)
    assert nan[0, 0, 33] and np.isnan(spoilt_lse[0, 0, 33])
    np.testing.assert_array_equal(np.delete(spoilt, 33, axis=2), np.delete(out, 33, axis=2))


def test_kernel_rung_is_by_default_the_fastest_of_the_dtype():
    for dtype, rung in ((np.float64, 2), (np.float32, 2), (np.float16, 3), (BFLOAT16, 3)):
        q, k, v, dout = draw(Case((1, 1), 20, 40, 24, 1.0, 0, 4), np.dtype(dtype))
        out, lse = attend(q, k, v)
        chosen = attend(q, k, v, rung=rung)
        others = attend(q, k, v, rung=1)
        assert out.tobytes() == chosen[0].tobytes() and lse.tobytes() == chosen[1].tobytes()
        assert lse.tobytes() != others[1].tobytes() or out.tobytes() != others[0].tobytes()
        gradients = attend_backward(q, k, v, out, lse, dout)
        for default, named in zip(gradients, attend_backward(q, k, v, out, lse, dout, rung=rung), strict=True):
            assert default.tobytes() == named.tobytes()


# What feeds the tensor cores


PLANTED = Source(
    str(Path(__file__).parent / "planted" / "tensor_cores.cu"),
    ("multiply<{}>", "load<{}, false>", "load<{}, true>", *(f"reverse_copies<{{}}, {mistake}>" for mistake in range(4))),
    half=("multiply<{}>", "load<{}, false>", "load<{}, true>"),
)
WARP = ((1, 1, 1), (32, 1, 1))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_kernel_tensor_cores_take_the_fragments_of_the_ptx_isa(dtype, seed):
    """PTX ISA, matrix fragments for mma.m16n8k16: a's rows are g for i < 2 and 4 <= i < 6, else g + 8; and so on. Exact."""
    rng = np.random.default_rng(seed)
    left, right = rng.integers(-8, 9, (16, 16)).astype(float), rng.integers(-8, 9, (16, 8)).astype(float)
    start = rng.integers(-100, 100, (16, 8)).astype(np.float32)
    group, thread = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4
    i = np.arange(8)
    a = left[np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8), thread * 2 + (i & 1) + np.where(i >= 4, 8, 0)]
    i = i[:4]
    b = right[thread * 2 + (i & 1) + np.where(i >= 2, 8, 0), group + 0 * i]
    place = np.where(i < 2, group, group + 8), thread * 2 + (i & 1)
    c = guarded(start[place])
    with host.schedule(seed):
        host.launch(PLANTED, "multiply<{}>", dtype.name, *WARP, (guarded(a.astype(dtype)), guarded(b.astype(dtype)), c))
    np.testing.assert_array_equal(c, (left @ right + start)[place])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_kernel_ldmatrix_hands_out_rows_and_columns(dtype, swap):
    """Lane l receives of every matrix, row l / 4, columns 2 (l % 4) and the next; of the transposed matrix where asked for."""
    matrices = np.arange(256).astype(np.uint16).view(dtype).reshape(4, 8, 8)
    out = np.zeros((32, 4, 2), dtype)
    with host.schedule(1):
        template = f"load<{{}}, {str(swap).lower()}>"
        host.launch(PLANTED, template, dtype.name, *WARP, (matrices, out), shared=matrices.nbytes)
    lanes = np.arange(32)
    expected = (transposed(matrices) if swap else matrices).view(np.uint16)[:, lanes // 4]  # (4, lanes, 8)
    pairs = np.stack([expected[:, lanes, lanes % 4 * 2], expected[:, lanes, lanes % 4 * 2 + 1]], axis=-1)
    np.testing.assert_array_equal(out.view(np.uint16), pairs.swapaxes(0, 1))


def reverse_copies(mistake: int) -> bool:
    x = np.arange(1, 64 * 8 + 1, dtype=np.float16).reshape(64, 8)
    out = np.zeros_like(x)
    host.launch(PLANTED, f"reverse_copies<{{}}, {mistake}>", "float16", (1, 1, 1), (64, 1, 1), (x, out), shared=x.nbytes)
    x[2::3] = 0
    return bool((out == x[::-1]).all())


@pytest.mark.parametrize("seed", range(3))
def test_kernel_copies_that_are_not_waited_for_are_seen(seed):
    with host.schedule(seed):
        assert reverse_copies(0)
        assert not reverse_copies(1)
    with host.schedule(seed, races=True):
        assert reverse_copies(0)
        for mistake in (1, 2, 3):
            with pytest.raises(RuntimeError, match=r"race: thread"):
                reverse_copies(mistake)


# Machine code


# What the wrappers refuse


def ones(shape=(2, 3, 5, 8), dtype: object = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


KEYS = (2, 3, 7, 8)
BUFFER = np.zeros(2000, np.float32)
READ_ONLY = ones()
READ_ONLY.flags.writeable = False


def forward(q=None, k=None, v=None, **options):
    q, k, v = ones() if q is None else q, ones(KEYS) if k is None else k, ones(KEYS) if v is None else v
    return attend(q, k, v, **options)


def backward(**changed):
    arrays = {"q": ones(), "k": ones(KEYS), "v": ones(KEYS), "out": ones(), "lse": ones((2, 3, 5)), "dout": ones()}
    return attend_backward(**{**arrays, **changed})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: forward([[1.0]]), TypeError, "q is a builtins.list, expected a NumPy or a CuPy array"),
        (lambda: forward(ones(dtype=np.int32)), TypeError, "q has dtype .*int32.*, expected one of float32"),
        (lambda: forward(k=ones(KEYS, np.float16)), TypeError, "k has dtype float16 and q float32, expected the same"),
        (lambda: forward(ones((3, 5, 8))), ValueError, r"q has shape \(3, 5, 8\), expected \(B, heads, tokens, d\)"),
        (lambda: forward(v=ones((6, 7, 8))), ValueError, r"v has shape \(6, 7, 8\), expected \(B, heads, tokens, d\)"),
        (lambda: forward(ones((2, 3, 5, 129))), ValueError, r"q has shape \(2, 3, 5, 129\), expected d of at most 128"),
        (
            lambda: forward(k=ones((2, 3, 7, 9))),
            ValueError,
            r"k has shape \(2, 3, 7, 9\) and q \(2, 3, 5, 8\), expected the same",
        ),
        (lambda: forward(k=ones((1, 3, 7, 8))), ValueError, r"k has shape \(1, 3, 7, 8\) and q"),
        (
            lambda: forward(v=ones((2, 3, 6, 8))),
            ValueError,
            r"v has shape \(2, 3, 6, 8\) and k \(2, 3, 7, 8\), expected the same",
        ),
        (lambda: forward(k=ones((2, 3, 0, 8))), ValueError, r"k has shape \(2, 3, 0, 8\), which is empty"),
        (lambda: forward(ones((2, 3, 8, 5)).swapaxes(2, 3)), ValueError, "q has strides .* C-contiguous"),
        (lambda: forward(np.broadcast_to(np.float32(0), (1, 2**10, 2**15, 64))), ValueError, r"q has shape .* fewer than 2\^31"),
        (
            lambda: forward(np.frombuffer(b"\0" * 961, np.uint8)[1:].view(np.float32).reshape(2, 3, 5, 8)),
            ValueError,
            "q begins at an address that is no multiple of its 4-byte",
        ),
        (lambda: forward(rung=0), ValueError, "rung is 0, expected 1, 2 or 3"),
        (lambda: forward(rung=True), ValueError, "rung is True, expected 1, 2 or 3"),
        (lambda: forward(rung="2"), ValueError, "rung is '2', expected"),
        (lambda: forward(rung=3), ValueError, "rung is 3, tensor cores, for float16 and bfloat16, and q has dtype float32"),
        (lambda: forward(out=ones(KEYS)), ValueError, r"out has shape \(2, 3, 7, 8\), expected \(2, 3, 5, 8\)"),
        (lambda: forward(out=READ_ONLY), ValueError, "out is read-only"),
        (lambda: forward(out=ones(dtype=np.float16)), TypeError, "out has dtype float16"),
        (
            lambda: forward(BUFFER[:240].reshape(2, 3, 5, 8), out=BUFFER[239:479].reshape(2, 3, 5, 8)),
            ValueError,
            "out overlaps q in memory",
        ),
        (lambda: forward(lse=ones((2, 3, 5, 1))), ValueError, r"lse has shape \(2, 3, 5, 1\), expected \(2, 3, 5\)"),
        (lambda: forward(lse=ones((2, 3, 5), np.float64)), TypeError, "lse has dtype float64, expected float32 for q of float32"),
        (
            lambda: forward(*(ones(s, np.float16) for s in (KEYS, KEYS, KEYS)), lse=ones((2, 3, 7), np.float16)),
            TypeError,
            "lse has dtype float16, expected float32 for q of float16",
        ),
        (lambda: forward(lse=np.ones((2, 3, 10), np.float32)[..., ::2]), ValueError, "lse has strides"),
        (lambda: forward(lse=READ_ONLY.ravel()[:30].reshape(2, 3, 5)), ValueError, "lse is read-only"),
        (
            lambda: forward(v=BUFFER[:336].reshape(KEYS), lse=BUFFER[330:360].reshape(2, 3, 5)),
            ValueError,
            "lse overlaps v in memory",
        ),
        (
            lambda: forward(out=BUFFER[:240].reshape(2, 3, 5, 8), lse=BUFFER[230:260].reshape(2, 3, 5)),
            ValueError,
            "lse overlaps out in memory",
        ),
        (lambda: backward(out=ones(KEYS)), ValueError, r"out has shape \(2, 3, 7, 8\), expected \(2, 3, 5, 8\), that of q"),
        (lambda: backward(dout=ones((2, 3, 5, 4))), ValueError, r"dout has shape \(2, 3, 5, 4\), expected"),
        (lambda: backward(dout=ones(dtype=np.float16)), TypeError, "dout has dtype float16 and q float32"),
        (lambda: backward(lse=ones((2, 3, 4))), ValueError, r"lse has shape \(2, 3, 4\), expected \(2, 3, 5\)"),
        (lambda: backward(lse=ones((2, 3, 5), np.float16)), TypeError, "lse has dtype float16, expected float32"),
        (lambda: backward(rung=4), ValueError, "rung is 4, expected 1, 2 or 3"),
        (lambda: backward(gradients=(ones(), ones(KEYS))), TypeError, "gradients is a tuple, expected a tuple of three arrays"),
        (
            lambda: backward(gradients=(ones(), ones(KEYS), ones())),
            ValueError,
            r"dv has shape \(2, 3, 5, 8\), expected \(2, 3, 7, 8\)",
        ),
        (lambda: backward(gradients=(READ_ONLY, ones(KEYS), ones(KEYS))), ValueError, "dq is read-only"),
        (
            lambda: backward(gradients=(ones(), *[BUFFER[:336].reshape(KEYS)] * 2)),
            ValueError,
            "dv overlaps dk in memory, expected arrays apart",
        ),
        (
            lambda: backward(
                lse=BUFFER[:30].reshape(2, 3, 5), gradients=(BUFFER[29:269].reshape(2, 3, 5, 8), ones(KEYS), ones(KEYS))
            ),
            ValueError,
            "dq overlaps lse in memory",
        ),
    ],
)
def test_kernel_attention_names_what_is_wrong(monkeypatch, call, error, words):
    def refuse(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr("kernels.attention.launch", refuse)
    monkeypatch.setattr("kernels.attention.launch_each", refuse)
    with pytest.raises(error, match=words):
        call()


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")


def test_kernel_attention_names_the_device_that_differs(cupy):
    def on_gpu(device: int, begin: int, shape=(2, 3, 5, 8)):
        memory = cupy.cuda.UnownedMemory(begin, 2**20, None, device)  # an address, not memory: no check may follow it
        return cupy.ndarray(shape, "float32", cupy.cuda.MemoryPointer(memory, 0))

    q, k, v, out = (on_gpu(0, n * 2**20) for n in (1, 2, 3, 4))
    with pytest.raises(ValueError, match="v is on the host and q on GPU 0, expected one place"):
        attend(q, k, ones(), rung=2)
    with pytest.raises(ValueError, match="lse is on the host and q on GPU 0, expected one place"):
        attend(q, k, v, out, ones((2, 3, 5)), rung=2)
    with pytest.raises(ValueError, match="lse is on GPU 1 and q on GPU 0"):
        attend(q, k, v, out, on_gpu(1, 2**23, (2, 3, 5)), rung=2)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "rung"), LOW_RUNGS, ids=str)
def test_kernel_attention_on_the_gpu_is_within_the_bound(cupy, dtype, rung):
    """On a stream of the caller's, at the sizes of a ViT and at odd ones; twice the same, to the last bit."""
    if dtype == BFLOAT16 and rung == 3 and int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("tensor cores multiply bfloat16 from sm_80 on")
    for case in [*CORNERS, Case((1, 3), 577, 577, 64, 1.0, 0, 6), Case((2, 2), 130, 201, 96, 6.0, 1, 7)]:
        q, k, v, dout = draw(case, dtype)
        expected = exact(q, k, v, dout)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            on_gpu = [cupy.asarray(x) for x in (q, k, v)]
            out, lse = attend(*on_gpu, rung=rung)
            given = cupy.asarray(expected.out.astype(dtype)), cupy.asarray(expected.lse.astype(np.float32)), cupy.asarray(dout)
            gradients = attend_backward(*on_gpu, *given, rung=rung)
            again = (*attend(*on_gpu, rung=rung), *attend_backward(*on_gpu, *given, rung=rung))
            stream.synchronize()
        assert_forward(q, k, v, cupy.asnumpy(out), cupy.asnumpy(lse), rung)
        assert_backward((q, k, v, dout, expected.out, expected.lse), tuple(cupy.asnumpy(x) for x in gradients), rung)
        for first, second in zip((out, lse, *gradients), again, strict=True):
            assert cupy.asnumpy(first).tobytes() == cupy.asnumpy(second).tobytes()
