"""kernels/alignment: the scale and shift of every image, against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import host
from kernels.alignment import LeastSquares, least_squares
from reference import alignment
from tests.equality import LOGIC
from tests.guarded import LOW, U, guarded, untouched

KINDS = ["plain", "offset", "constant", "almost constant", "empty", "one pixel", "perfect"]


class Case(NamedTuple):
    """One call: H, W, what each image is, how the kernel is chosen, where arrays begin, how the GPU is filled and scheduled."""

    height: int
    width: int
    kinds: tuple[str, ...]
    rung: int = 2
    shift: int = 0  # elements that arrays begin after a multiple of 16 bytes
    pixels: int = 8  # of a thread
    blocks: int = 1024
    seed: int = 0


SIZES = st.one_of(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.sampled_from([(4, 8), (16, 16), (24, 32), (1, 1)]))
CASES = st.builds(
    lambda size, *rest: Case(*size, *rest),
    SIZES,
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
    st.sampled_from([1, 2, 2]),
    st.sampled_from([0, 0, 1]),
    st.sampled_from([1, 8]),
    st.sampled_from([1, 2, 1024]),
    st.integers(0, 2**32 - 1),
)
# Every kind of image on both rungs; one block that goes round several times; more parts than a warp has lanes.
CORNERS = [Case(24, 32, tuple(KINDS), rung) for rung in (1, 2)]
CORNERS += [
    Case(5, 7, tuple(KINDS)),
    Case(40, 67, ("plain",)),
    Case(64, 64, ("offset",)),
    Case(96, 112, ("plain",), shift=1, pixels=1),
]


def with_corners(test):
    for case in CORNERS:
        test = example(case=case)(test)
    return given(case=CASES)(test)


def draw(case: Case, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, target, mask (bool). What is not valid is NaN, infinite or huge."""
    rng = np.random.default_rng(case.seed)
    shape = (len(case.kinds), case.height, case.width)
    prediction, mask = rng.standard_normal(shape), rng.random(shape) < rng.choice([0.1, 0.6, 1.1])
    eps = float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)
    for b, kind in enumerate(case.kinds):
        first = np.unravel_index(int(rng.integers(case.height * case.width)), shape[1:])
        if kind == "offset":
            prediction[b] += rng.choice([-1000.0, 300.0])
        elif kind == "constant":
            prediction[b] = rng.standard_normal()
        elif kind == "almost constant":  # by less and more than what counts as constant, where the dtype can tell
            prediction[b] = 1 + eps * rng.choice([4, 5, 6]) * rng.integers(0, 3, shape[1:])
        elif kind == "empty":
            mask[b] = False
        elif kind == "one pixel":
            mask[b] = False
            mask[(b, *first)] = True
    target = 3 * rng.standard_normal(shape) + rng.choice([0.0, 50.0])
    for b, kind in enumerate(case.kinds):
        if kind == "perfect":
            target[b] = 2 * prediction[b] + 1
    prediction, target = prediction.astype(dtype), target.astype(dtype)
    for array in (prediction, target):
        array[~mask] = rng.choice(np.array([np.nan, np.inf, -np.inf, 60000.0]), int((~mask).sum())).astype(dtype)
    return prediction, target, mask


def run(case: Case, dtype: np.dtype, races: bool = False) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], LeastSquares]:
    prediction, target, mask = draw(case, dtype)
    kind = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    padded = np.full(mask.size + 64, True)  # a pixel too far on either side would count
    valid = padded[32 + case.shift :][: mask.size].reshape(mask.shape)
    valid[...] = mask
    images = len(case.kinds)
    out = LeastSquares(*(guarded(np.full(images, np.nan, kind)) for _ in range(2)), np.full(images + 8, True)[4:-4])
    with pytest.MonkeyPatch.context() as patch, host.schedule(case.seed, races):
        patch.setattr("kernels.alignment.PIXELS", case.pixels)
        patch.setattr("kernels.alignment.BLOCKS", case.blocks)
        given_ = guarded(prediction, case.shift), guarded(target, case.shift)
        result = least_squares(*given_, valid, out, rung=case.rung)
    assert all(array is given_array for array, given_array in zip(result, out, strict=True))
    assert untouched(out.scale) and untouched(out.shift) and out.singular.base[:4].all() and out.singular.base[-4:].all()
    assert given_[0].tobytes() == prediction.tobytes()
    np.testing.assert_array_equal(valid, mask)
    return (prediction, target, mask), result


