"""kernels/confusion: counts against the reference, exactly, under every order of threads; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import host
from kernels.confusion import MOST_BLOCK_PIXELS, _block_pixels, confusion
from reference.metrics import confusion as reference_confusion

RUNGS = pytest.mark.parametrize("rung", [1, 2, 3])
IDS = ["uint8", "int32", "int64"]
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30))


def guarded(values: np.ndarray) -> np.ndarray:
    """A copy between pixels of class 0: who reads beyond either end counts them."""
    padded = np.zeros(values.size + 128, values.dtype)
    inner = padded[64:-64].reshape(values.shape)
    inner[...] = values
    return inner


def draw(shape: tuple[int, ...], classes: int, dtypes: tuple[str, str], ignore_index: int, region: int, seed: int):
    """A prediction and a label, in runs of `region` equal pixels; some do not count, and there the prediction may be no class."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    prediction, label = (np.repeat(rng.integers(0, classes, -(-size // region)), region)[:size] for _ in range(2))
    ignored = rng.random(size) < 0.2
    label[ignored] = ignore_index
    prediction[ignored] = np.where(rng.random(size) < 0.5, 250, prediction)[ignored]
    return tuple(guarded(a.reshape(shape).astype(dtype)) for a, dtype in zip((prediction, label), dtypes, strict=True))


@RUNGS
@settings(max_examples=40)
@given(
    shape=SHAPES,
    classes=st.integers(1, 156),
    dtypes=st.tuples(*[st.sampled_from(IDS)] * 2),
    ignore_index=st.sampled_from([255, 0]),
    region=st.sampled_from([1, 7, 3000]),
    seed=st.integers(0, 2**32 - 1),
)
@example(shape=(1, 1, 1), classes=1, dtypes=("uint8", "uint8"), ignore_index=0, region=1, seed=0)
@example(shape=(3, 45, 33), classes=156, dtypes=("int64", "uint8"), ignore_index=255, region=1, seed=1)
@example(shape=(1, 97, 101), classes=3, dtypes=("uint8", "int32"), ignore_index=255, region=2, seed=2)
def test_kernel_confusion_is_the_references(rung, shape, classes, dtypes, ignore_index, region, seed):
    prediction, label = draw(shape, classes, dtypes, ignore_index, region, seed)
    with host.schedule(seed):
        counts = confusion(prediction, label, classes, ignore_index, rung=rung)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, reference_confusion(prediction, label, classes, ignore_index))


@RUNGS
@settings(max_examples=5)
@given(shape=SHAPES, classes=st.integers(1, 20), region=st.sampled_from([1, 50]), seed=st.integers(0, 2**32 - 1))
@example(shape=(1, 70, 70), classes=5, region=30, seed=0)
def test_kernel_confusion_has_no_race(rung, shape, classes, region, seed):
    prediction, label = draw(shape, classes, ("uint8", "int32"), 255, region, seed)
    with host.schedule(seed, races=True):
        counts = confusion(prediction, label, classes, rung=rung)
    np.testing.assert_array_equal(counts, reference_confusion(prediction, label, classes))


def test_kernel_confusion_blocks_hold_what_16_bits_count():
    assert _block_pixels(1) == _block_pixels(2**21) == 4096
    assert _block_pixels(2**24) == 2**15
    for pixels in (2**21, 2**21 + 1, 2**24, 512 * 65280, 512 * 65280 + 1, 2**31 - 1):
        assert 4096 <= _block_pixels(pixels) <= MOST_BLOCK_PIXELS <= 65535
        assert _block_pixels(pixels) % 256 == 0
    assert _block_pixels(512 * 65280) == _block_pixels(2**31 - 1) == MOST_BLOCK_PIXELS


