"""kernels/fusion: upsampling with the residual add, and its gradient, against torch in float64; and what its wrappers refuse."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import host, launch
from kernels.fusion import upsample_add, upsample_backward
from reference import nn
from tests.equality import assert_same
from tests.guarded import BFLOAT16, LOW, U, assert_rounded, guarded, untouched
from tests.test_kernels_host import sanitized

# Sizes that are multiples of nothing, and of a vector of 16 bytes.
LENGTH = st.one_of(st.integers(1, 11), st.sampled_from([4, 8, 16]))
OUT_LENGTH = st.one_of(st.integers(1, 17), st.sampled_from([8, 16, 24]))
LAYOUT_RUNG = [("channels_first", 1), ("channels_first", 2), ("channels_last", 2)]


class Case(NamedTuple):
    """One call: the sizes of both maps, how the kernel is chosen, where arrays begin, and how the GPU is filled and scheduled."""

    batch: int
    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    layout: str = "channels_first"
    rung: int = 2
    shift: int = 0  # elements that arrays begin after a multiple of 16 bytes
    threads: int = 2**17  # that fill the GPU: the fewer, the more rows each thread walks down
    seed: int = 0


CASES = st.builds(
    lambda layout_rung, *rest: Case(*rest[:6], *layout_rung, *rest[6:]),
    st.sampled_from(LAYOUT_RUNG),
    st.integers(1, 3),
    LENGTH,
    LENGTH,
    LENGTH,
    OUT_LENGTH,
    OUT_LENGTH,
    st.sampled_from([0, 0, 1]),
    st.sampled_from([1, 50, 2**17]),
    st.integers(0, 2**32 - 1),
)
# (batch, channels, height, width, out_height, out_width): larger, smaller, equal, and one pixel; float32 positions on the last
# one's axis would be a hundred bounds off.
CORNERS = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 5, 7, 5, 7),
    (1, 2, 6, 5, 1, 1),
    (1, 1, 1, 1, 4, 9),
    (1, 1, 2, 300, 1, 40009),
    (1, 1, 300, 2, 9001, 1),
]
CORNERS += [(1, 8, 4, 4, 8, 8), (1, 5, 6, 8, 12, 16), (1, 4, 20, 3, 7, 8), (3, 1, 2, 9, 2, 40), (1, 4, 9, 2, 40, 8)]


def with_corners(test):
    """Draw cases, and always try CORNERS, on every rung and in every layout."""
    for sizes in CORNERS:
        for layout, rung in LAYOUT_RUNG:
            test = example(case=Case(*sizes, layout, rung, threads=1))(test)
    return given(case=CASES)(test)


def draw(case: Case, dtype: np.dtype, forward: bool) -> tuple[np.ndarray, ...]:
    """Arrays for one call, channels first, inputs and an output full of NaN."""
    rng = np.random.default_rng(case.seed)
    small, large = case[:4], (*case[:2], *case[4:6])
    scale = 2.0 ** rng.integers(-20, 4)  # down to the subnormal numbers of float16
    shapes = (small, large) if forward else (large,)
    inputs = [(scale * rng.standard_normal(s)).astype(dtype) for s in shapes]
    return *inputs, np.full(large if forward else small, np.nan, dtype)


def laid_out(case: Case, array: np.ndarray) -> np.ndarray:
    """A guarded copy of a map (B, C, H, W) in the case's layout."""
    return guarded(array.transpose(0, 2, 3, 1) if case.layout == "channels_last" else array, case.shift)


def channels_first(case: Case, array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 3, 1, 2) if case.layout == "channels_last" else array


def run(case: Case, kernel, inputs: Sequence[np.ndarray], out: np.ndarray, races: bool = False) -> np.ndarray:
    """Call a wrapper on guarded copies of these arrays (B, C, H, W); the result, channels first."""
    given_, result = [laid_out(case, array) for array in inputs], laid_out(case, out)
    with pytest.MonkeyPatch.context() as patch, host.schedule(case.seed, races=races):
        patch.setattr("kernels.fusion.THREADS", case.threads)
        assert kernel(*given_, result, layout=case.layout, rung=case.rung) is result
    assert untouched(result)
    for array, copy in zip(inputs, given_, strict=True):
        np.testing.assert_array_equal(channels_first(case, copy), array)
    return channels_first(case, result)


