"""Layer, group and batch normalisation and weight standardisation: one theory of rounding, torch as the witness for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from tests.equality import assert_same, check_vjp
from tests.primitives import (
    U,
    assert_same_as_torch,
    assert_twin_agrees,
    assert_within,
    each_implementation,  # noqa: F401
    extremes,
    layouts,
    lengths,
    normal_arrays,
    results,
    roundings,
    seeds,
)

pytestmark = pytest.mark.usefixtures("each_implementation")

Array = np.ndarray

small = st.integers(1, 6)
maps = st.tuples(st.integers(1, 3), st.integers(1, 4), small, small)
offsets = st.floats(-3, 3)  # of the mean, in standard deviations
spreads = st.sampled_from([1e-3, 1.0, 100.0])


def affine_inputs(rng: np.random.Generator, shape: tuple[int, ...], width: int, offset: float, spread: float, layout: str) -> Any:
    x, weight, bias = normal_arrays(rng, shape, (width,), (width,), layout=layout)
    return [(x + offset) * spread, weight, bias]


def gradient_scales(x: Array, weight: Array, axes: tuple[int, ...], eps: float) -> list[float | None]:
    """What cancels where few values are normalised (two are always -1 and 1, one is 0) is of this size, for dy of size 1."""
    return [None, float(np.abs(weight).max()) / np.sqrt(float(x.var(axis=axes).min()) + eps), 1.0, None]


class Normalised(NamedTuple):
    """One normalisation in float64 with bounds on what float32 may add, each by first-order propagation of its roundings."""

    y: Array
    y_bound: Array
    dx: Array
    dx_bound: Array
    dweight_bound: Array
    dbias_bound: Array


def normalise(
    x: Array,
    weight: Array,
    bias: Array,
    dy: Array,
    axes: tuple[int, ...],
    spread: Callable[[Array], Array],
    parameter_axes: Any = (),
) -> Normalised:
    """`spread` gives what to divide by from the variance; weight and bias broadcast against x.

    The mean errs by r mean|x| with r = roundings(n); that moves all centred values alike, and, as they sum to 0, the variance
    not at all to first order, which errs by r of itself, the divisor by at most r and a few U.
    """
    n = int(np.prod([x.shape[axis] for axis in axes]))
    r = roundings(n + 4)

    def mean(values: Array) -> Array:
        return values.mean(axis=axes, keepdims=True)

    divisor = spread(x.var(axis=axes, keepdims=True))
    normal = (x - mean(x)) / divisor
    error = r * mean(np.abs(x)) / divisor + (r + 4 * U) * np.abs(normal)
    y = normal * weight + bias
    y_bound = np.abs(weight) * error + 2 * U * np.abs(normal * weight) + U * np.abs(y)
    dnormal = dy * weight
    along = mean(dnormal * normal)
    dx = (dnormal - mean(dnormal) - normal * along) / divisor
    terms = np.abs(dnormal) + mean(np.abs(dnormal)) + np.abs(normal) * mean(np.abs(dnormal * normal))
    dx_bound = ((2 * r + 8 * U) * terms + error * np.abs(along) + np.abs(normal) * mean(np.abs(dnormal) * error)) / divisor
    count = int(np.prod([x.shape[axis] for axis in parameter_axes]))
    dweight_bound = (np.abs(dy) * (error + roundings(count + 1) * np.abs(normal))).sum(axis=parameter_axes)
    dbias_bound = roundings(count) * np.abs(dy).sum(axis=parameter_axes)
    return Normalised(y, y_bound, dx, dx_bound, dweight_bound, dbias_bound)


def assert_rounds(operation: Any, inputs: list[Array], rng: np.random.Generator, theory: Callable[..., Normalised]) -> None:
    """Compare float32 with float64 under the bounds of `theory(*inputs, dy)`."""
    inputs32 = [array.astype(np.float32) for array in inputs]
    inputs64 = [array.astype(np.float64) for array in inputs32]
    actual, dy = results(operation, inputs32, None, rng)
    expected, _ = results(operation, inputs64, dy.astype(np.float64), rng)
    bounds = theory(*inputs64, dy.astype(np.float64))
    limits = [bounds.y_bound, bounds.dx_bound, bounds.dweight_bound, bounds.dbias_bound]
    for what, have, want, bound in zip(["y", "dx", "dweight", "dbias"], actual, expected, limits, strict=False):
        assert_within(have, want, bound.reshape(want.shape), what)


# Layer normalisation


@given(st.lists(small, max_size=3), st.integers(1, 9), offsets, spreads, seeds, layouts)
def test_layer_norm_is_torchs(leading: list[int], width: int, offset: float, spread: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, (*leading, width), width, offset, spread, layout)
    scales = gradient_scales(inputs[0], inputs[1], (-1,), 1e-6)
    assert_same_as_torch(
        lambda x, w, b: nn.layer_norm(x, w, b, 1e-6), lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-6), inputs, rng, scales
    )


@given(st.lists(small, max_size=3), st.integers(1, 9), seeds)
def test_layer_norm_gradients_are_the_derivatives(leading: list[int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, bias = normal_arrays(rng, (*leading, width), (width,), (width,))
    x += np.arange(width) * 4  # the derivative is steep where all values nearly agree
    check_vjp(lambda x, w, b: nn.layer_norm(x, w, b, 1e-2), [x, weight, bias], rng)


@given(st.lists(small, max_size=3), st.integers(1, 200), offsets, spreads, seeds)
def test_layer_norm_rounds_within_bounds(leading: list[int], width: int, offset: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, (*leading, width), width, offset, spread, "plain")
    assert_rounds(
        lambda x, w, b: nn.layer_norm(x, w, b, 1e-6),
        inputs,
        rng,
        lambda x, w, b, dy: normalise(x, w, b, dy, (-1,), lambda var: np.sqrt(var + 1e-6), tuple(range(len(leading)))),
    )


# Group normalisation


@given(st.integers(1, 3), small, small, st.tuples(small, small), offsets, spreads, seeds, layouts)
def test_group_norm_is_torchs(
    batch: int, groups: int, each: int, size: tuple[int, int], offset: float, spread: float, seed: int, layout: str
) -> None:
    rng = np.random.default_rng(seed)
    channels = groups * each
    inputs = affine_inputs(rng, (batch, channels, *size), channels, offset, spread, layout)
    scales = gradient_scales(inputs[0].reshape(batch, groups, -1), inputs[1], (-1,), 1e-5)

    def witness(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.native_group_norm(x, weight, bias, batch, channels, size[0] * size[1], groups, 1e-5)[0]

    assert_same_as_torch(lambda x, w, b: nn.group_norm(x, groups, w, b), witness, inputs, rng, scales)


@given(st.integers(1, 3), small, st.integers(1, 3), st.tuples(small, small), seeds)
def test_group_norm_gradients_are_the_derivatives(batch: int, groups: int, each: int, size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    channels = groups * each
    assume(each * size[0] * size[1] > 1)  # the derivative of a single value is 0, and what is computed is the rounding of it
    x, weight, bias = normal_arrays(rng, (batch, channels, *size), (channels,), (channels,))
    x += 4 * np.arange(x.size).reshape(x.shape) % 9
    check_vjp(lambda x, w, b: nn.group_norm(x, groups, w, b, 1e-2), [x, weight, bias], rng)


@given(st.integers(1, 3), small, st.integers(1, 3), st.tuples(small, small), offsets, spreads, seeds)
def test_group_norm_rounds_within_bounds(
    batch: int, groups: int, each: int, size: tuple[int, int], offset: float, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    channels = groups * each
    inputs = affine_inputs(rng, (batch, channels, *size), channels, offset, spread, "plain")

    def theory(x: Array, weight: Array, bias: Array, dy: Array) -> Normalised:
        split, per_channel = (batch, groups, each, *size), (groups, each, 1, 1)
        x, dy, weight, bias = x.reshape(split), dy.reshape(split), weight.reshape(per_channel), bias.reshape(per_channel)
        return normalise(x, weight, bias, dy, (2, 3, 4), lambda var: np.sqrt(var + 1e-5), (0, 3, 4))

    assert_rounds(lambda x, w, b: nn.group_norm(x, groups, w, b), inputs, rng, theory)


# Batch normalisation


def batch_norm_y(mean: Array, var: Array, **options: Any) -> Any:
    """batch_norm as a function of x, weight and bias, returning y alone."""

    def operation(x: Array, weight: Array, bias: Array) -> Any:
        result, vjp = nn.batch_norm(x, weight, bias, mean.astype(x.dtype), var.astype(x.dtype), **options)
        return result.y, lambda dy: vjp(nn.BatchNorm(dy, None, None))

    return operation


@given(maps.filter(lambda s: s[0] * s[2] * s[3] > 1), offsets, spreads, seeds, layouts)
def test_batch_norm_in_training_is_torchs(shape: tuple[int, ...], offset: float, spread: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, shape, shape[1], offset, spread, layout)
    mean, var = rng.standard_normal(shape[1]), rng.random(shape[1])
    running = torch.tensor(mean), torch.tensor(var)
    result, _ = nn.batch_norm(*inputs, mean, var, training=True, momentum=0.3)
    F.batch_norm(torch.tensor(np.ascontiguousarray(inputs[0])), *running, training=True, momentum=0.3)
    assert_same(result.running_mean, running[0].numpy())
    assert_same(result.running_var, running[1].numpy())
    scales = gradient_scales(inputs[0], inputs[1], (0, 2, 3), 1e-5)

    def witness(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, torch.tensor(mean), torch.tensor(var), weight, bias, training=True)

    assert_same_as_torch(batch_norm_y(mean, var, training=True), witness, inputs, rng, scales)


@given(maps, seeds, layouts)
def test_batch_norm_in_evaluation_is_torchs(shape: tuple[int, ...], seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, shape, shape[1], 1.0, 1.0, layout)
    mean, var = rng.standard_normal(shape[1]), rng.random(shape[1])
    result, _ = nn.batch_norm(*inputs, mean, var)
    assert result.running_mean is mean
    assert result.running_var is var

    def witness(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, torch.tensor(mean), torch.tensor(var), weight, bias, training=False)

    assert_same_as_torch(batch_norm_y(mean, var), witness, inputs, rng)


@given(maps.filter(lambda s: s[0] * s[2] * s[3] > 1), seeds)
def test_batch_norm_gradients_are_the_derivatives_of_all_three_results(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight, bias, mean = normal_arrays(rng, shape, *[(shape[1],)] * 3)
    x += 4 * np.arange(x.size).reshape(x.shape) % 9
    var, parts = rng.random(shape[1]), np.cumsum([x.size, shape[1]])

    def operation(x: Array, weight: Array, bias: Array) -> Any:
        result, vjp = nn.batch_norm(x, weight, bias, mean, var, training=True, momentum=0.7, eps=1e-2)

        def joined_vjp(d: Array) -> Any:
            dy, dmean, dvar = np.split(d, parts)
            return vjp(nn.BatchNorm(dy.reshape(shape), dmean, dvar))

        return np.concatenate([array.ravel() for array in result]), joined_vjp

    check_vjp(operation, [x, weight, bias], rng)
    _, vjp = nn.batch_norm(x, weight, bias, mean, var, training=True)
    dstatistics = nn.BatchNorm(None, mean, var)
    for have, want in zip(vjp(dstatistics), vjp(dstatistics._replace(y=np.zeros(shape))), strict=True):
        np.testing.assert_array_equal(have, want)
    check_vjp(batch_norm_y(mean, var, eps=1e-2), [x, weight, bias], rng)


@given(maps.filter(lambda s: s[0] * s[2] * s[3] > 1), offsets, spreads, seeds)
def test_batch_norm_rounds_within_bounds(shape: tuple[int, ...], offset: float, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, shape, shape[1], offset, spread, "plain")
    mean, var = rng.standard_normal(shape[1]).astype(np.float32), rng.random(shape[1]).astype(np.float32)

    def theory(x: Array, weight: Array, bias: Array, dy: Array) -> Normalised:
        weight, bias = weight[:, None, None], bias[:, None, None]
        return normalise(x, weight, bias, dy, (0, 2, 3), lambda v: np.sqrt(v + 1e-5), (0, 2, 3))

    assert_rounds(batch_norm_y(mean, var, training=True), inputs, rng, theory)
    inputs32 = [array.astype(np.float32) for array in inputs]
    x, weight, bias = (array.astype(np.float64) for array in inputs32)
    actual = nn.batch_norm(*inputs32, mean, var, training=True)[0]
    expected = nn.batch_norm(x, weight, bias, mean.astype(float), var.astype(float), training=True)[0]
    r, average = roundings(x.size // shape[1] + 4), np.abs(x).mean(axis=(0, 2, 3))
    assert_within(actual.running_mean, expected.running_mean, r * average + 4 * U * np.abs(mean), "running mean")
    assert_within(actual.running_var, expected.running_var, (r + 6 * U) * (expected.running_var + var), "running variance")
    # In evaluation nothing is summed: a difference, a quotient by a root, a product, a sum.
    actual_y, expected_y = (
        batch_norm_y(mean, var)(*arrays)[0] for arrays in (inputs32, [a.astype(np.float64) for a in inputs32])
    )
    size = np.abs(expected_y - bias[:, None, None]) + np.abs(expected_y)
    assert_within(actual_y, expected_y, 8 * U * size, "y in evaluation")


# Weight standardisation

FORMS = {
    nn.standardize_weight_variance: (1e-8, lambda var, eps: np.sqrt(var + eps)),
    nn.standardize_weight_deviation: (1e-5, lambda var, eps: np.sqrt(var) + eps),
}
forms = st.sampled_from(list(FORMS))


@given(forms, st.integers(1, 4), st.tuples(small, small, small), spreads, seeds, layouts)
def test_standardisation_is_torchs(form: Any, out: int, rest: tuple[int, ...], spread: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    (w,) = normal_arrays(rng, (out, *rest), layout=layout)
    eps = FORMS[form][0]

    def witness(w: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        guarded = torch.sqrt(var + eps) if form is nn.standardize_weight_variance else torch.sqrt(var) + eps
        return (w - mean) / guarded

    w = w * spread
    deviation = w.reshape(out, -1).std(axis=1).min()
    if w[0].size > 1:  # a single value has no deviation; torch's root has an infinite slope there
        assert_same_as_torch(form, witness, [w], rng, scales=[None, 1 / float(deviation)])


@given(forms, st.integers(1, 4), st.tuples(small, small, small), seeds)
def test_standardisation_gradients_are_the_derivatives(form: Any, out: int, rest: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    (w,) = normal_arrays(rng, (out, *rest))
    w += 4 * np.arange(w.size).reshape(w.shape) % 9
    if w[0].size > 1:
        check_vjp(lambda w: form(w, 1e-2), [w], rng)


@given(forms, st.integers(1, 4), st.tuples(small, small, small), offsets, spreads, seeds)
def test_standardisation_rounds_within_bounds(
    form: Any, out: int, rest: tuple[int, ...], offset: float, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    eps, guard = FORMS[form]
    w = (rng.standard_normal((out, *rest)) + offset) * spread
    if w[0].size > 2:  # of one or two values the deviation can be as small as the rounding of the mean
        one, zero = np.ones(()), np.zeros(())
        assert_rounds(form, [w], rng, lambda w, dy: normalise(w, one, zero, dy, (1, 2, 3), lambda var: guard(var, eps)))


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_filter_is_standardised_to_zero(form: Any, dtype: Any) -> None:
    w = np.full((2, 3, 1, 1), 0.5, dtype)
    y, vjp = form(w)
    np.testing.assert_array_equal(y, np.zeros_like(w))
    dw = vjp(np.arange(6, dtype=dtype).reshape(w.shape))
    assert dw.dtype == dtype
    centred = np.array([-1, 0, 1, -1, 0, 1], dtype).reshape(w.shape)
    np.testing.assert_allclose(dw, centred / FORMS[form][1](0, FORMS[form][0]), rtol=1e-6)


# The compiled twins


@given(st.integers(1, 20), lengths, offsets, spreads, seeds, layouts)
def test_the_twin_of_layer_norm(rows: int, width: int, offset: float, spread: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, (rows, width), width, offset, spread, layout)
    scales = gradient_scales(inputs[0], inputs[1], (-1,), 1e-6)
    assert_twin_agrees(lambda x, w, b: nn.layer_norm(x, w, b, 1e-6), inputs, rng, scales)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), lengths, offsets, spreads, seeds, layouts)
def test_the_twin_of_group_norm(
    batch: int, groups: int, each: int, width: int, offset: float, spread: float, seed: int, layout: str
) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, (batch, groups * each, 2, width), groups * each, offset, spread, layout)
    scales = gradient_scales(inputs[0].reshape(batch, groups, -1), inputs[1], (-1,), 1e-5)
    assert_twin_agrees(lambda x, w, b: nn.group_norm(x, groups, w, b), inputs, rng, scales)


@given(st.integers(1, 3), st.integers(1, 3), lengths, offsets, spreads, st.booleans(), seeds, layouts)
def test_the_twin_of_batch_norm(
    batch: int, channels: int, width: int, offset: float, spread: float, training: bool, seed: int, layout: str
) -> None:
    rng = np.random.default_rng(seed)
    inputs = affine_inputs(rng, (batch, channels, 2, width), channels, offset, spread, layout)
    scales = gradient_scales(inputs[0], inputs[1], (0, 2, 3), 1e-5)
    mean, var = rng.standard_normal(channels), rng.random(channels)
    assert_twin_agrees(batch_norm_y(mean, var, training=training), inputs, rng, scales if training else None)


@given(forms, st.integers(1, 4), lengths, spreads, seeds, layouts)
def test_the_twin_of_weight_standardisation(form: Any, out: int, width: int, spread: float, seed: int, layout: str) -> None:
    rng = np.random.default_rng(seed)
    (w,) = normal_arrays(rng, (out, width, 2), layout=layout)
    deviation = spread * w.reshape(out, -1).std(axis=1).min()
    assert_twin_agrees(form, [spread * w], rng, [None, 1 / float(deviation)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_twins_at_extremes(dtype: Any) -> None:
    """A value that is NaN, infinite or squares to infinity spoils its own row, group or channel, and no other."""
    rng, special = np.random.default_rng(0), extremes(dtype)
    x = rng.standard_normal((1, len(special), 4, 10)).astype(dtype)
    x[0, :, 1, 3] = special
    weight, bias, dy = np.ones(len(special), dtype), np.zeros(len(special), dtype), np.ones_like(x)
    groups = len(special)
    # 40 values are summed; gradients of the constant dy are 0, but for rounding: they are compared where they are not finite.
    for operation in (
        lambda x, w, b: nn.group_norm(x, groups, w, b),
        batch_norm_y(bias, weight, training=True),
        batch_norm_y(bias, weight),
        lambda x, w, b: nn.layer_norm(x.reshape(groups, 40), np.ones(40, dtype), np.zeros(40, dtype), 1e-6),
    ):

        def finite(x: Array, w: Array, b: Array, operation: Any = operation) -> Any:
            y, vjp = operation(x, w, b)
            return np.round(y, 4), lambda dy: tuple(np.isfinite(part) for part in vjp(dy.reshape(y.shape)))

        outcomes = []
        for name in ("numpy", "cython"):
            with use(name), np.errstate(all="ignore"):
                y, vjp = finite(x, weight, bias)
                outcomes.append([y, *vjp(dy)])
        for want, have in zip(*outcomes, strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("operation", [nn.standardize_weight_variance, nn.standardize_weight_deviation])
def test_a_matrix_is_a_weight_too(operation: Any) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 8))
    y, _ = operation(weight, 1e-6)
    assert_same(y, operation(weight.reshape(3, 2, 2, 2), 1e-6)[0].reshape(3, 8))
    with pytest.raises(ValueError, match="at least two dimensions"):
        operation(weight[0], 1e-6)
