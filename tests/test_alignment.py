"""Alignment: lower medians, clamped deviations and least squares, by hand, by definition, by differences, in both forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerated.alignment as fast
import reference.alignment as plain
from tests.equality import assert_same, check_vjp
from tests.maps import batches
from tests.primitives import each_implementation  # noqa: F401

both = pytest.mark.usefixtures("each_implementation")
SMALLEST = 1e-6  # paper.md: s is clamped here


def aligned_by_median(d, mask, daligned):
    """d^ and its vjp in both forms, asserted equal."""
    aligned, vjp = plain.align_median(d, mask)
    leaf = torch.tensor(d, requires_grad=True)
    other = fast.align_median(leaf, torch.tensor(mask))
    other.backward(torch.tensor(daligned))
    gradient = vjp(daligned)
    assert_same(other.detach().numpy(), aligned)
    assert_same(leaf.grad.numpy(), gradient, scale=float(max(np.abs(gradient).max(), 1)))
    return aligned, gradient


@both
def test_the_median_is_the_lower_one_and_its_gradient_goes_to_the_first_pixel_that_has_it():
    """d = 1 2 | 2 3: t = 2 at the second pixel, s = (1 + 0 + 0 + 1) / 4; an invalid 2 stands before them all.

    For dd^ = 1 at the first pixel: directly dd = 1/s = 2; ds = 4, of which sign(d - t)/M = -1 0 0 1; dt = -2 - 0.
    """
    d, mask = np.array([[[2.0, 1.0, 2.0], [2.0, 3.0, np.nan]]]), np.array([[[0, 1, 1], [1, 1, 0]]], bool)
    daligned = np.array([[[0, 1.0, 0], [0, 0, 0]]])
    aligned, gradient = aligned_by_median(d, mask, daligned)
    assert_same(aligned, np.array([[[0, -2.0, 0], [0, 2, 0]]]))
    assert_same(gradient, np.array([[[0, 1.0, -2], [0, 1, 0]]]))


@both
def test_the_lower_median_of_an_even_number():
    aligned, _ = aligned_by_median(np.array([[[4.0, 1.0, 3.0, 2.0]]]), np.ones((1, 1, 4), bool), np.ones((1, 1, 4)))
    assert_same(aligned, np.array([[[2.0, -1.0, 1.0, 0.0]]]))


@both
@pytest.mark.parametrize(("spread", "clamped"), [(0, True), (1e-6, True), (4e-6, False)])
def test_the_deviation_is_clamped_and_then_has_no_gradient(spread, clamped):
    """d = 1, 1 + spread: s = spread / 2, or 1e-6 where that is more; then the gradient is that of (d - t) / 1e-6."""
    d, mask = np.array([[[1.0, 1.0 + spread]]]), np.ones((1, 1, 2), bool)
    aligned, gradient = aligned_by_median(d, mask, np.array([[[0.0, 1.0]]]))
    actual = d[0, 0, 1] - 1  # as rounded
    assert_same(aligned, np.array([[[0.0, actual / max(actual / 2, SMALLEST)]]]))
    assert_same(gradient, np.array([[[-1.0, 1.0]]]) / SMALLEST if clamped else np.zeros((1, 1, 2)), scale=1e6)


@both
@settings(max_examples=40)
@given(maps=batches(), seed=st.integers(0, 99))
def test_median_alignment_in_both_forms(maps, seed):
    d = np.where(maps.mask, maps.prediction, np.nan)
    aligned, gradient = aligned_by_median(d, maps.mask, np.random.default_rng(seed).standard_normal(d.shape))
    for image, g, m, source in zip(aligned, gradient, maps.mask, d, strict=True):
        assert not image[~m].any()
        assert not g[~m].any()
        if m.any():
            assert np.median(np.append(image[m], [-np.inf] * (1 - m.sum() % 2))) == 0  # -inf: the lower of two
            assert np.ptp(source[m]) == 0 or np.isclose(np.abs(image[m]).mean(), 1, rtol=1e-12, atol=0)


# ---- least squares -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(maps=batches(), offset=st.sampled_from([0.0, 1e4]))
def test_least_squares_is_numpys(maps, offset):
    """Also far from zero, where forming the normal equations themselves would lose half the digits."""
    prediction = np.where(maps.mask, maps.prediction + offset, np.nan)
    expected = np.zeros((2, len(prediction)))
    singular = np.ones(len(prediction), bool)
    for b, m in enumerate(maps.mask):
        d, target = prediction[b][m], maps.target[b][m]
        if len(d) and np.ptp(d) > 0:
            slope = np.linalg.lstsq((d - d.mean())[:, None], target - target.mean(), rcond=None)[0][0]
            expected[:, b], singular[b] = (slope, target.mean() - slope * d.mean()), False
        elif len(d):
            expected[1, b] = target.mean()
    fit, _ = plain.least_squares(prediction, maps.target, maps.mask)
    other = fast.least_squares(*map(torch.tensor, (prediction, maps.target, maps.mask)))
    for scale, shift, flag in (fit, [x.numpy() for x in other]):
        assert (flag == singular).all()
        # d is rounded at the offset: its digits are what the slope has
        assert_same(scale, expected[0], rtol=1e-10 + 1e-14 * offset, scale=max(1.0, np.abs(expected[0]).max()))
        assert_same(shift, expected[1], rtol=1e-10 + 1e-14 * offset, scale=max(1.0, np.abs(expected[0]).max()) * (1 + offset))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4, 1e-25, 3e30])
@pytest.mark.parametrize("count", [1, 2, 7, 361])
@pytest.mark.parametrize("noise", [False, True])
def test_a_constant_prediction_is_singular_however_it_is_rounded(dtype, value, count, noise):
    """The mean of n equal numbers is not always that number, and a computed constant differs in its last digit."""
    mask = np.arange(400).reshape(1, 20, 20) < count
    prediction = np.full(mask.shape, value, dtype)
    if noise:
        prediction[0, ::2] = np.nextafter(prediction[0, ::2], dtype(np.inf))
    target = np.random.default_rng(count).standard_normal(mask.shape).astype(dtype)
    fit, vjp = plain.least_squares(prediction, target, mask)
    leaf = torch.tensor(prediction, requires_grad=True)
    other = fast.least_squares(leaf, torch.tensor(target), torch.tensor(mask))
    (other.scale + other.shift).sum().backward()
    mean = target[mask].mean(dtype=np.float64)
    for scale, shift, singular in (fit, [x.detach().numpy() for x in other]):
        assert singular.all()
        assert (scale == 0).all()
        assert abs(float(shift[0]) - mean) <= 32 * np.finfo(dtype).eps * max(1, np.abs(target[mask]).max())
    assert not vjp(np.ones(1, dtype), np.ones(1, dtype)).any()
    assert not leaf.grad.any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("size", [1.0, 1e-15, 1e12])
def test_a_small_prediction_is_not_constant(dtype, size):
    prediction = (size * np.array([[[1.0, 2.0, 3.0]]])).astype(dtype)
    target, mask = np.array([[[5.0, 7.0, 9.0]]], dtype), np.ones((1, 1, 3), bool)
    aligned, _ = plain.align_least_squares(prediction, target, mask)
    other = fast.align_least_squares(*map(torch.tensor, (prediction, target, mask))).numpy()
    for d in (aligned, other):
        assert_same(d, target, rtol=32 * float(np.finfo(dtype).eps))


@settings(max_examples=40)
@given(maps=batches(kinds=("normal", "quantised"), largest=6), seed=st.integers(0, 99))
def test_least_squares_alignment_vjp(maps, seed):
    rng = np.random.default_rng(seed)
    prediction = 100 * maps.prediction  # so that the steps of the differences are small
    daligned = np.random.default_rng(seed).standard_normal(prediction.shape)
    aligned, vjp = plain.align_least_squares(prediction, maps.target, maps.mask)
    leaf = torch.tensor(prediction, requires_grad=True)
    other = fast.align_least_squares(leaf, torch.tensor(maps.target), torch.tensor(maps.mask))
    other.backward(torch.tensor(daligned))
    assert_same(other.detach().numpy(), aligned)
    assert_same(leaf.grad.numpy(), vjp(daligned), scale=max(1.0, float(np.abs(vjp(daligned)).max())))
    # Excluded: images near constant, and two pixels, which are always fitted exactly (the gradient is 0, the difference noise).
    if all(m.sum() == 0 or (m.sum() > 2 and np.ptp(p[m]) > 1) for p, m in zip(prediction, maps.mask, strict=True)):
        check_vjp(lambda p: plain.align_least_squares(p, maps.target, maps.mask), [prediction], rng)
