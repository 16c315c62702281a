"""kernels/losses: the depth loss and its gradient, every rung, against the reference; and what the wrappers refuse."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import reference.losses as plain
from kernels import host, losses
from kernels.losses import depth_loss, depth_loss_backward, saved_shapes
from tests.equality import assert_same
from tests.maps import VALUES, Batch, batches, distance_to_kinks

RUNGS = (1, 2)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOW = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
U = 2.0**-24  # the relative rounding error of float32
SEEDS = st.integers(0, 2**32 - 1)
CUTS = st.sampled_from([(32, 32), (64, 256), (128, 128)])  # threads and pixels of a block: images of many chunks, of one
OPTIONS = st.fixed_dictionaries(
    {
        "kept": st.sampled_from([0.0, 0.3, 0.8, 1.0]),
        "scales": st.integers(0, 6),
        "gradient_weight": st.sampled_from([0.0, 0.5, -3.0]),
    }
)
PAPER = {"kept": 0.8, "scales": 4, "gradient_weight": 0.5}


@contextlib.contextmanager
def cut(threads: int, chunk: int) -> Iterator[None]:
    """Launch with blocks of `threads` threads and `chunk` pixels, smaller than those of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "THREADS", threads)
        patch.setattr(losses, "chunk_of", lambda images, pixels: chunk)
        yield


def guarded(values: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy between NaNs (a mask's between valid pixels), `offset` elements past an address that is a multiple of 16."""
    padding = 1 if values.dtype == np.uint8 else np.nan
    padded = np.full(values.size + 128 + offset, padding, values.dtype)
    inner = padded[64 + offset : 64 + offset + values.size].reshape(values.shape)
    inner[...] = values
    return inner


def untouched(inner: np.ndarray, offset: int = 0) -> bool:
    around = np.concatenate([inner.base[: 64 + offset], inner.base[64 + offset + inner.size :]]).astype(float)
    return bool(np.isnan(around).all() or (around == 1).all())


def saved_for(prediction: np.ndarray, wide: object) -> tuple[np.ndarray, ...]:
    """Arrays for what the loss keeps, full of what must not stay there."""
    shapes = saved_shapes(prediction.shape)
    return tuple(np.full(shapes[name], 77, np.int32 if name == "counts" else wide) for name in ("residual", "numbers", "counts"))


def run(maps: Batch, dtype: np.dtype, rung: int, options: dict, seed: int = 0, offset: int = 0, races: bool = False):
    """Loss and gradient, of dloss = -1.5, of the kernels: arrays in guards, which are found untouched."""
    wide = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    with np.errstate(over="ignore"):
        prediction, target = guarded(maps.prediction.astype(dtype), offset), guarded(maps.target.astype(wide), offset)
    mask = guarded(np.where(maps.mask, 1 + np.arange(maps.mask.size).reshape(maps.mask.shape) % 255, 0).astype(np.uint8), offset)
    loss, gradient = guarded(np.full(1, np.nan, wide)), guarded(np.full(prediction.shape, np.nan, dtype), offset)
    before = [array.base.tobytes() for array in (prediction, target, mask)]
    with host.schedule(seed, races):
        out = loss, *saved_for(prediction, wide)
        returned, saved = depth_loss(prediction, target, mask, rung=rung, out=out, **options)
        assert returned is loss and saved[:3] == out[1:]
        assert depth_loss_backward(np.full(1, -1.5, wide), prediction, saved, out=gradient) is gradient
    assert untouched(loss)
    assert untouched(gradient, offset)
    assert before == [array.base.tobytes() for array in (prediction, target, mask)]
    return loss[0], gradient


def by_reference(maps: Batch, options: dict):
    loss, vjp = plain.depth_loss(*maps, **options)
    return loss, vjp(-1.5)


def cancelling(maps: Batch, options: dict) -> float:
    """The size of the terms that cancel in the gradient: |dloss/dR|, which falls on at most all pixels, times dR/dd."""
    size = 0.0
    for p, m in zip(maps.prediction, maps.mask, strict=True):
        if m.any():
            spread = np.abs(p[m] - np.median(p[m])).mean()
            size = max(size, 1.5 * (1 + 8 * options["scales"] * abs(options["gradient_weight"])) / max(spread, 1e-6))
    return size


def assert_is_the_reference(maps: Batch, options: dict, loss: float, gradient: np.ndarray) -> None:
    expected, expected_gradient = by_reference(maps, options)
    assert_same(np.asarray(loss), np.asarray(expected), scale=max(1.0, abs(float(expected))), what="loss")
    assert_same(gradient, expected_gradient, scale=cancelling(maps, options), what="gradient")
    assert not gradient[~maps.mask].any()


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=40)
@given(
    maps=batches(),
    size=st.sampled_from([1.0, -(2.0**-30), 2.0**20]),
    options=st.one_of(st.just(PAPER), OPTIONS),
    size_of_blocks=CUTS,
    seed=SEEDS,
    offset=st.integers(0, 2),
)
def test_kernel_depth_loss_is_the_formula(rung, maps, size, options, size_of_blocks, seed, offset):
    """Sums of multiples of 1/4, of any power of two times them, are exact: they tie in both. Deviations below 1e-6 too."""
    maps = maps._replace(prediction=size * maps.prediction)
    with cut(*size_of_blocks):
        loss, gradient = run(maps, np.dtype(np.float64), rung, options, seed, offset)
        again, gradient_again = run(maps, np.dtype(np.float64), rung, options, 0, offset)
    assert_is_the_reference(maps, options, loss, gradient)
    assert loss == again
    np.testing.assert_array_equal(gradient, gradient_again)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("shape", [(2, 96, 96), (1, 41, 211), (1, 8193, 1), (1, 2, 5000)])
def test_kernel_depth_loss_of_images_of_several_blocks(rung, shape):
    """Blocks as on a GPU. Hundreds of residuals equal the threshold, in both chunks, and some of them are trimmed."""
    rng = np.random.default_rng(0)
    prediction, target = rng.integers(0, 6, (2, *shape)) / 4
    mask = rng.random(shape) < 0.9
    maps = Batch(prediction, target, mask)
    residual = np.abs(plain.ALIGNMENTS["median"](*maps)[0])[0][mask[0]]
    threshold = np.sort(residual)[math.floor(0.8 * len(residual)) - 1]
    kept, equal = math.floor(0.8 * len(residual)) - (residual < threshold).sum(), (residual == threshold).sum()
    assert 100 < kept < equal
    assert_is_the_reference(maps, PAPER, *run(maps, np.dtype(np.float64), rung, PAPER, seed=1))


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=12)
@given(maps=batches(largest=11), options=OPTIONS, seed=SEEDS, dtype=st.sampled_from([np.dtype(np.float64), *LOW]))
def test_kernel_depth_loss_has_no_race(rung, maps, options, seed, dtype):
    maps = Batch(*(np.where(maps.mask, x, 0) for x in maps[:2]), maps.mask)
    with cut(32 if rung == 2 else 64, 32):
        loss, gradient = run(maps, dtype, rung, options, seed, races=True)
        again, gradient_again = run(maps, dtype, rung, options, seed + 1)
    assert loss == again
    np.testing.assert_array_equal(gradient, gradient_again)


