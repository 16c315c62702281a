"""What the tests of the primitives share: arrays in awkward layouts, torch as the witness, and bounds on float32 rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from reference import nn
from reference.implementation import IMPLEMENTATIONS, use
from tests.equality import assert_same

Array = np.ndarray
Operation = Callable[..., tuple[Array, Callable]]

U = 2.0**-24  # float32: one rounding errs by at most this fraction of the result

seeds = st.integers(0, 2**32 - 1)
implementations = st.sampled_from(["numpy", "cython"])
layouts = st.sampled_from(["plain", "transposed", "strided", "reversed", "read-only"])


# Lengths around those in which twins work: 8 or 16 elements in a register, 32 partial sums.
lengths = st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 96, 129])


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def each_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module's tests once in either implementation of the primitives."""
    with use(request.param):
        yield request.param


def lay_out(array: Array, layout: str) -> Array:
    """Return the same values in another layout of memory."""
    if layout == "transposed":
        return np.ascontiguousarray(array.T).T
    if layout == "strided":
        return np.repeat(array, 2, axis=-1)[..., ::2]
    if layout == "reversed":
        return np.ascontiguousarray(array[..., ::-1])[..., ::-1]
    array = array.copy()
    array.setflags(write=layout != "read-only")
    return array


matrix_layouts = layouts | st.sampled_from(["matrices transposed", "heads", "rows strided", "rows reversed", "window", "field"])


def lay_out_matrices(array: Array, layout: str) -> Array:
    """Return the same stack of matrices (..., N, M) in another layout: one of `lay_out`'s, or one of their own."""
    if layout == "matrices transposed":
        return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "heads" and array.ndim > 2:  # a row of every matrix lies beside that row of the next, as in multi-head attention
        return np.ascontiguousarray(array.swapaxes(-3, -2)).swapaxes(-3, -2)
    if layout == "rows strided":
        return np.repeat(array, 2, axis=-2)[..., ::2, :]
    if layout == "rows reversed":
        return np.ascontiguousarray(array[..., ::-1, :])[..., ::-1, :]
    if layout == "window":
        return np.pad(array, [(0, 0)] * (array.ndim - 2) + [(1, 2), (3, 1)], constant_values=np.nan)[..., 1:-2, 3:-1]
    if layout == "field":  # the distance of two numbers is no multiple of their size
        fields = np.zeros(array.shape, [("value", array.dtype), ("flag", np.int8)])
        fields["value"] = array
        return fields["value"]
    return lay_out(array, layout)


def normal_arrays(rng: np.random.Generator, *shapes: tuple[int, ...], layout: str = "plain") -> list[Array]:
    return [lay_out(rng.standard_normal(shape), layout) for shape in shapes]


def results(
    operation: Operation, inputs: Sequence[Array], dy: Array | None, rng: np.random.Generator
) -> tuple[list[Array], Array]:
    """Return [y, one gradient per input] and the dy used (drawn where None); the inputs must survive, and vjp must repeat."""
    before = [array.copy() for array in inputs]
    y, vjp = operation(*inputs)
    if dy is None:
        dy = rng.standard_normal(y.shape).astype(y.dtype)
    dy_before = dy.copy()
    gradients = vjp(dy)
    gradients = list(gradients) if isinstance(gradients, tuple) else [gradients]
    gradients = [gradient for gradient in gradients if gradient is not None]
    again = vjp(dy)
    again = [g for g in (again if isinstance(again, tuple) else (again,)) if g is not None]
    for array, copy in zip([*inputs, dy, *again], [*before, dy_before, *gradients], strict=True):
        np.testing.assert_array_equal(array, copy, err_msg="an operation changed its input, or its vjp does not repeat")
    return [y, *gradients], dy