def torch_upsample(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    wide = torch.from_numpy(x.astype(np.float64))
    return torch.nn.functional.interpolate(wide, size=size, mode="bilinear", align_corners=True).numpy()


def torch_backward(dout: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = torch.zeros((*dout.shape[:2], *size), dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.interpolate(x, size=dout.shape[2:], mode="bilinear", align_corners=True)
    (dx,) = torch.autograd.grad(y, x, torch.from_numpy(dout.astype(np.float64)))
    return dx.numpy()


def assert_within(actual: np.ndarray, expected: np.ndarray, terms: np.ndarray, roundings: int) -> None:
    """Each term meets at most `roundings` float32 roundings: the sum errs by that many times 2^-24 of the sum of |`terms`|."""
    assert_rounded(actual, expected, roundings * U / (1 - roundings * U) * terms)


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
def test_kernel_upsample_add_is_the_formula(case):
    x, skip, out = draw(case, np.dtype(np.float64), forward=True)
    out = run(case, upsample_add, (x, skip), out)
    assert_same(out, torch_upsample(x, skip.shape[2:]) + skip)
    assert_same(out, nn.resize_bilinear(x, skip.shape[2:], align_corners=True)[0] + skip)
    assert_same(upsample_add(x, skip), out, rtol=0)  # every rung, in every layout and at every length of a walk: the same sums


@with_corners
def test_kernel_upsample_backward_is_the_gradient(case):
    dout, dx = draw(case, np.dtype(np.float64), forward=False)
    size = dx.shape[2:]
    dx = run(case, lambda dout, out, **how: upsample_backward(dout, case[2:4], out, **how), (dout,), dx)
    assert_same(dx, torch_backward(dout, size))
    assert_same(dx, nn.resize_bilinear(np.zeros_like(dx), dout.shape[2:], align_corners=True)[1](dout))
    assert_same(upsample_backward(dout, size), dx, rtol=0)


@settings(max_examples=10)
@given(case=CASES)
def test_kernel_upsample_has_no_race(case):
    x, skip, out = draw(case, np.dtype(np.float32), forward=True)
    run(case, upsample_add, (x, skip), out, races=True)
    run(
        case,
        lambda dout, out, **how: upsample_backward(dout, case[2:4], out, **how),
        (skip,),
        np.full_like(x, np.nan),
        races=True,
    )


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize(("layout", "rung"), LAYOUT_RUNG)
def test_kernel_upsample_keeps_what_is_not_finite_where_it_belongs(layout, rung, value):
    """A gradient reaches the elements that its output read, with a weight that is not 0, and no other; and so does not NaN."""
    case = Case(1, 8, 5, 4, 9, 7, layout, rung, threads=1)
    for row, readers in ((4, [2]), (3, [1, 2])):  # row 4 falls on row 2 of x exactly, row 3 between two; column 2 on column 1
        dout = np.ones((1, 8, 9, 7))
        dout[0, 3, row, 2] = value
        dx = run(
            case, lambda dout, out, **how: upsample_backward(dout, (5, 4), out, **how), (dout,), np.full((1, 8, 5, 4), np.nan)
        )
        assert [tuple(map(int, index)) for index in np.argwhere(~np.isfinite(dx))] == [(0, 3, reader, 1) for reader in readers]
        np.testing.assert_equal(dx[0, 3, readers, 1], np.full(len(readers), value))
    x, skip = np.ones((1, 8, 5, 4)), np.zeros((1, 8, 9, 7))
    x[0, 3, 2, 1] = value
    out = run(case, upsample_add, (x, skip), np.full_like(skip, np.nan))
    rows, columns = np.meshgrid(np.arange(9), np.arange(7), indexing="ij")
    near = (np.abs(rows - 4) < 2) & (np.abs(columns - 2) < 2)
    assert np.isfinite(out[0, 3][~near]).all() and np.isfinite(np.delete(out, 3, axis=1)).all()
    assert not np.isfinite(out[0, 3][near]).any()


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
def test_kernel_upsample_add_rounds_as_its_dtype_must(dtype, case):
    x, skip, out = draw(case, dtype, forward=True)
    assert_forward(x, skip, run(case, upsample_add, (x, skip), out))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@with_corners
def test_kernel_upsample_backward_rounds_as_its_dtype_must(dtype, case):
    dout, dx = draw(case, dtype, forward=False)
    assert_backward(dout, run(case, lambda dout, out, **how: upsample_backward(dout, case[2:4], out, **how), (dout,), dx))


def test_kernel_upsample_stays_within_its_arrays():
    """Under the sanitizers, which see also what is read beyond an array and not used, and unaligned pieces of 16 bytes."""
    done = sanitized("""
import numpy as np
from kernels import fusion
from tests.guarded import off
fusion.THREADS = 1
for b, c, h, w, H, W in [(1, 8, 4, 4, 8, 8), (3, 5, 5, 3, 13, 7), (1, 3, 9, 4, 2, 40), (2, 4, 2, 8, 16, 16)]:
    for dtype, apart in [(np.float64, 0), *((np.float16, apart) for apart in range(4))]:
        for layout, rung in [("channels_first", 1), ("channels_first", 2), ("channels_last", 2)]:
            small, large = ((b, c, h, w), (b, c, H, W)) if layout == "channels_first" else ((b, h, w, c), (b, H, W, c))
            x, skip, out = (off(shape, dtype, apart == k) for k, shape in ((1, small), (2, large), (3, large)))
            fusion.upsample_add(x, skip, out, layout=layout, rung=rung)
            fusion.upsample_backward(skip, (h, w), x, layout=layout, rung=rung)
print("survived")
""")
    assert done.stdout == "survived\n", done.stderr


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
        (lambda: upsample_add(maps(), maps(), rung=3), ValueError, "rung is 3, expected a whole number from 1 to 2"),
        (lambda: upsample_add(maps(), maps(), rung=0), ValueError, "rung is 0, expected"),
        (lambda: upsample_add(maps(), maps(), rung=True), ValueError, "rung is True, expected"),
        (
            lambda: upsample_add(maps(), maps(), layout="NHWC"),
            ValueError,
            "layout is 'NHWC', expected one of channels_first, chann",
        ),
        (
            lambda: upsample_add(maps(), maps(), layout="channels_last", rung=1),
            ValueError,
            "rung is 1, expected more: channels last",
        ),
        (
            lambda: upsample_add(maps(), maps((2, 3, 4, 6)), layout="channels_last"),
            ValueError,
            "the same batch size and channels",
        ),
        (lambda: upsample_add(maps((3, 4, 5)), maps(), layout="channels_last"), ValueError, r"expected \(B, H, W, C\)"),
        (lambda: upsample_backward(maps(), (4, 5), rung=7), ValueError, "rung is 7"),
        (
            lambda: upsample_backward(maps(), (4, 6), maps((2, 3, 4, 6)), layout="channels_last"),
            ValueError,
            r"expected \(2, 4, 6, 5\)",
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
@pytest.mark.parametrize(("layout", "rung"), LAYOUT_RUNG)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_on_the_gpu_is_that_on_the_host(cupy, dtype, layout, rung):
    """Both stay within the bound, the GPU's by fewer roundings (it fuses multiply and add), on a stream of the caller's."""
    shapes = [(1, 1, 1, 1, 1, 1), (3, 2, 7, 5, 17, 13), (2, 8, 12, 16, 24, 32), (2, 5, 19, 23, 6, 4), (1, 2, 2, 300, 1, 40009)]
    for seed, shape in enumerate([*shapes, (2, 64, 96, 96, 192, 192)]):
        case = Case(*shape, layout, rung, seed=seed)
        x, skip, _ = draw(case, dtype, forward=True)
        on_gpu = [cupy.asarray(laid_out(case, array)) for array in (x, skip)]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            out = upsample_add(*on_gpu, layout=layout, rung=rung)
            dx = upsample_backward(on_gpu[1], x.shape[2:], layout=layout, rung=rung)
            stream.synchronize()
        assert_forward(x, skip, channels_first(case, cupy.asnumpy(out)))
        assert_backward(skip, channels_first(case, cupy.asnumpy(dx)))


def test_kernel_arrays_are_limited_to_what_int_counts():
    """The limit itself: 2^31 - 1 elements pass the check of the size, and fail the next one, 2^31 do not."""
    with pytest.raises(ValueError, match="C-contiguous"):
        launch.check({"x": huge((2**31 - 1,))})
    with pytest.raises(ValueError, match="2147483648 elements, expected fewer than"):
        launch.check({"x": huge((2**31,))})
