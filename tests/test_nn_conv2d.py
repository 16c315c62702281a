"""Convolution and transposed convolution against torch, in both implementations, and the rounding of their float32 forms.

The twin has three ways: Winograd's for a 3x3 kernel at stride 1, which it takes from `_WORTH` positions on; the product of the
weight and the whole matrix of an image's windows, up to `_FEW` positions; and else that product for some positions at a time.
The tests set those numbers to send every case one way.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import reference.nn.conv2d_cython
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from reference import nn
from reference.implementation import use
from reference.nn import memory
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    assert_multilinear_in_float32,
    assert_same_as_torch,
    assert_within,
    implementations,
    layouts,
    normal_arrays,
    results,
    roundings,
    seeds,
)

# What the numbers are set to: the positions from which Winograd's way is taken, and those up to which the whole matrix is made.
WAYS = {"winograd": (0, 0), "windows": (math.inf, 0), "whole": (math.inf, math.inf)}
ways = st.sampled_from(sorted(WAYS))


@contextmanager
def taking(way: str) -> Iterator[None]:
    """The twin takes this way; Winograd's where that is possible, and else that of some windows at a time."""
    worth, few = WAYS[way]
    module = reference.nn.conv2d_cython
    with mock.patch.object(module, "_WORTH", worth), mock.patch.object(module, "_FEW", few):
        yield


