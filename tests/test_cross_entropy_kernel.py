"""kernels/cross_entropy: both passes against the reference and torch in float64, within bounds in less; and what is refused."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import host
from kernels.cross_entropy import CrossEntropy, cross_entropy, cross_entropy_backward
from reference import nn
from reference.losses import segmentation_loss
from tests.equality import assert_same
from tests.test_kernels_host import sanitized

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOW = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
U = 2.0**-24  # the relative rounding error of float32
SECOND_ORDER = 1.01  # the bounds are of first order in U; what that leaves out is far less than a hundredth
RUNGS = pytest.mark.parametrize("rung", [1, 2])
ONE = np.ones(1, np.float32)


class Case(NamedTuple):
    shape: tuple[int, ...]  # batch, classes, height, width, out_height, out_width
    dtype: str = "uint8"  # of the labels
    ignore_index: int = 255
    ignored: float = 0.3  # share of the pixels
    size: float = 3.0  # of the logits
    seed: int = 0  # of the numbers and of the order of threads


CASES = st.builds(
    Case,
    st.tuples(st.integers(1, 2), st.integers(1, 20), *[st.integers(1, 11)] * 2, st.integers(1, 17), st.integers(1, 40)),
    st.sampled_from(["uint8", "int32", "int64"]),
    st.sampled_from([255, 0]),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([1.0, 30.0]),
    st.integers(0, 2**32 - 1),
)
CORNERS = [
    Case((1, 1, 1, 1, 1, 1)),
    Case((1, 1, 1, 1, 1, 1), ignored=1.0),
    Case((2, 3, 2, 3, 5, 7), "int32", -1, ignored=1.0),
    Case((1, 37, 3, 20, 7, 75), "int64", -7),  # three tiles across, a walk's classes not four, a block's not sixteen
    Case((1, 3, 1, 1, 6, 70)),  # one cell, read by every pixel
    Case((1, 2, 1, 2, 3, 100)),  # more than 32 columns read each cell
    Case((2, 2, 19, 2, 40, 3)),  # three tiles down
    Case((1, 3, 20, 40, 3, 5)),  # cells that nobody reads
    Case((1, 3, 9, 70, 9, 70)),  # equal sizes: a pixel reads one cell
    Case((1, 2, 6, 5, 1, 1), "int32"),
    Case((1, 2, 70, 3, 101, 3), size=30.0),
]


def with_corners(test):
    for case in CORNERS:
        test = example(case=case)(test)
    return given(case=CASES)(test)


def guarded(values: np.ndarray) -> np.ndarray:
    """A copy between NaNs, or labels that are refused: a read beyond either end is seen in the result, a write by `untouched`."""
    guard = 251 if values.dtype.kind in "iu" else np.nan
    padded = np.full(values.size + 128, guard, values.dtype)
    inner = padded[64:-64].reshape(values.shape)
    inner[...] = values
    return inner


def untouched(inner: np.ndarray) -> bool:
    return bool(np.isnan(inner.base[:64].astype(float)).all() and np.isnan(inner.base[-64:].astype(float)).all())


def draw(case: Case, dtype: object) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels, guarded."""
    batch, classes, height, width, *size = case.shape
    rng = np.random.default_rng(case.seed)
    logits = case.size * rng.standard_normal((batch, classes, height, width))
    labels = rng.integers(0, classes, (batch, *size))
    labels[rng.random(labels.shape) < case.ignored] = case.ignore_index
    return guarded(logits.astype(dtype)), guarded(labels.astype(case.dtype))


def output(like: np.ndarray, dtype: object = None) -> np.ndarray:
    return guarded(np.full(like.shape, np.nan, dtype or like.dtype))