def assert_fit(drawn: tuple[np.ndarray, np.ndarray, np.ndarray], fit: LeastSquares, kind: np.dtype) -> None:
    """Sums are float64: to LOGIC of the terms the formulas combine, the exact fit, rounded once to a float32 result.

    Which images are singular is the reference's verdict in the dtype of the result.
    """
    prediction, target, mask = drawn
    with np.errstate(over="ignore", invalid="ignore"):
        expected, _ = alignment.least_squares(prediction.astype(np.float64), target.astype(np.float64), mask)
        verdict, _ = alignment.least_squares(prediction.astype(kind), target.astype(kind), mask)
    np.testing.assert_array_equal(fit.singular, verdict.singular)
    rounding = 0.0 if kind == np.float64 else U
    for b in range(len(mask)):
        d, aim = (array[b][mask[b]].astype(np.float64) for array in (prediction, target))
        if d.size == 0:
            assert fit.scale[b] == fit.shift[b] == 0
            continue
        scale, shift = float(expected.scale[b]), float(expected.shift[b])
        if verdict.singular[b]:
            scale, shift = 0.0, float(aim.mean())
            assert fit.scale[b] == 0
        slope = float(aim.std() / d.std()) if not verdict.singular[b] else 0.0  # the scale of a perfect correlation
        allowed = LOGIC * slope + rounding * abs(scale)
        assert abs(float(fit.scale[b]) - scale) <= allowed, (b, fit.scale[b], scale)
        allowed = LOGIC * (slope * np.abs(d).max() + np.abs(aim).max()) + rounding * abs(shift)
        assert abs(float(fit.shift[b]) - shift) <= allowed, (b, fit.shift[b], shift)


@with_corners
def test_kernel_least_squares_is_the_references(case):
    drawn, fit = run(case, np.dtype(np.float64))
    assert_fit(drawn, fit, np.dtype(np.float64))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@with_corners
def test_kernel_least_squares_rounds_once(dtype, case):
    drawn, fit = run(case, dtype)
    assert fit.scale.dtype == fit.shift.dtype == np.float32
    assert_fit(drawn, fit, np.dtype(np.float32))


@settings(max_examples=8)
@given(case=CASES)
def test_kernel_least_squares_has_no_race_and_one_order_of_sums(case):
    _, fit = run(case, np.dtype(np.float32))
    drawn, watched = run(case, np.dtype(np.float32), races=True)
    for first, second in zip(fit, watched, strict=True):
        np.testing.assert_array_equal(first, second)
    for seed in (1, case.seed + 1):
        with host.schedule(seed):
            one, two = (least_squares(*drawn, rung=case.rung) for _ in range(2))
        with host.schedule(seed + 5):
            three = least_squares(*drawn, rung=case.rung)
        for arrays in zip(one, two, three, strict=True):
            np.testing.assert_array_equal(arrays[0], arrays[1])
            np.testing.assert_array_equal(arrays[0], arrays[2])


@pytest.mark.parametrize("rung", [1, 2])
def test_kernel_least_squares_survives_an_offset_that_the_plain_sums_do_not(rung):
    """Values from 2^40 to 2^40 + 1: the determinant from plain sums of squares would have no digit left in float64."""
    rng = np.random.default_rng(0)
    d = (2.0**40 + rng.integers(0, 2, (1, 30, 41))).astype(np.float64)
    d[0, 0, :2] = 2.0**40, 2.0**40 + 1
    fit = least_squares(d, 3 * (d - 2.0**40) + 5, np.ones(d.shape, bool), rung=rung)
    assert not fit.singular[0]
    np.testing.assert_allclose(fit.scale, 3, rtol=1e-13)
    naive = d.size * (d * d).sum() - d.sum() ** 2
    centred = d.size * ((d - d.mean()) ** 2).sum()
    assert abs(naive - centred) >= centred


@pytest.mark.parametrize("rung", [1, 2])
@pytest.mark.parametrize("size", [(1, 7), (20, 16), (30, 30)])
def test_kernel_least_squares_of_constants_leaves_nothing(rung, size):
    d, target = np.full((3, *size), 0.1, np.float32), np.full((3, *size), 0.7, np.float32)
    fit = least_squares(d, target, np.ones(d.shape, np.uint8), rung=rung)
    np.testing.assert_array_equal(fit.scale, np.zeros(3))
    np.testing.assert_array_equal(fit.shift, target[:, 0, 0])
    assert fit.singular.dtype == bool and fit.singular.all()


