"""kernels/reassemble: bias, readout and GELU from tokens to a map, and the gradients, against the reference's Read in float64."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import host
from kernels.reassemble import ReadGradients, read_project, read_project_backward
from kernels.source import FOLDER
from reference import nn
from reference.embed import map_of
from reference.nn.gelu import MILLS
from reference.reassemble import read_project as reference_read_project
from tests.equality import assert_same
from tests.guarded import LOW, U, assert_rounded, guarded, untouched
from tests.test_kernels_host import sanitized

LAYOUT_RUNG = [("channels_first", 1), ("channels_first", 2), ("channels_last", 2)]


class Case(NamedTuple):
    """One call: B, D, h, w, how the kernel is chosen, where arrays begin, and how it is scheduled."""

    batch: int
    width: int
    height: int
    columns: int
    layout: str = "channels_first"
    rung: int = 2
    shift: int = 0  # elements that arrays begin after a multiple of 16 bytes
    seed: int = 0


CASES = st.builds(
    lambda layout_rung, batch, width, grid, shift, seed: Case(batch, width, *grid, *layout_rung, shift, seed),
    st.sampled_from(LAYOUT_RUNG),
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 64, 72])),
    st.one_of(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.sampled_from([(4, 4), (8, 9), (2, 32), (5, 16)])),
    st.sampled_from([0, 0, 1]),
    st.integers(0, 2**32 - 1),
)
# One element; squares that are exactly full and one more, of every dtype's side; vectors on one side alone.
CORNERS = [
    (1, 1, 1, 1),
    (2, 64, 8, 8),
    (1, 65, 5, 13),
    (1, 32, 3, 11),
    (2, 16, 4, 4),
    (1, 17, 1, 17),
    (1, 24, 3, 3),
    (1, 9, 4, 6),
]


def with_corners(test):
    for sizes in CORNERS:
        for layout, rung in LAYOUT_RUNG:
            test = example(case=Case(*sizes, layout, rung))(test)
    return given(case=CASES)(test)


def draw(case: Case, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """dout (B, D, h, w), tokens, readout, bias: GELU both where it bends and where it is flat."""
    rng = np.random.default_rng(case.seed)
    batch, width, height, columns = case[:4]
    scale = rng.choice([0.01, 1.0, 4.0])
    shapes = ((batch, width, height, columns), (batch, height * columns, width), (batch, width), (width,))
    return tuple(
        (factor * rng.standard_normal(s)).astype(dtype) for factor, s in zip((1.0, scale, 1.0, 1.0), shapes, strict=True)
    )


def laid_out(case: Case, array: np.ndarray) -> np.ndarray:
    return guarded(array.transpose(0, 2, 3, 1) if case.layout == "channels_last" else array, case.shift)


def channels_first(case: Case, array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 3, 1, 2) if case.layout == "channels_last" else array


def forward(case: Case, dtype: np.dtype, races: bool = False) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """What was drawn, and the map (B, D, h, w) that the kernel makes of it."""
    drawn = draw(case, dtype)
    inputs = [guarded(array, case.shift) for array in drawn[1:]]
    out = laid_out(case, np.full_like(drawn[0], np.nan))
    with host.schedule(case.seed, races):
        assert read_project(*inputs, case[2:4], out, layout=case.layout, rung=case.rung) is out
    assert untouched(out)
    for array, copy in zip(drawn[1:], inputs, strict=True):
        np.testing.assert_array_equal(array, copy)
    return drawn, channels_first(case, out)


def backward(case: Case, dtype: np.dtype, races: bool = False) -> tuple[tuple[np.ndarray, ...], ReadGradients]:
    drawn = draw(case, dtype)
    inputs = [laid_out(case, drawn[0]), *(guarded(array, case.shift) for array in drawn[1:])]
    out = ReadGradients(*(guarded(np.full_like(array, np.nan), case.shift) for array in drawn[1:]))
    with host.schedule(case.seed, races):
        result = read_project_backward(*inputs, out, layout=case.layout, rung=case.rung)
    for array, given_ in zip(result, out, strict=True):
        assert array is given_ and untouched(given_)
    for array, copy in zip(drawn[1:], inputs[1:], strict=True):
        np.testing.assert_array_equal(array, copy)
    return drawn, result


def exact(drawn: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, ReadGradients, np.ndarray]:
    """In float64: what GELU is applied to (B, N, D), the map, the gradients, and that of each token's product (B, N, D)."""
    dout, tokens, readout, bias = (array.astype(np.float64) for array in drawn)
    mixed = tokens + readout[:, None] + bias
    y, gelu_vjp = nn.gelu(mixed)
    dmixed = gelu_vjp(np.ascontiguousarray(dout.reshape(*dout.shape[:2], -1).transpose(0, 2, 1)))
    gradients = ReadGradients(dmixed, dmixed.sum(axis=1), dmixed.sum(axis=(0, 1)))
    return mixed, map_of(y, dout.shape[2:]), gradients, dout.reshape(*dout.shape[:2], -1).transpose(0, 2, 1)