class Case(NamedTuple):
    shapes: tuple[tuple[int, ...], ...]  # of x, weight and perhaps bias
    stride: int
    padding: Any


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    batch, channels, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        padding: Any = draw(st.integers(0, 3))
        pairs = ((padding, padding), (padding, padding))
    else:
        padding = pairs = tuple((draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(2))  # may exceed the kernel
    least = (max(1, k - sum(pair)) for k, pair in zip(kernel, pairs, strict=True))
    size = [draw(st.integers(n, n + 7)) for n in least]
    shapes = ((batch, channels, *size), (out, channels, *kernel), (out,))
    return Case(shapes if draw(st.booleans()) else shapes[:2], draw(st.integers(1, 5)), padding)


@st.composite
def small_kernels(draw: st.DrawFn, most: int = 3) -> Case:
    """A 3x3 kernel at stride 1 with any padding, and up to `most` channels and outputs."""
    batch, channels, out = draw(st.integers(1, 3)), draw(st.integers(1, most)), draw(st.integers(1, most))
    padding = tuple((draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(2))
    size = [draw(st.integers(max(1, 3 - sum(pair)), 12)) for pair in padding]
    shapes = ((batch, channels, *size), (out, channels, 3, 3), (out,))
    return Case(shapes if draw(st.booleans()) else shapes[:2], 1, padding)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    batch, channels, out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, size = ((draw(st.integers(1, 4)), draw(st.integers(1, 4))) for _ in range(2))
    shapes = ((batch, channels, *size), (channels, out, *kernel), (out,))
    return Case(shapes if draw(st.booleans()) else shapes[:2], draw(st.integers(1, 5)), 0)


def convolve(case: Case) -> Any:
    return lambda x, weight, bias=None: nn.conv2d(x, weight, bias, case.stride, case.padding)


def spread(case: Case) -> Any:
    return lambda x, weight, bias=None: nn.conv_transpose2d(x, weight, bias, case.stride)


def torch_convolve(case: Case) -> Any:
    pairs = ((case.padding,) * 2,) * 2 if isinstance(case.padding, int) else case.padding
    return lambda x, weight, bias=None: F.conv2d(F.pad(x, (*pairs[1], *pairs[0])), weight, bias, case.stride)


@settings(max_examples=200)
@given(convolutions(), seeds, implementations, ways, layouts)
def test_conv2d_is_torchs(case: Case, seed: int, name: str, way: str, layout: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name), taking(way):
        assert_same_as_torch(convolve(case), torch_convolve(case), normal_arrays(rng, *case.shapes, layout=layout), rng)


@settings(max_examples=100)
@given(transposed_convolutions(), seeds, implementations, ways, layouts)
def test_conv_transpose2d_is_torchs(case: Case, seed: int, name: str, way: str, layout: str) -> None:
    rng = np.random.default_rng(seed)

    def witness(x: Any, weight: Any, bias: Any = None) -> Any:
        return F.conv_transpose2d(x, weight, bias, case.stride)

    with use(name), taking(way):
        assert_same_as_torch(spread(case), witness, normal_arrays(rng, *case.shapes, layout=layout), rng)


@given(convolutions(), seeds, implementations, ways)
def test_conv2d_gradients_are_the_derivatives(case: Case, seed: int, name: str, way: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name), taking(way):
        check_vjp(without_none(convolve(case)), normal_arrays(rng, *case.shapes), rng)


@given(transposed_convolutions(), seeds, implementations)
def test_conv_transpose2d_gradients_are_the_derivatives(case: Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    with use(name):
        check_vjp(without_none(spread(case)), normal_arrays(rng, *case.shapes), rng)


def without_none(operation: Any) -> Any:
    def run(*inputs: np.ndarray) -> Any:
        y, vjp = operation(*inputs)
        return y, lambda dy: vjp(dy)[: len(inputs)]

    return run


@settings(max_examples=50)
@given(convolutions(), seeds, implementations, st.sampled_from(["windows", "whole"]))
def test_conv2d_rounds_as_sums_of_products_do(case: Case, seed: int, name: str, way: str) -> None:
    rng = np.random.default_rng(seed)
    _, channels, *_ = case.shapes[0]
    out, _, *kernel = case.shapes[1]
    inputs, taps = normal_arrays(rng, *case.shapes), int(np.prod(kernel))
    positions = convolve(case)(*inputs)[0].size // out
    terms = [channels * taps + 1, out * taps, positions, positions][: 1 + len(inputs)]
    with use(name), taking(way):
        assert_multilinear_in_float32(convolve(case), inputs, terms, rng)


@given(transposed_convolutions(), seeds, implementations)
def test_conv_transpose2d_rounds_as_sums_of_products_do(case: Case, seed: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    batch, channels, *size = case.shapes[0]
    _, out, *kernel = case.shapes[1]
    inputs, taps = normal_arrays(rng, *case.shapes), int(np.prod(kernel))
    outputs = spread(case)(*inputs)[0].size // out
    terms = [channels * taps + 1, out * taps, batch * int(np.prod(size)), outputs][: 1 + len(inputs)]
    with use(name):
        assert_multilinear_in_float32(spread(case), inputs, terms, rng)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=50)
@given(case=convolutions(), seed=seeds, way=ways, block=st.integers(1, 300))
def test_the_twin_is_the_numpy_form_whatever_its_blocks(dtype: Any, case: Case, seed: int, way: str, block: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = [array.astype(dtype) for array in normal_arrays(rng, *case.shapes)]
    with use("numpy"):
        expected, dy = results(convolve(case), inputs, None, rng)
    # Whatever a block holds (one row, some, all), the same products are summed, so only rounding may differ.
    with use("cython"), taking(way), mock.patch.object(reference.nn.conv2d_cython, "_BLOCK", block):
        actual, _ = results(convolve(case), inputs, dy, rng)
    for have, want in zip(actual, expected, strict=True):
        assert_same(have, want, rtol=1000 * np.finfo(dtype).eps, scale=float(np.abs(want).max()) + 1)


@given(case=small_kernels(), seed=seeds, layout=layouts)
def test_winograds_way_is_torchs(case: Case, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    with use("cython"), taking("winograd"):
        assert_same_as_torch(convolve(case), torch_convolve(case), normal_arrays(rng, *case.shapes, layout=layout), rng)


# One more and one less than the multiples of a panel (8 outputs), a group of panels (64), a run (48 tiles or positions), a task
# (384 positions), and more than the rows that are filled at once (about 512).
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("x", "outputs", "kernel", "stride", "padding"),
    [
        ((1, 70, 13, 15), 65, (3, 3), 1, ((1, 1), (1, 1))),
        ((2, 7, 29, 97), 9, (3, 3), 1, ((0, 2), (3, 1))),  # a row of 49 tiles
        ((3, 5, 98, 101), 63, (3, 3), 1, ((1, 1), (1, 1))),
        ((1, 1, 1, 193), 1, (3, 3), 1, ((1, 1), (1, 1))),
        ((1, 60, 5, 4), 130, (3, 3), 2, ((0, 1), (1, 2))),
        ((2, 3, 121, 95), 17, (7, 7), 2, ((2, 3), (3, 2))),
        ((1, 513, 7, 7), 8, (1, 1), 1, ((0, 0), (0, 0))),
        ((1, 3, 70, 90), 2, (1, 1), 1, ((1, 0), (0, 2))),
        ((1, 600, 3, 3), 33, (2, 1), 1, ((0, 0), (0, 0))),
        ((2, 300, 9, 11), 41, (3, 2), 3, ((2, 0), (1, 4))),
        ((3, 130, 29, 16), 25, (2, 3), 1, ((0, 0), (0, 0))),  # 392 positions of 780 rows
    ],
)
def test_sizes_beyond_one_block(dtype: Any, way: str, x: Any, outputs: int, kernel: Any, stride: int, padding: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = [array.astype(dtype) for array in normal_arrays(rng, x, (outputs, x[1], *kernel), (outputs,))]
    case = Case((), stride, padding)
    with use("numpy"):
        expected, dy = results(convolve(case), inputs, None, rng)
    with use("cython"), taking(way):
        actual, _ = results(convolve(case), inputs, dy, rng)
    for have, want in zip(actual, expected, strict=True):
        assert_same(have, want, rtol=1000 * np.finfo(dtype).eps)


@given(case=small_kernels(most=70), seed=seeds)
def test_winograds_way_rounds_as_its_matrices_say(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs32 = [array.astype(np.float32) for array in normal_arrays(rng, *case.shapes)]
    inputs64 = [array.astype(np.float64) for array in inputs32]
    with use("numpy"):
        expected, vjp = convolve(case)(*inputs64)
    dy = rng.standard_normal(expected.shape).astype(np.float32)
    dx = vjp(dy.astype(np.float64))[0]
    with use("cython"), taking("winograd"):
        y, vjp32 = convolve(case)(*inputs32)
        dx32 = vjp32(dy)[0]
    (top, _), (left, _) = case.padding
    weight, bias = inputs64[1], 0 if len(inputs64) < 3 else np.abs(inputs64[2])[:, None, None]
    turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
    # One rounding for each of the two sums in B^T d B, two for each in G g G^T and in A^T m A, and one for the bias.
    size = winograd_on_absolute_values(inputs64[0], weight, top, left, y.shape[2:]) + bias
    assert_within(y, expected, roundings(weight.shape[1] + 11) * size, "y")
    size = winograd_on_absolute_values(dy, turned, 2 - top, 2 - left, dx.shape[2:])
    assert_within(dx32, dx, roundings(len(weight) + 11) * size, "dx")


def winograd_on_absolute_values(x: Any, weight: Any, top: int, left: int, out: Any) -> Any:
    """|A^T| [sum over channels of (|G| |g| |G^T|) * (|B^T| |d| |B|)] |A|: what each rounding in it is a fraction of."""
    b = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    g = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]])
    a = np.array([[1, 1, 1, 0], [0, 1, 1, 1]])
    tiles = [(n + 1) // 2 for n in out]
    # Pixel (r, c) of x is at (r + 4, c + 4) of `padded`, and tile (i, j) begins at pixel (2 i - top, 2 j - left).
    padded = np.zeros((*x.shape[:2], x.shape[2] + 2 * tiles[0] + 16, x.shape[3] + 2 * tiles[1] + 16))
    padded[:, :, 4 : 4 + x.shape[2], 4 : 4 + x.shape[3]] = np.abs(x)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), (2, 3))[:, :, 4 - top :: 2, 4 - left :: 2]
    v = b @ windows[:, :, : tiles[0], : tiles[1]] @ b.T
    u = g @ np.abs(weight) @ g.T
    y = a @ np.einsum("ocij,bctuij->botuij", u, v) @ a.T
    return y.swapaxes(3, 4).reshape(*y.shape[:2], 2 * tiles[0], 2 * tiles[1])[:, :, : out[0], : out[1]]


def test_each_way_is_taken_where_it_pays() -> None:
    def way(height: int, width: int, kernel: int, stride: int = 1, batch: int = 1) -> str:
        """The way that the padded convolution of such maps takes."""
        x, weight = np.ones((batch, 2, height, width), np.float32), np.ones((3, 2, kernel, kernel), np.float32)
        module, taken = reference.nn.conv2d_cython, []
        spies = {
            "winograd": mock.patch.object(module.winograd_cython, "correlate", wraps=module.winograd_cython.correlate),
            "whole": mock.patch.object(module, "_correlate_whole", wraps=module._correlate_whole),
        }
        for name, patch in spies.items():
            with patch as spy:
                nn.conv2d(x, weight, None, stride, kernel // 2)
            taken += [name] * spy.called
        return "".join(taken) or "windows"

    with use("cython"):
        assert way(40, 40, 3) == "winograd"
        assert way(24, 24, 3) == "whole"  # too small
        assert way(24, 24, 3, batch=2) == "winograd"
        assert way(90, 90, 3, stride=2) == "windows"
        assert way(40, 40, 5) == "windows"
        assert way(32, 48, 1) == way(32, 48, 5) == way(64, 96, 3, stride=2) == "whole"
        assert way(29, 53, 1) == way(29, 53, 5) == "windows"  # one position more
        assert way(32, 48, 5, batch=3) == "whole"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 1, 40), (3, 2, 61), (1, 1, 40), (3, 1, 12)])