@pytest.mark.parametrize("rung", RUNGS)
@given(shape=st.tuples(st.integers(1, 2), *[st.integers(1, 9)] * 2), seed=SEEDS, size_of_blocks=CUTS)
def test_kernel_median_is_the_first_zero_of_either_sign(rung, shape, seed, size_of_blocks):
    """-0 equals 0, though its key is another."""
    rng = np.random.default_rng(seed)
    maps = Batch(rng.choice([-1.0, -0.0, 0.0, 1.0], shape), rng.choice([-0.0, 0.0, 0.5], shape), rng.random(shape) < 0.8)
    with cut(*size_of_blocks):
        assert_is_the_reference(maps, PAPER, *run(maps, np.dtype(np.float64), rung, PAPER))


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=10)
@given(maps=batches(kinds=("normal", "quantised"), masks=("some", "all"), largest=9), size_of_blocks=CUTS)
def test_kernel_no_gradient_flows_through_a_deviation_that_was_clamped(rung, maps, size_of_blocks):
    maps = maps._replace(prediction=2.0**-30 * maps.prediction)
    with cut(*size_of_blocks):
        assert_is_the_reference(maps, PAPER, *run(maps, np.dtype(np.float64), rung, PAPER))


# ---- rounding ------------------------------------------------------------------------------------------------------------------