def test_kernel_confusion_full_counters_share_a_word(monkeypatch):
    """The largest block counts each of its pixels in one half of a word, and the next block in the other half."""
    monkeypatch.setattr("kernels.confusion.BLOCK_PIXELS", MOST_BLOCK_PIXELS)
    for first in (0, 1):
        prediction = np.full((2, MOST_BLOCK_PIXELS), first, np.uint8)
        prediction[1] = 1 - first
        label = np.zeros_like(prediction)
        np.testing.assert_array_equal(confusion(prediction, label, 2, rung=3), [[MOST_BLOCK_PIXELS] * 2, [0, 0]])
    prediction[0, ::2] = 0  # both halves in one block
    expected = [[MOST_BLOCK_PIXELS * 3 // 2, MOST_BLOCK_PIXELS // 2], [0, 0]]
    np.testing.assert_array_equal(confusion(prediction, label, 2, rung=3), expected)


@pytest.mark.parametrize("classes", [157, 300])
def test_kernel_confusion_of_many_classes_takes_no_shared_memory(classes):
    prediction, label = draw((2, 9, 11), classes, ("int32", "int64"), -1, 3, 0)
    np.testing.assert_array_equal(confusion(prediction, label, classes, -1), reference_confusion(prediction, label, classes, -1))
    with pytest.raises(ValueError, match=f"num_classes is {classes}, expected at most 156 for rung 3"):
        confusion(prediction, label, classes, -1, rung=3)


def test_kernel_confusion_takes_the_fastest_rung_that_can(monkeypatch):
    launched = []
    monkeypatch.setattr("kernels.confusion.launch", lambda source, template, *rest: launched.append((template, *rest)))
    label = np.zeros((1, 100, 100), np.uint8)
    for classes in (150, 156, 157):
        confusion(label, label, classes)
    assert [call[0] for call in launched] == ["confusion_shared", "confusion_shared", "confusion_matching"]
    assert launched[1][-2] == 156 * 156 * 2 <= 48 * 1024 < 157 * 157 * 2
    assert launched[0][1] == (3, 1, 1)


@RUNGS
@pytest.mark.parametrize("name", ["label", "prediction"])
@pytest.mark.parametrize(
    ("dtype", "wrong"), [("uint8", 4), ("uint8", 254), ("int32", -1), ("int64", 2**32 + 1), ("int64", -(2**40))]
)
def test_kernel_confusion_names_the_first_id_that_is_no_class(rung, name, dtype, wrong):
    """As the reference does; and keeps what was counted before."""
    maps = {"prediction": np.zeros((2, 50, 70), dtype), "label": np.zeros((2, 50, 70), dtype)}
    maps["label"][0, 0, 0], maps["prediction"][0, 0, 0] = 255, 99
    maps[name][0, 1, 5], maps[name][1, 40, 60] = wrong, 7
    out = np.arange(16).reshape(4, 4)
    with host.schedule(11), pytest.raises(ValueError, match=f"^the {name} holds {wrong}: expected a class from 0 to 3$"):
        confusion(**maps, num_classes=4, rung=rung, out=out)
    with pytest.raises(ValueError, match=f"^the {name} holds {wrong}: expected a class from 0 to 3$"):
        reference_confusion(**maps, num_classes=4)
    np.testing.assert_array_equal(out.ravel(), np.arange(16))
    maps["label"][0, 0, 1] = 5
    with pytest.raises(ValueError, match="^the label holds 5: expected"):
        confusion(**maps, num_classes=4, rung=rung)


def test_kernel_confusion_writes_what_it_is_given():
    prediction, label = draw((2, 9, 11), 7, ("uint8", "uint8"), 255, 3, 0)
    out = np.full((7, 7), -5)
    assert confusion(prediction, label, 7, out=out) is out
    np.testing.assert_array_equal(out, reference_confusion(prediction, label, 7))


def ids(shape=(2, 4, 5), dtype: object = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype)


READ_ONLY = ids((3, 3), np.int64)
READ_ONLY.flags.writeable = False
SHARED = ids((100,), np.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: confusion([[0]], ids(), 3), TypeError, "prediction is a builtins.list, expected a NumPy or a CuPy array"),
        (lambda: confusion(ids(), [[0]], 3), TypeError, "label is a builtins.list"),
        (
            lambda: confusion(ids(dtype=np.float32), ids(), 3),
            TypeError,
            "prediction has dtype .*float32.*, expected one of uint8, int32",
        ),
        (lambda: confusion(ids(), ids(dtype=np.int16), 3), TypeError, "label has dtype .*int16"),
        (lambda: confusion(ids(), ids(dtype=">i8"), 3), TypeError, "label has dtype >i8"),
        (lambda: confusion(ids((2, 5, 4)), ids(), 3), ValueError, r"prediction has shape \(2, 5, 4\), expected \(2, 4, 5\)"),
        (lambda: confusion(ids((0, 4)), ids((0, 4)), 3), ValueError, r"label has shape \(0, 4\), which is empty"),
        (lambda: confusion(ids()[..., ::2], ids((2, 4, 3)), 3), ValueError, "prediction has strides"),
        (
            lambda: confusion(ids(), np.broadcast_to(np.uint8(0), (2**16, 2**15)), 3),
            ValueError,
            "label has shape .* fewer than 2\\^31",
        ),
        (
            lambda: confusion(ids(), np.frombuffer(b"\0" * 161, np.uint8)[1:].view(np.int32).reshape(2, 4, 5), 3),
            ValueError,
            "label begins at an address",
        ),
        (lambda: confusion(ids(), ids(), 0), ValueError, "num_classes is 0, expected a whole number from 1 to 46340"),
        (lambda: confusion(ids(), ids(), 46341), ValueError, "num_classes is 46341"),
        (lambda: confusion(ids(), ids(), 3.0), ValueError, "num_classes is 3.0"),
        (lambda: confusion(ids(), ids(), 3, 2**31), ValueError, "ignore_index is 2147483648"),
        (lambda: confusion(ids(), ids(), 3, -(2**31)), ValueError, "ignore_index is -2147483648"),
        (lambda: confusion(ids(), ids(), 3, rung=0), ValueError, "rung is 0, expected a whole number from 1 to 3"),
        (lambda: confusion(ids(), ids(), 3, rung=4), ValueError, "rung is 4"),
        (lambda: confusion(ids(), ids(), 3, out=ids((3, 3), np.int32)), TypeError, "out has dtype .*int32.*, expected int64"),
        (lambda: confusion(ids(), ids(), 3, out=ids((3, 4), np.int64)), ValueError, r"out has shape \(3, 4\), expected \(3, 3\)"),
        (lambda: confusion(ids(), ids(), 3, out=READ_ONLY), ValueError, "out is read-only"),
        (
            lambda: confusion(SHARED[:10].reshape(2, 5), ids((2, 5)), 3, out=SHARED[9:18].reshape(3, 3)),
            ValueError,
            "out overlaps prediction",
        ),
        (
            lambda: confusion(ids((2, 5)), SHARED[8:18].reshape(2, 5), 3, out=SHARED[:9].reshape(3, 3)),
            ValueError,
            "out overlaps label",
        ),
    ],
)
def test_kernel_confusion_names_what_is_wrong(monkeypatch, call, error, words):
    def refuse(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr("kernels.confusion.launch", refuse)
    with pytest.raises(error, match=words):
        call()


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")


def test_kernel_confusion_names_the_device_that_differs(cupy):
    memory = cupy.cuda.UnownedMemory(2**20, 2**20, None, 0)  # an address, not memory: no check may follow it
    on_gpu = cupy.ndarray((2, 4, 5), "uint8", cupy.cuda.MemoryPointer(memory, 0))
    with pytest.raises(ValueError, match="prediction is on GPU 0 and label on the host, expected one place"):
        confusion(on_gpu, ids(), 3)


@pytest.mark.gpu
@RUNGS
def test_kernel_confusion_on_the_gpu_is_the_references(cupy, rung):
    for shape, classes, region in (
        ((1, 1, 1), 1, 1),
        ((3, 45, 33), 156, 1),
        ((8, 480, 480), 150, 100),
        ((64, 640, 480), 2, 10**7),
    ):
        prediction, label = draw(shape, classes, ("int64", "uint8"), 255, region, 0)
        with cupy.cuda.Stream(non_blocking=True):
            counts = confusion(cupy.asarray(prediction), cupy.asarray(label), classes, rung=rung)
            np.testing.assert_array_equal(cupy.asnumpy(counts), reference_confusion(prediction, label, classes))
    bad = cupy.asarray(np.full((1, 1, 1), 200, np.uint8))
    with pytest.raises(ValueError, match="the label holds 200"):
        confusion(bad, bad, 150, rung=rung)