@with_corners
def test_kernel_read_project_is_the_formula(case):
    drawn, out = forward(case, np.dtype(np.float64))
    assert_same(out, exact(drawn)[1])


@with_corners
def test_kernel_read_project_backward_is_the_gradient(case):
    drawn, gradients = backward(case, np.dtype(np.float64))
    for actual, expected, name in zip(gradients, exact(drawn)[2], ReadGradients._fields, strict=True):
        scale = float(np.abs(exact(drawn)[2].dtokens).sum())  # a sum of both signs may nearly cancel
        assert_same(actual, expected, scale=scale, what=name)


def test_kernel_read_project_is_the_references():
    """With the two products done by hand, it is equation 5 as the reference has it, vjp included."""
    rng = np.random.default_rng(5)
    tokens, dout = rng.standard_normal((2, 13, 10)), rng.standard_normal((2, 10, 3, 4))
    params = {"x.readout.weight": rng.standard_normal((10, 20)), "x.readout.bias": rng.standard_normal(10)}
    read, vjp = reference_read_project(params, "x", tokens, 1)
    weight, bias = params["x.readout.weight"], params["x.readout.bias"]
    products = tokens[:, 1:] @ weight[:, :10].T, tokens[:, 0] @ weight[:, 10:].T, bias
    assert_same(read_project(*products, (3, 4)), map_of(read, (3, 4)))
    dtokens, grads = vjp(np.ascontiguousarray(dout.reshape(2, 10, 12).transpose(0, 2, 1)))
    gradients = read_project_backward(dout, *products)
    assert_same(gradients.dtokens @ weight[:, :10], dtokens[:, 1:])
    assert_same(gradients.dreadout @ weight[:, 10:], dtokens[:, 0])
    assert_same(gradients.dbias, grads["x.readout.bias"])


