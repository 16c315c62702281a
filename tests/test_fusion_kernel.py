"""kernels/fusion: upsampling with the residual add, and its gradient, against torch in float64; and what its wrappers refuse."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels import launch
from kernels.fusion import upsample_add, upsample_backward
from tests.equality import assert_same

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOW = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16]
U = 2.0**-24  # the relative rounding error of float32

# (batch, channels, height, width, out_height, out_width): multiples of nothing, larger, smaller, equal, and one pixel.
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), *[st.integers(1, 11)] * 2, *[st.integers(1, 17)] * 2)
CORNERS = [(1, 1, 1, 1, 1, 1), (2, 1, 5, 7, 5, 7), (1, 2, 6, 5, 1, 1), (1, 1, 1, 1, 4, 9), (1, 1, 2, 300, 1, 40009)]


def with_corners(test):
    """Draw shapes and seeds, and always try CORNERS; float32 positions on the last one's axis would be a hundred bounds off."""
    for shape in CORNERS:
        test = example(shape=shape, seed=0)(test)
    return given(shape=SHAPES, seed=st.integers(0, 2**32 - 1))(test)


def guarded(values: np.ndarray) -> np.ndarray:
    """A copy between NaNs: a read beyond either end spoils the result, and `untouched` finds a write."""
    padded = np.full(values.size + 128, np.nan, values.dtype)
    inner = padded[64:-64].reshape(values.shape)
    inner[...] = values
    return inner


def untouched(inner: np.ndarray) -> bool:
    return bool(np.isnan(inner.base[:64].astype(float)).all() and np.isnan(inner.base[-64:].astype(float)).all())


def draw(shape: tuple[int, ...], seed: int, dtype: np.dtype, forward: bool) -> tuple[np.ndarray, ...]:
    """Arrays for one call, inputs and an output full of NaN, all guarded."""
    rng = np.random.default_rng(seed)
    small, large = (*shape[:2], *shape[2:4]), (*shape[:2], *shape[4:])
    scale = 2.0 ** rng.integers(-20, 4)  # down to the subnormal numbers of float16
    shapes = (small, large) if forward else (large,)
    inputs = [guarded((scale * rng.standard_normal(s)).astype(dtype)) for s in shapes]
    return *inputs, guarded(np.full(large if forward else small, np.nan, dtype))


def torch_upsample(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    wide = torch.from_numpy(x.astype(np.float64))
    return torch.nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=True).numpy()