def resized(logits: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    wide = torch.from_numpy(logits.astype(np.float64))
    return torch.nn.functional.interpolate(wide, labels.shape[1:], mode="bilinear", align_corners=True)


def adjoint(gradient: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Of resizing to gradient's size from `size`."""
    x = torch.zeros((*gradient.shape[:2], *size), dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.interpolate(x, gradient.shape[2:], mode="bilinear", align_corners=True)
    (dx,) = torch.autograd.grad(y, x, torch.from_numpy(gradient))
    return dx.numpy()


class Exact(NamedTuple):
    """What a call must give, by torch in float64, and how far float32 may be from it at each pixel."""

    counted: np.ndarray  # (B, H, W), whether a pixel counts
    losses: np.ndarray  # (B, H, W)
    loss_error: np.ndarray
    log_sum_exp: np.ndarray  # (B, H, W), 0 where a pixel does not count
    log_sum_exp_error: np.ndarray
    gradient: np.ndarray  # (B, K, H, W), of the sum of the losses in the resized logits
    gradient_error: np.ndarray
    cancelling: np.ndarray  # (B, K, H, W), the absolute terms that cancel in it


def exactly(case: Case, logits: np.ndarray, labels: np.ndarray) -> Exact:
    """To first order.

    A resized logit: 2 products, 2 sums and 3 roundings of weights, so 7 U of the resized absolute logits. The sum of
    exponentials: a term meets one factor and one sum for each class and for each of 8 warps, a factor being a product (1 U) of
    an exponential (2 + 1.173 x units in the last place, each 2 U at most, on a GPU; less on the host) of a rounded difference x;
    the x of all its factors add up to its distance from the largest. The logarithm: one unit in the last place, 2 U.
    """
    z, magnitude = resized(logits, labels), resized(np.abs(logits.astype(float)), labels).numpy()
    counted = labels != case.ignore_index
    chosen = np.where(counted, labels, 0).astype(np.int64)
    onehot = np.moveaxis(np.eye(z.shape[1])[chosen], -1, 1)
    log_sum_exp, largest, z = (t.numpy() for t in (torch.logsumexp(z, 1), z.amax(1), z))
    probability = np.exp(z - log_sum_exp[:, None])
    of_label = (z * onehot).sum(1)

    distance = (probability * (largest[:, None] - z)).sum(1)
    logarithm = log_sum_exp - largest
    sum_error = U * (6 * (z.shape[1] + 8) + 3.35 * distance + 2 * logarithm)
    resize_error = 7 * U * magnitude.max(1)
    loss_error = 2 * resize_error + sum_error + 2 * U * (largest - of_label) + U * logarithm
    log_sum_exp_error = resize_error + sum_error + U * np.abs(log_sum_exp)
    difference = (log_sum_exp[:, None] - z) * U
    relative = resize_error[:, None] + log_sum_exp_error[:, None] + 3.35 * difference + 4 * U
    gradient = probability - onehot
    gradient_error = probability * relative + U * np.abs(gradient) + 1e-37  # exponentials may vanish
    at = counted[:, None]
    return Exact(
        counted,
        counted * (log_sum_exp - of_label),
        SECOND_ORDER * counted * loss_error,
        counted * log_sum_exp,
        SECOND_ORDER * counted * log_sum_exp_error,
        at * gradient,
        SECOND_ORDER * at * gradient_error,
        at * (probability + onehot),
    )


def counted(found: CrossEntropy) -> int:
    return int(found.totals[1])


def saved(log_sum_exp: np.ndarray, count: int) -> CrossEntropy:
    """What the forward pass returns, but for the loss, which no gradient depends on."""
    return CrossEntropy(np.full(1, np.nan, log_sum_exp.dtype), log_sum_exp, np.array([np.nan, count, 2**31 - 1]))


def forward_output(log_sum_exp: np.ndarray) -> CrossEntropy:
    """Arrays for the forward pass to fill."""
    return CrossEntropy(np.full(1, np.nan, log_sum_exp.dtype), log_sum_exp, np.full(3, np.nan))


def assert_forward_rounds(case: Case, logits: np.ndarray, labels: np.ndarray, rung: int, found) -> None:
    """A mean of float32 losses, added in a block by at most 16 roundings each, divided and rounded."""
    exact = exactly(case, logits, labels)
    assert counted(found) == exact.counted.sum()
    assert found.loss.dtype == np.float32 and found.loss.shape == (1,)
    allowed = (exact.loss_error.sum() + 16 * U * exact.losses.sum()) / max(counted(found), 1)
    mean = exact.losses.sum() / max(counted(found), 1)
    assert abs(float(found.loss[0]) - mean) <= allowed + 2 * U * abs(mean), (
        f"errs by {abs(float(found.loss[0]) - mean) / allowed:.3g} bounds"
    )
    error = np.abs(found.log_sum_exp - exact.log_sum_exp)
    assert (error <= exact.log_sum_exp_error).all(), f"rung {rung}: log sum exp errs by {error.max():.3g}"


def assert_backward_rounds(case: Case, logits: np.ndarray, labels: np.ndarray, dloss: float, dlogits: np.ndarray) -> None:
    """Each term meets 3 roundings of weights, 2 products, the scale's 3, and an addition per reader of its row and column."""
    exact = exactly(case, logits, labels)
    size, scale = logits.shape[2:], dloss / max(exact.counted.sum(), 1)
    pairs = zip(size, labels.shape[1:], strict=True)
    readers = [min(large, 2 * -(-(large - 1) // (small - 1))) if small > 1 else large for small, large in pairs]
    expected = scale * adjoint(exact.gradient, size)
    terms = adjoint(exact.gradient_error + (sum(readers) + 10) * U * np.abs(exact.gradient), size)
    allowed = SECOND_ORDER * scale * terms
    if dlogits.dtype != np.float32:
        kind = ml_dtypes.finfo(dlogits.dtype)
        allowed = allowed + np.maximum(float(kind.eps) / 2 * (np.abs(expected) + allowed), float(kind.smallest_subnormal) / 2)
    error = np.abs(dlogits.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{dlogits.dtype} errs by {(error / np.maximum(allowed, 1e-300)).max():.3g} times the bound"


@RUNGS
@with_corners
def test_kernel_cross_entropy_is_the_formula(rung, case):
    logits, labels = draw(case, np.float64)
    out = output(labels, np.float64)
    with host.schedule(case.seed):
        found = cross_entropy(logits, labels, case.ignore_index, rung=rung, out=forward_output(out))
    exact = exactly(case, logits, labels)
    scale = max(1.0, float(np.abs(logits).max()))
    assert_same(found.loss[0], segmentation_loss(logits, None, labels, ignore_index=case.ignore_index)[0], scale=scale)
    assert_same(found.loss[0], exact.losses.sum() / max(exact.counted.sum(), 1), scale=scale)
    assert_same(out, exact.log_sum_exp, scale=scale)
    assert found.log_sum_exp is out
    assert counted(found) == exact.counted.sum()
    assert untouched(out)
    again = cross_entropy(logits, labels, case.ignore_index, rung=rung)
    assert [array.tobytes() for array in again] == [array.tobytes() for array in found]


@RUNGS
@with_corners
def test_kernel_cross_entropy_backward_is_the_gradient(rung, case):
    logits, labels = draw(case, np.float64)
    exact = exactly(case, logits, labels)
    out, count = output(logits), int(exact.counted.sum())
    arguments = (np.full(1, 3.0), logits, labels, saved(guarded(exact.log_sum_exp), count), case.ignore_index)
    with host.schedule(case.seed):
        assert cross_entropy_backward(*arguments, rung=rung, out=out) is out
    expected = segmentation_loss(logits, None, labels, ignore_index=case.ignore_index)[1](3.0)[0]
    scale = 3 / max(count, 1) * float(adjoint(exact.cancelling, logits.shape[2:]).max())
    assert_same(out, expected, scale=scale)
    assert untouched(out)
    assert cross_entropy_backward(*arguments, rung=rung).tobytes() == out.tobytes()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@RUNGS
@with_corners
def test_kernel_cross_entropy_rounds_as_float32_must(dtype, rung, case):
    logits, labels = draw(case, dtype)
    out = output(labels, np.float32)
    found = cross_entropy(logits, labels, case.ignore_index, rung=rung, out=forward_output(out))
    assert_forward_rounds(case, logits, labels, rung, found)
    assert untouched(out)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@RUNGS
@with_corners
def test_kernel_cross_entropy_backward_rounds_as_its_dtype_must(dtype, rung, case):
    logits, labels = draw(case, dtype)
    exact = exactly(case, logits, labels)
    forward, out = saved(guarded(exact.log_sum_exp.astype(np.float32)), int(exact.counted.sum())), output(logits)
    arguments = (np.full(1, 100, np.float32), logits, labels, forward, case.ignore_index)
    cross_entropy_backward(*arguments, rung=rung, out=out)
    assert_backward_rounds(case, logits, labels, 100.0, out)
    assert untouched(out)


@RUNGS
@settings(max_examples=8)
@given(case=CASES, other=st.integers(1, 2**64 - 1))
def test_kernel_cross_entropy_has_one_result_under_every_order_and_no_race(rung, case, other):
    logits, labels = draw(case, np.float32)
    results = set()
    for seed, races in ((0, False), (other, False), (other, True)):
        with host.schedule(seed, races=races):
            found = cross_entropy(logits, labels, case.ignore_index, rung=rung)
            dlogits = cross_entropy_backward(ONE, logits, labels, found, case.ignore_index, rung=rung)
        results.add(tuple(array.tobytes() for array in (*found, dlogits)))
    assert len(results) == 1


@RUNGS
@pytest.mark.parametrize("case", [Case((1, 18, 4, 9, 9, 40)), Case((1, 2, 1, 2, 3, 100)), Case((1, 5, 20, 3, 6, 5))], ids=str)
def test_kernel_cross_entropy_has_no_race_where_tiles_meet(rung, case):
    logits, labels = draw(case, np.float32)
    with host.schedule(7, races=True):
        found = cross_entropy(logits, labels, rung=rung)
        cross_entropy_backward(ONE, logits, labels, found, rung=rung)


def test_kernel_cross_entropy_stays_within_its_arrays():
    """Also where what it would read outside is dropped later: under the address sanitizer, by arrays without a margin."""
    done = sanitized(f"""
import numpy as np
from kernels.cross_entropy import cross_entropy, cross_entropy_backward
for batch, classes, height, width, *size in {[case.shape for case in CORNERS]}:
    logits, labels = np.ones((batch, classes, height, width), np.float32), np.zeros((batch, *size), np.uint8)
    for rung in (1, 2):
        found = cross_entropy(logits, labels, rung=rung)
        cross_entropy_backward(np.ones(1, np.float32), logits, labels, found, rung=rung)
print("survived")
""")
    assert done.stdout == "survived\n", done.stderr


@RUNGS
def test_kernel_cross_entropy_of_many_blocks_is_added_by_one(rung):
    """More blocks than the last kernel has threads, a quarter of their pixels in the last."""
    case = Case((67000 if rung == 1 else 300, 2, 1, 1, 1, 1))
    logits, labels = draw(case, np.float64)
    expected = segmentation_loss(logits, None, labels)[0]
    found = cross_entropy(logits, labels, rung=rung)
    assert_same(found.loss[0], expected)
    assert counted(found) == (labels != 255).sum()


@RUNGS
def test_kernel_cross_entropy_positions_are_exact_on_a_long_axis(rung):
    """Whose numerators pass 2^31; a step along it that is not whole would drift from its readers. (Torch's positions do.)"""
    logits, labels = draw(Case((1, 2, 30001, 1, 80000, 1)), np.float64)
    z, _ = nn.resize_bilinear(logits, labels.shape[1:], True)
    log_sum_exp = np.log(np.exp(z).sum(1))
    expected = segmentation_loss(logits, None, labels)[1](1.0)[0]
    for turn in (np.asarray, lambda a: np.ascontiguousarray(a.swapaxes(-1, -2))):
        arguments = np.ones(1), turn(logits), turn(labels), saved(turn(log_sum_exp), int((labels != 255).sum()))
        assert_same(cross_entropy_backward(*arguments, rung=rung), turn(expected))


@RUNGS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernel_cross_entropy_of_extreme_logits_is_finite(rung, dtype):
    """The largest comes first, last, or at once; exponentials of differences of 1e30 are 0, and nothing overflows."""
    logits = np.array([[1e30, 0, -1e30], [-1e30, 0, 1e30], [1e30, 1e30, -1e30], [-1e30, -1e30, -1e30]], dtype)[:, :, None, None]
    labels = np.array([0, 2, 1, 0], np.uint8)[:, None, None]
    found = cross_entropy(logits, labels, rung=rung)
    np.testing.assert_allclose(found.loss[0], (np.log(2) + np.log(3)) / 4, rtol=1e-6)
    probability = (
        cross_entropy_backward(np.full(1, 4, dtype), logits, labels, found, rung=rung)[:, :, 0, 0] + np.eye(3)[labels[:, 0, 0]]
    )
    np.testing.assert_array_equal(probability[:2], np.eye(3)[[0, 2]])


@RUNGS
def test_kernel_cross_entropy_is_nan_where_a_logit_is(rung):
    logits, labels = draw(Case((1, 3, 4, 4, 8, 8), ignored=0.0), np.float32)
    logits[0, 1, 2, 2] = np.nan
    assert np.isnan(cross_entropy(logits, labels, rung=rung).loss[0])


@RUNGS
@pytest.mark.parametrize(
    ("dtype", "wrong"), [("uint8", 4), ("uint8", 254), ("int32", -1), ("int32", 2**31 - 1), ("int64", 2**32), ("int64", -(2**40))]
)
def test_kernel_cross_entropy_names_the_first_label_that_is_no_class(rung, dtype, wrong):
    labels = np.zeros((2, 20, 40), dtype)
    labels[0, 0, 0] = labels[1, 19, 39] = 255
    labels[1, 3, 37], labels[1, 7, 2] = wrong, 5
    logits = np.zeros((2, 4, 3, 3), np.float32)
    with pytest.raises(ValueError, match=f"^labels hold {wrong}: expected a class from 0 to 3, or 255 to ignore a pixel$"):
        cross_entropy(logits, labels, rung=rung)
    if dtype != "uint8":
        with pytest.raises(ValueError, match="^labels hold 255: expected a class from 0 to 3, or -8 to ignore a pixel$"):
            cross_entropy(logits, labels, -8, rung=rung)
    found = cross_entropy(logits, labels, rung=rung, wait=False)
    assert np.isnan(found.loss[0])
    assert np.isnan(cross_entropy_backward(ONE, logits, labels, found, rung=rung)).all()


def logits_of(shape=(2, 3, 4, 5), dtype: object = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def labels_of(shape=(2, 8, 9), dtype: object = np.uint8) -> np.ndarray:
    return np.ones(shape, dtype)


def sums_of(shape=(2, 8, 9), dtype: object = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def forward(*arguments: object, **options: object) -> object:
    return cross_entropy(*(arguments or (logits_of(), labels_of())), **options)


def backward(logits=None, labels=None, sums=None, dloss=None, totals=None, **options: object) -> object:
    given = (ONE, logits_of(), labels_of(), sums_of(), np.zeros(3))
    dloss, logits, labels, sums, totals = (
        default if chosen is None else chosen
        for chosen, default in zip((dloss, logits, labels, sums, totals), given, strict=True)
    )
    return cross_entropy_backward(dloss, logits, labels, CrossEntropy(ONE, sums, totals), **options)


SHARED = np.zeros(2000, np.float32)
READ_ONLY = sums_of()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: forward([[1.0]], labels_of()), TypeError, "logits is a builtins.list, expected a NumPy or a CuPy array"),
        (
            lambda: forward(logits_of(dtype=np.int32), labels_of()),
            TypeError,
            "logits has dtype .*int32.*, expected one of float32",
        ),
        (
            lambda: forward(logits_of((3, 4, 5)), labels_of()),
            ValueError,
            r"logits has shape \(3, 4, 5\), expected \(B, K, h, w\)",
        ),
        (lambda: forward(logits_of((2, 0, 4, 5)), labels_of()), ValueError, "logits has shape .* which is empty"),
        (lambda: forward(logits_of()[..., ::2], labels_of()), ValueError, "logits has strides"),
        (lambda: forward(logits_of(), torch.ones(2, 8, 9)), TypeError, "labels is a torch.Tensor, expected a NumPy or a CuPy"),
        (lambda: forward(logits_of(), labels_of(dtype=np.int16)), TypeError, "int16.*, expected one of uint8, int32, int64"),
        (lambda: forward(logits_of(), labels_of(dtype=bool)), TypeError, "labels has dtype .*bool"),
        (lambda: forward(logits_of(), labels_of(dtype=">i4")), TypeError, "labels has dtype >i4"),
        (lambda: forward(logits_of(), labels_of((3, 8, 9))), ValueError, r"labels has shape \(3, 8, 9\), expected \(2, H, W\)"),
        (lambda: forward(logits_of(), labels_of((2, 8, 9, 1))), ValueError, r"labels has shape .*, expected \(2, H, W\)"),
        (lambda: forward(logits_of(), labels_of((2, 0, 9))), ValueError, "labels has shape .* which is empty"),
        (lambda: forward(logits_of(), labels_of((2, 9, 8)).swapaxes(1, 2)), ValueError, "labels has strides"),
        (
            lambda: forward(logits_of(), np.broadcast_to(np.uint8(0), (2, 2**15, 2**15))),
            ValueError,
            "labels has shape .* fewer than 2\\^31",
        ),
        (
            lambda: forward(logits_of(), np.frombuffer(b"\0" * 577, np.uint8)[1:].view(np.int32).reshape(2, 8, 9)),
            ValueError,
            "labels begins at an address that is no multiple of its 4-byte",
        ),
        (lambda: forward(ignore_index=2.5), ValueError, "ignore_index is 2.5, expected a whole number from -2147483647"),
        (lambda: forward(ignore_index=2**31), ValueError, "ignore_index is 2147483648"),
        (lambda: forward(ignore_index=-(2**31)), ValueError, "ignore_index is -2147483648"),
        (lambda: forward(rung=0), ValueError, "rung is 0, expected a whole number from 1 to 2"),
        (lambda: forward(rung=3), ValueError, "rung is 3"),
        (
            lambda: forward(out=forward_output(sums_of((2, 9, 8)))),
            ValueError,
            r"log_sum_exp has shape \(2, 9, 8\), expected \(2, 8, 9\)",
        ),
        (lambda: forward(out=forward_output(sums_of(dtype=np.float64))), TypeError, "has dtype .*float64.*, expected float32"),
        (lambda: forward(out=forward_output(READ_ONLY)), ValueError, "log_sum_exp is read-only"),
        (
            lambda: forward(SHARED[:120].reshape(2, 3, 4, 5), labels_of(), out=forward_output(SHARED[119:263].reshape(2, 8, 9))),
            ValueError,
            "log_sum_exp overlaps logits",
        ),
        (
            lambda: forward(
                logits_of(), SHARED.view(np.uint8)[:144].reshape(2, 8, 9), out=forward_output(SHARED[35:179].reshape(2, 8, 9))
            ),
            ValueError,
            "log_sum_exp overlaps labels",
        ),
        (lambda: backward(logits=logits_of((3, 4, 5))), ValueError, "logits has shape"),
        (lambda: backward(labels=labels_of((2, 8))), ValueError, "labels has shape"),
        (lambda: backward(rung=3), ValueError, "rung is 3"),
        (lambda: backward(sums=[1.0]), TypeError, "log_sum_exp is a builtins.list"),
        (lambda: backward(sums=sums_of(dtype=np.float16)), TypeError, "log_sum_exp has dtype .*float16.*, expected float32"),
        (lambda: backward(logits=logits_of(dtype=np.float64)), TypeError, "loss has dtype .*float32.*, expected float64"),
        (lambda: backward(sums=sums_of((2, 9, 8))), ValueError, r"log_sum_exp has shape \(2, 9, 8\), expected \(2, 8, 9\)"),
        (lambda: backward(totals=np.zeros(2)), ValueError, r"totals has shape \(2,\), expected \(3,\)"),
        (lambda: backward(totals=np.zeros(3, np.float32)), TypeError, "totals has dtype .*float32.*, expected float64"),
        (lambda: backward(dloss=np.ones(2, np.float32)), ValueError, r"dloss has shape \(2,\), expected \(1,\)"),
        (lambda: backward(dloss=np.ones(1)), TypeError, "dloss has dtype .*float64.*, expected float32"),
        (lambda: backward(dloss=1.0), TypeError, "dloss is a builtins.float"),
        (lambda: backward(out=logits_of((2, 3, 5, 4))), ValueError, "out has shape"),
        (lambda: backward(out=logits_of(dtype=np.float16)), TypeError, "out has dtype float16"),
        (
            lambda: backward(logits=SHARED[:120].reshape(2, 3, 4, 5), out=SHARED[119:239].reshape(2, 3, 4, 5)),
            ValueError,
            "out overlaps logits",
        ),
        (
            lambda: backward(sums=SHARED[:144].reshape(2, 8, 9), out=SHARED[143:263].reshape(2, 3, 4, 5)),
            ValueError,
            "out overlaps log_sum_exp",
        ),
        (
            lambda: backward(labels=SHARED.view(np.uint8)[:144].reshape(2, 8, 9), out=SHARED[35:155].reshape(2, 3, 4, 5)),
            ValueError,
            "out overlaps labels",
        ),
    ],
)
def test_kernel_cross_entropy_names_what_is_wrong(monkeypatch, call, error, words):
    def refuse(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr("kernels.cross_entropy.launch", refuse)
    monkeypatch.setattr("kernels.cross_entropy.launch_each", refuse)
    with pytest.raises(error, match=words):
        call()


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")


def test_kernel_cross_entropy_names_the_device_that_differs(cupy):
    memory = cupy.cuda.UnownedMemory(2**20, 2**20, None, 0)  # an address, not memory: no check may follow it
    labels = cupy.ndarray((2, 8, 9), "uint8", cupy.cuda.MemoryPointer(memory, 0))
    with pytest.raises(ValueError, match="labels is on GPU 0 and logits on the host, expected one place"):
        cross_entropy(logits_of(), labels)


@pytest.mark.gpu
@RUNGS
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_cross_entropy_on_the_gpu_stays_within_the_bound(cupy, dtype, rung):
    for case in [*CORNERS, Case((2, 150, 61, 47, 120, 93), size=10.0)]:
        logits, labels = draw(case, dtype)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            on_gpu = cupy.asarray(logits), cupy.asarray(labels)
            found = cross_entropy(*on_gpu, case.ignore_index, rung=rung)
            dloss = cupy.full(1, 100, "float32")
            dlogits = cross_entropy_backward(dloss, *on_gpu, found, case.ignore_index, rung=rung)
            stream.synchronize()
        assert_forward_rounds(case, logits, labels, rung, CrossEntropy(*map(cupy.asnumpy, found)))
        assert_backward_rounds(case, logits, labels, 100.0, cupy.asnumpy(dlogits))