def assert_twin_agrees(
    operation: Operation, inputs: Sequence[Array], rng: np.random.Generator, scales: Sequence[float | None] | None = None
) -> None:
    """Compare y and every gradient of the compiled twin with the NumPy form's. `scales`: as `assert_same`'s, for each of them."""
    with use("numpy"):
        expected, dy = results(operation, inputs, lay_out(rng.standard_normal(operation(*inputs)[0].shape), "reversed"), rng)
    with use("cython"):
        actual, _ = results(operation, inputs, dy, rng)
    assert len(actual) == len(expected)
    for i, (have, want) in enumerate(zip(actual, expected, strict=True)):
        assert_same(have, want, scale=scales[i] if scales else None, what="y" if i == 0 else f"gradient {i - 1}")


def assert_twin_agrees_at_extremes(
    operation: Operation, inputs: Sequence[Array], dy: Array, rounded: int, scale: float = 0.0
) -> None:
    """Demand NaN and infinity where the NumPy form has them, and else its values up to `rounded` roundings.

    They are roundings of the value, and of `scale`, the size of what cancels in it; a subnormal result may be one off for each.
    """
    outcomes = []
    for name in IMPLEMENTATIONS:
        with use(name), np.errstate(all="ignore"):
            y, vjp = operation(*inputs)
            gradients = vjp(dy)
            outcomes.append([y, *(gradients if isinstance(gradients, tuple) else [gradients])])
    limits = np.finfo(dy.dtype)
    rtol = rounded * float(limits.eps)
    for want, have in zip(*outcomes, strict=True):
        assert have.dtype == want.dtype
        np.testing.assert_allclose(have, want, rtol=rtol, atol=rtol * scale + rounded * float(limits.smallest_subnormal))


def extremes(dtype: type) -> Array:
    """Return what arithmetic treats in its own way: zeros, infinities, NaN, the largest, smallest and subnormal numbers."""
    limits = np.finfo(dtype)
    large, tiny, subnormal = float(limits.max), float(limits.tiny), float(limits.smallest_subnormal)
    return np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, large, -large, tiny, -tiny, subnormal, -subnormal, 1, -1, 40, -40], dtype
    )


def assert_same_as_torch(
    operation: Operation,
    witness: Callable[..., torch.Tensor],
    inputs: Sequence[Array],
    rng: np.random.Generator,
    scales: Sequence[float | None] | None = None,
) -> None:
    """Compare y and every gradient with torch's in float64. `scales`: as `assert_same`'s, for y and each gradient."""
    actual, dy = results(operation, inputs, lay_out(rng.standard_normal(operation(*inputs)[0].shape), "transposed"), rng)
    tensors = [torch.tensor(array.copy(), requires_grad=True) for array in inputs]
    y = witness(*tensors)
    y.backward(torch.tensor(dy.copy()))
    expected = [y.detach().numpy(), *(tensor.grad.numpy() for tensor in tensors)]
    assert len(actual) == len(expected)
    for i, (have, want) in enumerate(zip(actual, expected, strict=True)):
        assert_same(have, want, scale=scales[i] if scales else None, what="y" if i == 0 else f"gradient {i - 1}")


def roundings(terms: int) -> float:
    """Bound the relative error that `terms` roundings in a row make, as in a sum of `terms` products.

    At worst each errs by U in the same direction; as if independent (Higham and Mary 2019), by 6 U sqrt(terms) at most, but
    once in millions.
    """
    return min(terms, 6 * math.sqrt(terms)) * U


def assert_within(actual: Array, expected: Array, bound: Array, what: str = "values") -> None:
    """Assert that a float32 array differs from the float64 one by no more than `bound`, element by element.

    1.001 pays for second-order terms, the smallest subnormal for results that underflow.
    """
    assert (actual.dtype, expected.dtype) == (np.float32, np.float64), f"{what}: {actual.dtype}, {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    allowed = 1.001 * np.broadcast_to(bound, expected.shape) + 2.0**-149
    excess = np.abs(actual - expected) / allowed
    worst = np.unravel_index(int(excess.argmax()), excess.shape)
    assert excess[worst] <= 1, (
        f"{what}: {actual[worst]} at {worst}, expected {expected[worst]}: {excess[worst]:.3g} times the bound"
    )