@pytest.mark.parametrize("rung", [1, 2])
@pytest.mark.parametrize("place", [0, 5, 299])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_kernel_least_squares_reports_what_is_not_finite(rung, value, place):
    """As the reference does: NaN is no constant and makes NaN; beside an infinite value nothing finite can be told apart."""
    rng = np.random.default_rng(place)
    d, target, mask = rng.standard_normal((2, 1, 300)), rng.standard_normal((2, 1, 300)), np.ones((2, 1, 300), bool)
    d[1, 0, place] = value
    with np.errstate(invalid="ignore"):
        expected, _ = alignment.least_squares(d, target, mask)
    fit = least_squares(d, target, mask, rung=rung)
    np.testing.assert_array_equal(fit.singular, expected.singular)
    np.testing.assert_allclose(fit.scale, expected.scale, rtol=1e-12)
    np.testing.assert_allclose(fit.shift, expected.shift, rtol=1e-12)


D, MASK = np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), bool)
BUFFER = np.zeros(100, np.float32)
READ_ONLY = np.ones(2, np.float32)
READ_ONLY.flags.writeable = False


def results(scale: object = None, shift: object = None, singular: object = None) -> LeastSquares:
    fresh = (np.ones(2, np.float32), np.ones(2, np.float32), np.ones(2, bool))
    return LeastSquares(*(f if g is None else g for f, g in zip(fresh, (scale, shift, singular), strict=True)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: least_squares([1.0], D, MASK), TypeError, "prediction is a builtins.list"),
        (lambda: least_squares(D, D.astype(np.float64), MASK), TypeError, "target has dtype float64 and prediction float32"),
        (lambda: least_squares(D, D, D), TypeError, "mask has dtype <f4 .float32., expected bool or uint8"),
        (lambda: least_squares(D, D, [True]), TypeError, "mask is a builtins.list"),
        (lambda: least_squares(D, D, MASK[:1]), ValueError, r"mask has shape \(1, 3, 4\) and prediction \(2, 3, 4\)"),
        (lambda: least_squares(D, D[:1], MASK), ValueError, r"target has shape \(1, 3, 4\) and prediction"),
        (lambda: least_squares(D[0], D[0], MASK[0]), ValueError, r"prediction has shape \(3, 4\), expected \(B, H, W\)"),
        (lambda: least_squares(D[:0], D[:0], MASK), ValueError, "prediction has shape .* empty"),
        (lambda: least_squares(D[..., ::2], D[..., ::2], MASK[..., ::2]), ValueError, "prediction has strides"),
        (lambda: least_squares(D, D, MASK, rung=3), ValueError, "rung is 3, expected a whole number from 1 to 2"),
        (
            lambda: least_squares(D, D, MASK, results(scale=np.ones(3, np.float32))),
            ValueError,
            r"scale has shape \(3,\), expected",
        ),
        (
            lambda: least_squares(D, D, MASK, results(shift=np.ones(2))),
            TypeError,
            "shift has dtype .*float64.*, expected float32",
        ),
        (lambda: least_squares(D, D, MASK, results(singular=np.ones(2, np.uint8))), TypeError, "singular has dtype .*uint8"),
        (lambda: least_squares(D, D, MASK, results(scale=READ_ONLY)), ValueError, "scale is read-only"),
        (
            lambda: least_squares(BUFFER[:24].reshape(2, 3, 4), D, MASK, results(scale=BUFFER[23:25])),
            ValueError,
            "scale overlaps prediction",
        ),
        (lambda: least_squares(D, D, MASK, results(scale=BUFFER[:2], shift=BUFFER[1:3])), ValueError, "shift overlaps scale"),
        (lambda: least_squares(D, D, MASK, results(singular=MASK.reshape(-1)[3:5])), ValueError, "singular overlaps mask"),
    ],
)
def test_kernel_least_squares_names_what_is_wrong(monkeypatch, call, error, words):
    def refuse(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr("kernels.alignment.launch_each", refuse)
    monkeypatch.setattr("kernels.alignment.launch", refuse)
    with pytest.raises(error, match=words):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("rung", [1, 2])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_least_squares_on_the_gpu_is_within_the_bound(dtype, rung):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")
    for case in [*CORNERS, Case(384, 384, ("plain", "offset", "constant"))]:
        drawn = draw(case, dtype)
        on_gpu = [cupy.asarray(array) for array in drawn]
        fits = [least_squares(*on_gpu, rung=rung) for _ in range(2)]
        assert_fit(drawn, LeastSquares(*map(cupy.asnumpy, fits[0])), np.dtype(np.float32))
        for first, second in zip(*fits, strict=True):
            np.testing.assert_array_equal(cupy.asnumpy(first), cupy.asnumpy(second))