def law_error(mixed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """phi, and what float32 may err by in Phi and in x phi, for x as it was rounded.

    The tail exp(-u^2 / 2) P(u) / Q(u): up to 8 and 10 roundings in the polynomials of positive terms, 2 of their coefficients, 4
    units in the last place (2^-23) of the quotient and the exponential together, 1 of their product, under 1 of the
    approximation: 30.
    The exponent is rounded once as a square and twice on a GPU, as a multiple of log 2: 3 u^2 / 2. Phi itself once more.
    """
    u = np.abs(mixed)
    density = np.exp(-0.5 * mixed**2) / np.sqrt(2 * np.pi)
    tail = nn.gelu(-u)[0] / -np.maximum(u, 1e-300)
    relative = (30 + 1.5 * u**2) * U
    underflow = 2.0**-140  # numbers below 2^-126 have fewer digits
    return density, tail * relative + (mixed > 0) * U + underflow, u * (density * relative + underflow)


def input_error(drawn: tuple[np.ndarray, ...]) -> np.ndarray:
    """What x = tokens + (readout + bias) errs by: two roundings."""
    _, tokens, readout, bias = (np.abs(array.astype(np.float64)) for array in drawn)
    return 2 * U * (tokens + readout[:, None] + bias)


def assert_forward(drawn: tuple[np.ndarray, ...], out: np.ndarray) -> None:
    """x Phi(x) errs by its slope, at most 1.13, times the error of x; by x times that of Phi; and by its own rounding."""
    mixed, expected, _, _ = exact(drawn)
    _, of_phi, _ = law_error(mixed)
    allowed = 1.13 * input_error(drawn) + np.abs(mixed) * of_phi
    assert_rounded(out, expected, 1.01 * map_of(allowed, out.shape[2:]) + U * np.abs(expected))


def assert_backward(drawn: tuple[np.ndarray, ...], gradients: ReadGradients) -> None:
    """The slope Phi + x phi changes by at most 0.8 per unit of x; it is a sum and is multiplied: two more roundings.

    A sum of n terms errs by n roundings of the sum of the absolute terms, on top of what each errs by.
    """
    mixed, _, expected, received = exact(drawn)
    density, of_phi, of_product = law_error(mixed)
    slope = np.abs(nn.gelu(mixed)[1](np.ones_like(mixed)))
    parts = 0.8 * input_error(drawn) + of_phi + of_product + 3 * U * (slope + np.abs(mixed) * density)
    allowed = 1.01 * np.abs(received) * parts + 2 * U * np.abs(expected.dtokens)
    assert_rounded(gradients.dtokens, expected.dtokens, allowed)
    for axes, actual, value in (((1,), gradients.dreadout, expected.dreadout), ((0, 1), gradients.dbias, expected.dbias)):
        count = int(np.prod([mixed.shape[axis] for axis in axes]))
        terms = count * U * np.abs(expected.dtokens).sum(axis=axes)
        assert_rounded(actual, value, 1.01 * (allowed.sum(axis=axes) + terms))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@with_corners
def test_kernel_read_project_rounds_as_its_dtype_must(dtype, case):
    assert_forward(*forward(case, dtype))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@with_corners
def test_kernel_read_project_backward_rounds_as_its_dtype_must(dtype, case):
    assert_backward(*backward(case, dtype))


def test_kernel_gelu_has_the_references_coefficients():
    """A digit too few would pass below the bound of the roundings."""
    mills = MILLS[np.dtype(np.float32)]
    written = [float(number) for number in re.findall(r"(\d+\.\d{6,})f", (FOLDER / "normal.cuh").read_text(encoding="utf-8"))]
    assert written == [*mills.p[::-1], *mills.q[-2::-1], float(f"{1 / np.sqrt(2 * np.pi):.18f}")]


def test_kernel_gelu_keeps_its_tail():
    """Every x from -20 to 20: relative accuracy far into the left tail, and no step where the polynomials end."""
    x = np.linspace(-20, 20, 20001).astype(np.float32).reshape(1, -1, 1)
    zero = np.zeros((1, 1), np.float32)
    assert_forward((np.ones((1, 1, 1, x.size), np.float32), x, zero, zero[0]), read_project(x, zero, zero[0], (1, x.size)))
    dout = np.ones((1, 1, 1, x.size), np.float32)
    assert_backward((dout, x, zero, zero[0]), read_project_backward(dout, x, zero, zero[0]))
    special = np.array([np.nan, np.inf, 60.0, -60.0], np.float32).reshape(1, -1, 1)
    np.testing.assert_equal(read_project(special, zero, zero[0], (1, 4)).ravel(), np.float32([np.nan, np.inf, 60, 0]))


@settings(max_examples=8)
@given(case=CASES, dtype=st.sampled_from([np.dtype(np.float32), np.dtype(np.float16)]))
def test_kernel_read_project_has_no_race_and_one_order_of_sums(case, dtype):
    _, plain = forward(case, dtype)
    _, watched = forward(case, dtype, races=True)
    np.testing.assert_array_equal(plain, watched)
    drawn, gradients = backward(case, dtype)
    dout = np.ascontiguousarray(drawn[0].transpose(0, 2, 3, 1)) if case.layout == "channels_last" else drawn[0]
    aligned = guarded(dout, case.shift), *(guarded(array, case.shift) for array in drawn[1:])
    in_order = read_project_backward(*aligned, layout=case.layout, rung=case.rung)  # seed 0
    for watched_, result, again in zip(backward(case, dtype, races=True)[1], gradients, in_order, strict=True):
        np.testing.assert_array_equal(watched_, result)
        np.testing.assert_array_equal(again, result)


def test_kernel_read_project_stays_within_its_arrays():
    """Under the sanitizers, which see also what is read beyond an array and not used, and unaligned pieces of 16 bytes."""
    done = sanitized("""
import numpy as np
from kernels.reassemble import read_project, read_project_backward
from tests.guarded import off
for batch, width, grid in [(1, 1, (1, 1)), (2, 72, (8, 9)), (1, 24, (3, 3)), (1, 9, (4, 6)), (2, 16, (4, 4))]:
    for dtype, apart in [(np.float64, 0), *((np.float16, apart) for apart in range(6))]:
        for layout, rung in [("channels_first", 1), ("channels_first", 2), ("channels_last", 2)]:
            shapes = (batch, grid[0] * grid[1], width), (batch, width), (width,)
            arrays = [off(shape, dtype, apart == which) for which, shape in enumerate(shapes, 1)]
            shape = (batch, width, *grid) if layout == "channels_first" else (batch, *grid, width)
            y = read_project(*arrays, grid, off(shape, dtype, apart == 4), layout=layout, rung=rung)
            out = [off(shape, dtype, apart == 5) for shape in shapes]
            read_project_backward(y, *arrays, out, layout=layout, rung=rung)
print("survived")
""")
    assert done.stdout == "survived\n", done.stderr


def ones(*shape: int, dtype: object = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


T, R, B, MAP = ones(2, 6, 5), ones(2, 5), ones(5), ones(2, 5, 2, 3)
BUFFER = np.zeros(300, np.float32)
READ_ONLY = ones(2, 5, 2, 3)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: read_project([1.0], R, B, (2, 3)), TypeError, "tokens is a builtins.list"),
        (lambda: read_project(T, R.astype(np.float16), B, (2, 3)), TypeError, "readout has dtype float16 and tokens float32"),
        (lambda: read_project(T.astype(int), R, B, (2, 3)), TypeError, "tokens has dtype .*int64"),
        (lambda: read_project(T[0], R, B, (2, 3)), ValueError, r"tokens has shape \(6, 5\), expected \(B, N, D\)"),
        (lambda: read_project(T, ones(1, 5), B, (2, 3)), ValueError, r"readout has shape \(1, 5\) .*, expected \(2, 5\)"),
        (lambda: read_project(T, R, ones(4), (2, 3)), ValueError, r"bias has shape \(4,\) .*, expected \(5,\)"),
        (lambda: read_project(T, R, B, (2, 2)), ValueError, r"grid is \(2, 2\), expected two positive .* tokens, 6"),
        (lambda: read_project(T, R, B, (-2, -3)), ValueError, "grid is"),
        (lambda: read_project(T, R, B, (2.0, 3)), ValueError, "grid is"),
        (lambda: read_project(T, R, B, 6), ValueError, "grid is 6"),
        (lambda: read_project(T[:, ::2], R, B, (1, 3)), ValueError, "tokens has strides .* C-contiguous"),
        (lambda: read_project(T[:0], R[:0], B, (2, 3)), ValueError, "tokens has shape .* empty"),
        (lambda: read_project(T, R, B, (2, 3), rung=3), ValueError, "rung is 3, expected a whole number from 1 to 2"),
        (
            lambda: read_project(T, R, B, (2, 3), layout="hwc"),
            ValueError,
            "layout is 'hwc', expected one of channels_first, chann",
        ),
        (
            lambda: read_project(T, R, B, (2, 3), layout="channels_last", rung=1),
            ValueError,
            "rung is 1, expected more: channels last",
        ),
        (lambda: read_project(T, R, B, (2, 3), ones(2, 5, 3, 2)), ValueError, r"out has shape .*, expected \(2, 5, 2, 3\)"),
        (lambda: read_project(T, R, B, (2, 3), READ_ONLY), ValueError, "out is read-only"),
        (
            lambda: read_project(BUFFER[:60].reshape(2, 6, 5), R, B, (2, 3), BUFFER[59:119].reshape(2, 5, 2, 3)),
            ValueError,
            "out overlaps tokens",
        ),
        (lambda: read_project_backward(MAP[0], T, R, B), ValueError, "dout has shape .* four dimensions"),
        (lambda: read_project_backward(MAP, T, R, B, layout="channels_last"), ValueError, "expected a map of these tokens"),
        (lambda: read_project_backward(ones(2, 5, 2, 2), T, R, B), ValueError, "expected a map of these tokens"),
        (lambda: read_project_backward(ones(2, 4, 2, 3), T, R, B), ValueError, "expected a map of these tokens"),
        (lambda: read_project_backward(MAP.astype(np.float16), T, R, B), TypeError, "tokens has dtype float32 and dout float16"),
        (lambda: read_project_backward(MAP, T, R, B, rung=0), ValueError, "rung is 0"),
        (lambda: read_project_backward(MAP, T, R, B, (T.copy(), R.copy(), ones(4))), ValueError, r"dbias has shape \(4,\)"),
        (
            lambda: read_project_backward(MAP, T, R, B, (T.copy(), BUFFER[:10].reshape(2, 5), BUFFER[9:14])),
            ValueError,
            "dbias over",
        ),
        (lambda: read_project_backward(MAP, T, R, B, (T, R.copy(), B.copy())), ValueError, "dtokens overlaps tokens"),
    ],
)
def test_kernel_read_project_names_what_is_wrong(monkeypatch, call, error, words):
    def refuse(*arguments: object) -> None:
        pytest.fail("launched")

    monkeypatch.setattr("kernels.reassemble.launch_each", refuse)
    monkeypatch.setattr("kernels.reassemble.launch", refuse)
    with pytest.raises(error, match=words):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize(("layout", "rung"), LAYOUT_RUNG)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_kernel_read_project_on_the_gpu_is_within_the_bound(dtype, layout, rung):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install cupy-cuda13x")
    for seed, sizes in enumerate([*CORNERS, (3, 200, 7, 11), (2, 1024, 24, 24)]):
        case = Case(*sizes, layout, rung, seed=seed)
        drawn = draw(case, dtype)
        on_gpu = [cupy.asarray(array) for array in (laid_out(case, drawn[0]), *drawn[1:])]
        out = read_project(*on_gpu[1:], sizes[2:], layout=layout, rung=rung)
        gradients = [read_project_backward(*on_gpu, layout=layout, rung=rung) for _ in range(2)]
        assert_forward(drawn, channels_first(case, cupy.asnumpy(out)))
        assert_backward(drawn, ReadGradients(*map(cupy.asnumpy, gradients[0])))
        for first, second in zip(*gradients, strict=True):
            np.testing.assert_array_equal(cupy.asnumpy(first), cupy.asnumpy(second))