def assert_multilinear_in_float32(
    operation: Operation, inputs: Sequence[Array], terms: Sequence[int], rng: np.random.Generator
) -> None:
    """Compare a multilinear operation on float32 `inputs` with float64: y and each gradient are sums of products.

    `terms` is how many roundings each of y and the gradients may chain. The bound is that many times the same operation on
    absolute values.
    """
    inputs32 = [array.astype(np.float32) for array in inputs]
    inputs64 = [array.astype(np.float64) for array in inputs32]
    actual, dy = results(operation, inputs32, None, rng)
    expected, _ = results(operation, inputs64, dy.astype(np.float64), rng)
    sizes, _ = results(operation, [np.abs(array) for array in inputs64], np.abs(dy).astype(np.float64), rng)
    for i, (have, want, size, n) in enumerate(zip(actual, expected, sizes, terms, strict=True)):
        assert_within(have, want, roundings(n) * size, "y" if i == 0 else f"gradient {i - 1}")


class Call(NamedTuple):
    operation: Operation
    shapes: tuple[tuple[int, ...], ...]  # of its inputs


def _batch_norm(x: Array, weight: Array, bias: Array, mean: Array, deviation: Array) -> tuple[Array, Callable]:
    result, vjp = nn.batch_norm(x, weight, bias, mean, deviation**2, training=True)
    return result.y, lambda dy: vjp(nn.BatchNorm(dy, None, None))


# One call of every primitive that returns a vjp, under its name in `nn`.
PRIMITIVES = {
    "batch_norm": Call(_batch_norm, ((2, 5, 9, 11), (5,), (5,), (5,), (5,))),
    "conv2d": Call(lambda x, weight, bias: nn.conv2d(x, weight, bias, 2, 1), ((2, 5, 12, 13), (7, 5, 3, 3), (7,))),
    "conv_transpose2d": Call(lambda x, weight, bias: nn.conv_transpose2d(x, weight, bias, 2), ((2, 5, 7, 8), (5, 6, 2, 2), (6,))),
    "dropout": Call(lambda x: nn.dropout(x, x > 0, 0.5), ((3, 40),)),
    "gelu": Call(nn.gelu, ((3, 40),)),
    "group_norm": Call(lambda x, weight, bias: nn.group_norm(x, 3, weight, bias), ((2, 6, 9, 11), (6,), (6,))),
    "grouped_conv2d": Call(lambda x, weight: nn.grouped_conv2d(x, weight, 2), ((2, 6, 9, 11), (4, 3, 3, 3))),
    "layer_norm": Call(lambda x, weight, bias: nn.layer_norm(x, weight, bias, 1e-6), ((2, 9, 35), (35,), (35,))),
    "linear": Call(nn.linear, ((2, 30, 40), (50, 40), (50,))),
    "matmul": Call(nn.matmul, ((3, 30, 40), (3, 40, 50))),
    "max_pool2d": Call(lambda x: nn.max_pool2d(x, 3, 2, 1), ((2, 5, 9, 11),)),
    "relu": Call(nn.relu, ((3, 40),)),
    "relu6": Call(nn.relu6, ((3, 40),)),
    "resize_bilinear": Call(lambda x: nn.resize_bilinear(x, (13, 8), True), ((2, 5, 9, 11),)),
    "scaled_dot_product_attention": Call(nn.scaled_dot_product_attention, ((2, 3, 70, 20), (2, 3, 50, 20), (2, 3, 50, 30))),
    "softmax": Call(nn.softmax, ((3, 40),)),
    "standardize_weight_deviation": Call(nn.standardize_weight_deviation, ((6, 5, 3, 3),)),
    "standardize_weight_variance": Call(nn.standardize_weight_variance, ((6, 5, 3, 3),)),
}
WITHOUT_A_TWIN = {"dropout", "grouped_conv2d", "relu6"}