def test_the_result_does_not_depend_on_the_number_of_threads(kernel: int, stride: int, side: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, weight = (array.astype(dtype) for array in normal_arrays(rng, (2, 37, side, side), (75, 37, kernel, kernel)))
    y = []
    for threads in (1, 2, 5):
        with use("cython"), threadpool_limits(threads, user_api="openmp"):
            y.append(nn.conv2d(x, weight, None, stride, 1)[0])
    np.testing.assert_array_equal(y[0], y[1])
    np.testing.assert_array_equal(y[0], y[2])


def test_a_nan_reaches_only_the_tiles_that_see_it() -> None:
    x, weight = np.ones((1, 1, 12, 12)), np.ones((1, 1, 3, 3))
    x[0, 0, 6, 6] = np.nan
    with use("cython"), taking("winograd"):
        y, _ = nn.conv2d(x, weight, None, 1, 1)
    touched = np.zeros((12, 12), bool)
    touched[4:8, 4:8] = True  # four tiles of 2 x 2, of which the nine outputs around (6, 6) are a part
    assert not np.isnan(y[0, 0][~touched]).any()
    assert np.isnan(y[0, 0, 5:8, 5:8]).all()


def test_the_twin_is_what_runs() -> None:
    x, weight = np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1))
    with mock.patch.object(reference.nn.conv2d_cython, "correlate", side_effect=ZeroDivisionError):
        with use("numpy"):
            nn.conv2d(x, weight)
        with use("cython"), pytest.raises(ZeroDivisionError):
            nn.conv2d(x, weight)