def additions(rung: int, images: int, pixels: int, terms: int) -> int:
    """How many sums a term of a pixel passes through at most, where a pixel brings `terms` of them."""
    threads, chunk = losses.THREADS, losses.chunk_of(images, pixels)
    if rung == 1:
        return -(-pixels // threads) * terms + threads
    chunks = -(-pixels // chunk)
    of_thread = max(-(-min(chunk, pixels) // threads), 4)
    return of_thread * terms + -(-chunks // 32) + 2 * (5 + threads // 32)


def bounds(maps: Batch, rung: int) -> tuple[float, np.ndarray, float]:
    """The largest errors of loss and gradient in float32, for dloss = 1.5, and how far R may be off.

    To first order, in roundings of 2^-24: of s, one for d - t, its additions, one for the mean; of an aligned value, those, and
    the difference's and the quotient's; of R, one more: `of_r` of |d - t| / s of both maps. A pixel has in the loss a share of at
    most 1 / 2M, and at each scale of 0.5 * 4 / M_k, and what it brings takes 6 roundings for shares, products and the mean, and
    its additions. (The sum of the smallest changes by no more than the changes of all.) The gradient is made of the same shares
    over s, and of sums of them, as in the reference's vjp of the alignment, with sizes for values.
    """
    images, pixels = len(maps.mask), maps.mask[0].size
    of_r, of_sums = additions(rung, images, pixels, 1) + 5, additions(rung, images, pixels, 1 + 4 * 2) + 6
    loss, gradient, of_residual = 0.0, np.zeros(maps.mask.shape), 0.0
    for b, m in enumerate(maps.mask):
        if not m.any():
            continue
        share = np.full(m.shape, 1 / (2 * m.sum()))
        for k in range(4):
            share[:: 2**k, :: 2**k] += 2 / max(m[:: 2**k, :: 2**k].sum(), 1)
        share = 1.5 * share[m] / images
        t, s, sizes = [], [], []
        for values in (maps.prediction[b][m], maps.target[b][m]):
            t.append(np.sort(values)[(len(values) - 1) // 2])
            s.append(max(np.abs(values - t[-1]).mean(), 1e-6))
            sizes.append(np.abs(values - t[-1]) / s[-1])
        loss += (of_r + of_sums) * U * (share * (sizes[0] + sizes[1])).sum() / 1.5
        of_residual = max(of_residual, of_r * U * (sizes[0] + sizes[1]).max())
        through_s = (share * sizes[0]).sum() / s[0] / m.sum()
        of_image = share / s[0] + through_s
        of_image[np.argmax(maps.prediction[b][m] == t[0])] += share.sum() / s[0] + m.sum() * through_s
        gradient[b][m] = (of_r + of_sums + 6) * U * of_image
    return loss, gradient, of_residual


def rounded_to(maps: Batch, dtype: np.dtype) -> Batch:
    """The values that a kernel of this dtype is given, in float64, without garbage."""
    prediction, target = (np.where(maps.mask, x, 0) for x in maps[:2])
    return Batch(prediction.astype(dtype).astype(float), target.astype(np.float32).astype(float), maps.mask)


def assert_within_rounding(maps: Batch, rung: int, loss: float, gradient: np.ndarray, clear: bool) -> None:
    allowed, allowed_gradient, _ = bounds(maps, rung)
    expected, expected_gradient = by_reference(maps, PAPER)
    assert loss.dtype == np.float32
    assert abs(float(loss) - expected) <= allowed
    if clear:
        if gradient.dtype != np.float32:
            kind = ml_dtypes.finfo(gradient.dtype)
            of_dtype = float(kind.eps) / 2 * (np.abs(expected_gradient) + allowed_gradient)
            allowed_gradient = allowed_gradient + np.maximum(of_dtype, float(kind.smallest_subnormal) / 2)
        assert (np.abs(gradient.astype(float) - expected_gradient) <= allowed_gradient).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rung", RUNGS)
@given(maps=batches(masks=("none", "some", "all"), largest=13), size_of_blocks=CUTS, seed=SEEDS, offset=st.integers(0, 2))
def test_kernel_depth_loss_rounds_as_its_dtype_must(rung, dtype, maps, size_of_blocks, seed, offset):
    """The loss, everywhere: it is continuous, so ties and medians that rounding decides move it no farther than the bound."""
    maps = rounded_to(maps, dtype)
    with cut(*size_of_blocks):
        assert_within_rounding(maps, rung, *run(maps, dtype, rung, PAPER, seed, offset), clear=False)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("rung", RUNGS)
@given(maps=batches(kinds=("normal",), masks=("none", "some", "all"), largest=13), size_of_blocks=CUTS, seed=SEEDS)
def test_kernel_depth_gradient_rounds_as_its_dtype_must(rung, dtype, maps, size_of_blocks, seed):
    maps = rounded_to(maps, dtype)
    with cut(*size_of_blocks):
        # Residuals so near to 0, a neighbour's or the threshold that rounding may choose another sign or pixel are excluded.
        residual = plain.ALIGNMENTS["median"](*maps)[0]
        assume(distance_to_kinks(residual, maps.mask) > 2 * bounds(maps, rung)[2])
        assert_within_rounding(maps, rung, *run(maps, dtype, rung, PAPER, seed), clear=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@settings(max_examples=15)
@given(maps=batches(kinds=VALUES, largest=9), seed=SEEDS)
@example(maps=Batch(np.full((1, 3, 3), 1e30), np.full((1, 3, 3), -1e30), np.ones((1, 3, 3), bool)), seed=0)
def test_kernel_depth_loss_selects_as_a_sort_does(dtype, maps, seed):
    """Whatever the dtype: the median and the pixels kept are those of a sort of the values and of the residuals as they stand."""
    with np.errstate(over="ignore"):
        prediction, target = maps.prediction.astype(dtype), maps.target.astype(np.float32)
    with host.schedule(seed), cut(64, 32):
        for rung in RUNGS:
            _, saved = depth_loss(prediction, target, maps.mask, rung=rung)
            for b, m in enumerate(maps.mask.reshape(len(maps.mask), -1)):
                residual, values = np.abs(saved.residual[b].ravel()), prediction[b].ravel().astype(np.float32)
                used, places = math.floor(0.8 * int(m.sum())), np.flatnonzero(m)
                if len(places) and np.isfinite(values[places]).all():
                    assert saved.numbers[b, 0] == np.sort(values[places])[(len(places) - 1) // 2]
                    assert m.size - saved.counts[b, 2] == places[np.argmax(values[places] == saved.numbers[b, 0])]
                chosen = np.zeros(m.size, bool)
                chosen[places[np.argsort(residual[places], kind="stable")[:used]]] = True
                equal = (residual == saved.numbers[b, 4]) & (np.arange(m.size) <= saved.counts[b, 4])
                if not np.isnan(saved.numbers[b, 1]):
                    np.testing.assert_array_equal(m & ((residual < saved.numbers[b, 4]) | equal), chosen)


def test_kernel_depth_loss_gives_a_batch_of_any_size_enough_blocks():
    size = 384 * 384
    assert losses.chunk_of(1, size) == 2048
    assert losses.chunk_of(128, size) == 8192
    assert losses.chunk_of(8, 8 * 16384) == 8192
    assert losses.chunk_of(8, 8 * 16384 - 1) == 2048


# ---- values that are not finite ------------------------------------------------------------------------------------------------

ALL_ONES = np.array(2**32 - 1, np.uint32).view(np.float32)[()]  # the NaN that says of R that a pixel is not valid


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, ALL_ONES], ids=["nan", "inf", "-inf", "ones"])
@pytest.mark.parametrize("which", [0, 1])
def test_kernel_a_valid_pixel_that_is_not_finite_is_not_hidden(rung, dtype, bad, which):
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((3, 4, 6)).astype(dtype), rng.standard_normal((3, 4, 6)).astype(np.float32)]
    mask = np.zeros((3, 4, 6), bool)
    mask[:, ::2, ::2] = True
    mask[2] = False
    mask[2, 3, 1] = True  # alone: none of its residuals is kept
    for b, y, x in ((1, 2, 4), (2, 3, 1)):
        spoilt = [maps[0].copy(), maps[1].copy()]
        spoilt[which][b, y, x] = np.asarray(bad, np.float32).astype(maps[which].dtype)
        with cut(64, 32):
            loss, saved = depth_loss(*spoilt, mask, rung=rung)
            gradient = depth_loss_backward(np.ones(1, np.float32), spoilt[0], saved).astype(np.float32)
        assert np.isnan(loss[0])
        assert np.isnan(gradient[b][mask[b]]).all()
        assert not gradient[~mask].any()
        assert np.isfinite(np.delete(gradient, b, axis=0)).all()


# ---- bad input -----------------------------------------------------------------------------------------------------------------


def maps_of(shape=(2, 3, 4), dtype: object = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


MASK = np.ones((2, 3, 4), bool)
SHARED = np.zeros(200, np.float32)
READ_ONLY = np.zeros(1, np.float32)
READ_ONLY.flags.writeable = False


COUNTS = np.zeros((2, 32), np.int32)


def outputs(loss: np.ndarray) -> tuple[np.ndarray, ...]:
    return loss, *saved_for(maps_of(), np.float32)


def loss_of(prediction=None, target=None, mask=MASK, **options):
    return depth_loss(maps_of() if prediction is None else prediction, maps_of() if target is None else target, mask, **options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: loss_of([[1.0]]), TypeError, "prediction is a builtins.list, expected a NumPy or a CuPy array"),
        (lambda: loss_of(maps_of(dtype=np.int32)), TypeError, "prediction has dtype .*int32.*, expected one of float32"),
        (lambda: loss_of(maps_of((3, 4))), ValueError, r"prediction has shape \(3, 4\), expected \(B, H, W\)"),
        (lambda: loss_of(maps_of((0, 3, 4))), ValueError, r"prediction has shape \(0, 3, 4\), which is empty"),
        (lambda: loss_of(maps_of((2, 4, 3)).transpose(0, 2, 1)), ValueError, "prediction has strides .* C-contiguous"),
        (
            lambda: loss_of(np.broadcast_to(np.float32(0), (1, 2**16, 2**15))),
            ValueError,
            r"prediction has shape .* fewer than 2\^31",
        ),
        (lambda: loss_of(target=maps_of((2, 3, 5))), ValueError, r"target has shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        (lambda: loss_of(target=maps_of(dtype=np.float64)), TypeError, "target has dtype float64, expected float32"),
        (
            lambda: loss_of(maps_of(dtype=np.float16), maps_of(dtype=np.float16)),
            TypeError,
            "target has dtype float16, expected float32 for a prediction of float16",
        ),
        (lambda: loss_of(target=maps_of((2, 4, 3)).transpose(0, 2, 1)), ValueError, "target has strides"),
        (lambda: loss_of(mask=[True]), TypeError, "mask is a builtins.list"),
        (lambda: loss_of(mask=maps_of()), TypeError, "mask has dtype .*float32.*, expected bool or uint8"),
        (lambda: loss_of(mask=MASK[:1]), ValueError, r"mask has shape \(1, 3, 4\), expected \(2, 3, 4\)"),
        (lambda: loss_of(mask=np.ones((2, 3, 8), bool)[..., ::2]), ValueError, "mask has strides .* C-contiguous"),
        (lambda: loss_of(kept=1.5), ValueError, "kept is 1.5, expected a fraction"),
        (lambda: loss_of(kept=math.nan), ValueError, "kept is nan"),
        (lambda: loss_of(scales=28), ValueError, "scales is 28, expected a whole number from 0 to 27"),
        (lambda: loss_of(scales=-1), ValueError, "scales is -1"),
        (lambda: loss_of(scales=2.0), ValueError, r"scales is 2\.0, expected a whole number"),
        (lambda: loss_of(gradient_weight=math.inf), ValueError, "gradient_weight is inf, expected a finite number"),
        (lambda: loss_of(rung=3), ValueError, "rung is 3, expected a whole number from 1 to 2"),
        (lambda: loss_of(out=outputs(maps_of((2,)))), ValueError, r"loss has shape \(2,\), expected \(1,\)"),
        (lambda: loss_of(out=outputs(maps_of((1,), np.float16))), TypeError, "loss has dtype .*float16.*, expected float32"),
        (lambda: loss_of(out=outputs(READ_ONLY)), ValueError, "loss is read-only"),
        (lambda: loss_of(SHARED[:24].reshape(2, 3, 4), out=outputs(SHARED[23:24])), ValueError, "loss overlaps prediction"),
        (lambda: loss_of(target=SHARED[:24].reshape(2, 3, 4), out=outputs(SHARED[:1])), ValueError, "loss overlaps target"),
        (
            lambda: loss_of(mask=SHARED.view(np.uint8)[:24].reshape(2, 3, 4), out=outputs(SHARED[5:6])),
            ValueError,
            "loss overlaps mask",
        ),
        (
            lambda: loss_of(out=(SHARED[:1], SHARED[1:25].reshape(2, 3, 4), SHARED[24:36].reshape(2, 6), COUNTS)),
            ValueError,
            "numbers overlaps residual",
        ),
        (
            lambda: loss_of(out=(*outputs(maps_of((1,)))[:3], COUNTS[:1])),
            ValueError,
            r"counts has shape \(1, 32\), expected \(2, 32\)",
        ),
    ],
)
def test_kernel_depth_loss_names_what_is_wrong(monkeypatch, call, error, words):
    monkeypatch.setattr(losses, "launch", lambda *arguments: pytest.fail("launched"))
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dloss": 1.0}, TypeError, "dloss is a builtins.float"),
        ({"dloss": np.ones(2, np.float32)}, ValueError, r"dloss has shape \(2,\), expected \(1,\)"),
        ({"dloss": np.ones(1)}, TypeError, "dloss has dtype float64 and saved.residual float32"),
        ({"prediction": maps_of((2, 4, 3))}, ValueError, r"saved is of a prediction \(2, 3, 4\) .* expected one \(2, 4, 3\)"),
        ({"prediction": maps_of(dtype=np.float64)}, ValueError, "whose accumulator is float32, .* expected one .* with float64"),
        ({"out": maps_of((2, 3, 5))}, ValueError, r"out has shape \(2, 3, 5\)"),
        ({"out": maps_of(dtype=np.float16)}, TypeError, "out has dtype float16"),
        ({"out": "prediction"}, ValueError, "out overlaps prediction"),
        ({"out": "residual"}, ValueError, "out overlaps residual"),
        ({"saved": {"numbers": maps_of((1,))}}, ValueError, r"saved.numbers has shape \(1,\), expected \(2, 6\)"),
        ({"saved": {"numbers": np.ones((2, 6))}}, TypeError, "saved.numbers has dtype .*float64.*, expected float32"),
        ({"saved": {"counts": COUNTS[:1]}}, ValueError, r"saved.counts has shape \(1, 32\), expected \(2, 32\)"),
        ({"saved": {"counts": COUNTS.astype(np.int64)}}, TypeError, "saved.counts has dtype .*int64.*, expected int32"),
        ({"saved": {"scales": 28}}, ValueError, "scales is 28, expected a whole number from 0 to 27"),
        ({"saved": {"rung": 3}}, ValueError, "rung is 3, expected a whole number from 1 to 2"),
    ],
)
def test_kernel_depth_loss_backward_names_what_is_wrong(monkeypatch, change, error, words):
    prediction = maps_of()
    _, saved = loss_of(prediction)
    arguments = {"dloss": np.ones(1, np.float32), "prediction": prediction, **change}
    arguments["saved"] = saved._replace(**change.get("saved", {}))
    if isinstance(arguments.get("out"), str):
        arguments["out"] = {"prediction": prediction, "residual": saved.residual}[arguments["out"]]
    monkeypatch.setattr(losses, "launch", lambda *arguments: pytest.fail("launched"))
    with pytest.raises(error, match=words):
        depth_loss_backward(**arguments)


# ---- machine code, and a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")


def test_kernel_depth_loss_names_the_device_that_differs(cupy):
    def on_gpu(device: int, dtype: str):
        memory = cupy.cuda.UnownedMemory(2**20, 2**20, None, device)  # an address, not memory: no check may follow it
        return cupy.ndarray((2, 3, 4), dtype, cupy.cuda.MemoryPointer(memory, 0))

    with pytest.raises(ValueError, match="target is on the host and prediction on GPU 0, expected one place"):
        loss_of(on_gpu(0, "float32"))
    with pytest.raises(ValueError, match="mask is on GPU 1 and prediction on GPU 0"):
        loss_of(on_gpu(0, "float32"), on_gpu(0, "float32"), on_gpu(1, "bool"))


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_depth_loss_on_the_gpu_is_within_the_same_bound(cupy, rung, dtype):
    rng = np.random.default_rng(0)
    for shape in [(1, 1, 1), (3, 7, 5), (2, 41, 211), (4, 384, 384)]:
        mask = rng.random(shape) < 0.9
        maps = rounded_to(Batch(rng.standard_normal(shape), rng.standard_normal(shape), mask), dtype)
        arrays = [cupy.asarray(x) for x in (maps.prediction.astype(dtype), maps.target.astype(np.float32), mask)]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            results = []
            for _ in range(3):
                loss, saved = depth_loss(*arrays, rung=rung)
                results.append((loss, depth_loss_backward(cupy.full(1, -1.5, "float32"), arrays[0], saved)))
            stream.synchronize()
        loss, gradient = (cupy.asnumpy(x) for x in results[0])
        for again, gradient_again in results[1:]:
            np.testing.assert_array_equal(cupy.asnumpy(again), loss)
            np.testing.assert_array_equal(cupy.asnumpy(gradient_again), gradient)
        residual = plain.ALIGNMENTS["median"](*maps)[0]
        clear = distance_to_kinks(residual, mask) > 2 * bounds(maps, rung)[2]
        assert_within_rounding(maps, rung, loss[0], gradient, clear)