def torch_backward(dout: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = torch.zeros((*dout.shape[:2], *size), dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.interpolate(x, size=dout.shape[2:], mode="bilinear", align_corners=True)
    (dx,) = torch.autograd.grad(y, x, torch.from_numpy(dout.astype(np.float64)))
    return dx.numpy()


def assert_within(actual: np.ndarray, expected: np.ndarray, terms: np.ndarray, roundings: int) -> None:
    """Float32 arithmetic, then one rounding to the result's dtype.

    Each term meets at most `roundings` float32 roundings, so the sum errs by `roundings` * 2^-24 of the sum of the absolute
    `terms`; then at most half a unit in the last place, or half the smallest subnormal number, of the result's dtype.
    """
    allowed = roundings * U / (1 - roundings * U) * terms
    if actual.dtype != np.float32:
        kind = ml_dtypes.finfo(actual.dtype)
        allowed = allowed + np.maximum(float(kind.eps) / 2 * (np.abs(expected) + allowed), float(kind.smallest_subnormal) / 2)
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= allowed).all(), f"{actual.dtype} errs by {(error / np.maximum(allowed, 1e-300)).max():.3g} times the bound"


def assert_forward(x: np.ndarray, skip: np.ndarray, out: np.ndarray) -> None:
    # Both weights (one rounding each), both products, both sums, the skip.
    terms = torch_upsample(np.abs(x.astype(float)), skip.shape[2:]) + np.abs(skip.astype(float))
    assert_within(out, torch_upsample(x, skip.shape[2:]) + skip.astype(float), terms, 7)


def assert_backward(dout: np.ndarray, dx: np.ndarray) -> None:
    # Both weights, both products, and as many additions as an element has readers: at most 2 ceil((out-1) / (in-1)) an axis.
    pairs = zip(dx.shape[2:], dout.shape[2:], strict=True)
    readers = [min(large, 2 * -(-(large - 1) // (small - 1))) if small > 1 else large for small, large in pairs]
    size = dx.shape[2:]
    assert_within(dx, torch_backward(dout, size), torch_backward(np.abs(dout.astype(float)), size), sum(readers) + 4)


@with_corners
def test_kernel_upsample_add_is_the_formula(shape, seed):
    x, skip, out = draw(shape, seed, np.dtype(np.float64), forward=True)
    assert upsample_add(x, skip, out) is out
    assert_same(out, torch_upsample(x, skip.shape[2:]) + skip)
    assert untouched(out)
    assert_same(upsample_add(x, skip), out, rtol=0)


@with_corners
def test_kernel_upsample_backward_is_the_gradient(shape, seed):
    dout, dx = draw(shape, seed, np.dtype(np.float64), forward=False)
    assert upsample_backward(dout, dx.shape[2:], dx) is dx
    assert_same(dx, torch_backward(dout, dx.shape[2:]))
    assert untouched(dx)
    assert_same(upsample_backward(dout, dx.shape[2:]), dx, rtol=0)


def test_kernel_positions_are_exact_on_a_long_axis():
    """A ramp is interpolated to the positions themselves, whose numerators pass 2^31.

    (Torch is no witness here: it takes the floor of a position in float32, for float64 maps too.)
    """
    exact = np.array([float(Fraction(i * 49999, 60000)) for i in range(60001)]).reshape(1, 1, 1, -1)
    assert_same(upsample_add(np.arange(50000.0).reshape(1, 1, 1, -1), np.zeros_like(exact)), exact, rtol=1e-14)
    # Its gradient is the transpose: the same numbers, element by element, from the other side.
    dout, x = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 60001))
    x = x[..., :50000].copy()
    dx = upsample_backward(dout, (1, 50000))
    pairing = upsample_add(x, np.zeros_like(dout)) * dout
    assert_same((dx * x).sum(), pairing.sum(), scale=float(np.abs(pairing).sum()), rtol=1e-14)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@with_corners
def test_kernel_upsample_add_rounds_as_its_dtype_must(dtype, shape, seed):
    x, skip, out = draw(shape, seed, dtype, forward=True)
    upsample_add(x, skip, out)
    assert_forward(x, skip, out)
    assert untouched(out)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@with_corners
def test_kernel_upsample_backward_rounds_as_its_dtype_must(dtype, shape, seed):
    dout, dx = draw(shape, seed, dtype, forward=False)
    upsample_backward(dout, dx.shape[2:], dx)
    assert_backward(dout, dx)
    assert untouched(dx)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_kernel_host_types_convert_as_numpy_does(dtype, seed):
    """At equal sizes the kernel computes T(float(x) + float(skip)): every number as x, and sums that are ties, overflow or 0."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype(np.float32))]
    skip = np.random.default_rng(seed).permutation(every)
    if seed == 0:  # neighbours in magnitude, whose sums fall exactly between two numbers half of the time
        skip = np.roll(every, 1)
    shape = (1, 1, 2, every.size // 2)
    with np.errstate(over="ignore"):
        expected = (every.astype(np.float32) + skip.astype(np.float32)).astype(dtype)
    actual = upsample_add(every.reshape(shape), skip.reshape(shape)).ravel()
    np.testing.assert_array_equal(actual.view(np.uint16), expected.view(np.uint16))
    assert np.isinf(actual.astype(np.float32)).any()
    nan = np.full((1, 1, 1, 1), np.nan, dtype)
    assert np.isnan(upsample_add(nan, nan).astype(np.float32)).all()


def maps(shape=(2, 3, 4, 5), dtype: object = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def huge(shape) -> np.ndarray:
    """An array of any shape that takes no memory (so it is not contiguous; its size is looked at first)."""
    return np.broadcast_to(np.float32(0), shape)


SHARED = np.zeros(2000, np.float32)
READ_ONLY = maps((2, 3, 8, 9))
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: upsample_add([[1.0]], maps()), TypeError, "x is a builtins.list, expected a NumPy or a CuPy array"),
        (lambda: upsample_add(maps(), torch.ones(2, 3, 8, 9)), TypeError, "skip is a torch.Tensor"),
        (lambda: upsample_add(maps(dtype=np.int32), maps()), TypeError, "x has dtype .*int32.*, expected one of float32"),
        (lambda: upsample_add(maps(dtype=">f4"), maps(dtype=">f4")), TypeError, "x has dtype >f4"),
        (lambda: upsample_add(maps(), maps(dtype=np.float16)), TypeError, "skip has dtype float16 and x float32"),
        (lambda: upsample_add(maps((3, 4, 5)), maps()), ValueError, r"x has shape \(3, 4, 5\), expected \(B, C, H, W\)"),
        (lambda: upsample_add(maps(), maps((2, 4, 8, 9))), ValueError, r"\(2, 3, 4, 5\) and skip \(2, 4, 8, 9\)"),
        (lambda: upsample_add(maps((2, 3, 0, 5)), maps()), ValueError, r"x has shape \(2, 3, 0, 5\), which is empty"),
        (lambda: upsample_add(maps().transpose(0, 1, 3, 2), maps()), ValueError, "x has strides .* C-contiguous"),
        (lambda: upsample_add(maps(), maps()[..., ::2]), ValueError, "skip has strides"),
        (lambda: upsample_add(maps(), huge((1, 1, 2**16, 2**15))), ValueError, "skip has shape .* fewer than 2\\^31"),
        (lambda: upsample_add(maps(), maps(), maps((2, 3, 4, 6))), ValueError, r"out has shape \(2, 3, 4, 6\), expected"),
        (lambda: upsample_add(maps(), maps(), maps(dtype=np.float16)), TypeError, "out has dtype float16"),
        (lambda: upsample_add(maps(), READ_ONLY, READ_ONLY), ValueError, "out is read-only"),
        (
            lambda: upsample_add(maps(), SHARED[:432].reshape(2, 3, 8, 9), SHARED[431:863].reshape(2, 3, 8, 9)),
            ValueError,
            "out overlaps skip",
        ),
        (
            lambda: upsample_add(SHARED[400:520].reshape(2, 3, 4, 5), maps((2, 3, 8, 9)), SHARED[:432].reshape(2, 3, 8, 9)),
            ValueError,
            "out overlaps x",
        ),
        (
            lambda: upsample_add(np.frombuffer(b"\0" * 81, np.uint8)[1:].view(np.float32).reshape(1, 1, 4, 5), maps()),
            ValueError,
            "x begins at an address that is no multiple of its 4-byte",
        ),
        (lambda: upsample_backward(maps((4, 5)), (2, 2)), ValueError, r"dout has shape \(4, 5\), expected \(B, C, H, W\)"),
        (lambda: upsample_backward(maps(), (2, 0)), ValueError, r"size is \(2, 0\), expected"),
        (lambda: upsample_backward(maps(), (2.5, 2)), ValueError, "size is"),
        (lambda: upsample_backward(maps(), 4), ValueError, "size is 4, expected"),
        (lambda: upsample_backward(maps(), (2**15, 2**15)), ValueError, r"the result has shape .* fewer than 2\^31"),
        (lambda: upsample_backward(maps(), (4, 5), maps((2, 3, 5, 4))), ValueError, r"out has shape \(2, 3, 5, 4\)"),
        (
            lambda: upsample_backward(SHARED[:120].reshape(2, 3, 4, 5), (4, 5), SHARED[119:239].reshape(2, 3, 4, 5)),
            ValueError,
            "out overlaps dout",
        ),
    ],
)
def test_kernel_wrapper_names_what_is_wrong(monkeypatch, call, error, words):
    def refuse(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr("kernels.fusion.launch_each", refuse)
    with pytest.raises(error, match=words):
        call()


def test_kernel_wrapper_accepts_arrays_side_by_side():
    buffer = np.ones(1000, np.float32)
    x, skip, out = buffer[:120].reshape(2, 3, 4, 5), buffer[120:552].reshape(2, 3, 8, 9), buffer[552:984].reshape(2, 3, 8, 9)
    np.testing.assert_allclose(upsample_add(x, skip, out), 2, rtol=1e-6)
    assert (buffer[984:] == 1).all()


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")


def test_kernel_wrapper_names_the_device_that_differs(cupy):
    def on_gpu(device: int, begin: int, dtype: str = "float32", shape=(1, 1, 4, 4)):
        memory = cupy.cuda.UnownedMemory(begin, 2**20, None, device)  # an address, not memory: no check may follow it
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    x, skip = on_gpu(0, 2**20), on_gpu(0, 2**22)
    with pytest.raises(ValueError, match="skip is on the host and x on GPU 0, expected one place"):
        upsample_add(x, maps((1, 1, 4, 4)))
    with pytest.raises(ValueError, match="skip is on GPU 1 and x on GPU 0"):
        upsample_add(x, on_gpu(1, 2**22))
    with pytest.raises(ValueError, match="out is on GPU 1 and x on GPU 0"):
        upsample_add(x, skip, on_gpu(1, 2**23))
    with pytest.raises(ValueError, match="out overlaps skip"):
        upsample_add(x, skip, on_gpu(0, 2**22 + 60))
    with pytest.raises(TypeError, match=r"float64.*, expected one of float32, float16, bfloat16$"):
        upsample_add(on_gpu(0, 2**20, "float64"), skip)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_on_the_gpu_is_that_on_the_host(cupy, dtype):
    """Both stay within the bound, the GPU's by fewer roundings (it fuses multiply and add), on a stream of the caller's."""
    for seed, shape in enumerate([(1, 1, 1, 1, 1, 1), (3, 2, 7, 5, 17, 13), (2, 5, 19, 23, 6, 4), (1, 2, 2, 300, 1, 40009)]):
        x, skip, _ = draw(shape, seed, dtype, forward=True)
        with cupy.cuda.Stream(non_blocking=True) as stream:
            out = upsample_add(cupy.asarray(x), cupy.asarray(skip))
            dx = upsample_backward(cupy.asarray(skip), x.shape[2:])
            stream.synchronize()
        assert_forward(x, skip, upsample_add(x, skip))
        assert_forward(x, skip, cupy.asnumpy(out))
        assert_backward(skip, upsample_backward(skip, x.shape[2:]))
        assert_backward(skip, cupy.asnumpy(dx))


def test_kernel_arrays_are_limited_to_what_int_counts():
    """The limit itself: 2^31 - 1 elements pass the check of the size, and fail the next one, 2^31 do not."""
    with pytest.raises(ValueError, match="C-contiguous"):
        launch.check({"x": huge((2**31 - 1,))})
    with pytest.raises(ValueError, match="2147483648 elements, expected fewer than"):
        launch.check({"x": huge((2**31,))})