@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_memory_stays_below_the_matrix_of_all_windows(name: str) -> None:
    x, weight = np.ones((1, 48, 128, 128), np.float32), np.ones((8, 48, 3, 3), np.float32)
    memory.release()  # or what an earlier call left were used, and not counted
    with use(name):
        tracemalloc.start()
        y, vjp = nn.conv2d(x, weight, None, 1, 1)
        vjp(y)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 9 * x.nbytes, f"{peak / 1e6:.0f} MB at most, 9 copies of x are {9 * x.nbytes / 1e6:.0f} MB"


@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_a_hand_computed_convolution(name: str) -> None:
    x = np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
    weight = np.array([[[[1.0, 10.0], [100.0, 1000.0]]]])
    with use(name):
        y, vjp = nn.conv2d(x, weight, np.array([0.5]), 1, ((1, 0), (0, 0)))
        np.testing.assert_array_equal(y, [[[[2100.5], [4321.5]]]])
        dx, dweight, dbias = vjp(np.array([[[[1.0], [2.0]]]]))
        np.testing.assert_array_equal(dx, [[[[102.0, 1020.0], [200.0, 2000.0]]]])
        np.testing.assert_array_equal(dweight, [[[[2.0, 4.0], [7.0, 10.0]]]])
        np.testing.assert_array_equal(dbias, [3.0])


def test_unless_it_is_told_it_moves_by_one_pixel_and_pads_none() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((1, 2, 6, 7)), rng.standard_normal((3, 2, 3, 3))
    assert_same(nn.conv2d(x, weight)[0], F.conv2d(torch.tensor(x), torch.tensor(weight)).numpy())
    transposed = F.conv_transpose2d(torch.tensor(x), torch.tensor(weight.swapaxes(0, 1).copy()))
    assert_same(nn.conv_transpose2d(x, weight.swapaxes(0, 1))[0], transposed.numpy())
