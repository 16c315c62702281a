"""The correlation's loss, with which training from scratch begins: both forms equal, by definition, by differences."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import accelerated.losses as fast
import reference.losses as plain
from tests.equality import assert_same, check_vjp
from tests.maps import batches


def both(prediction, target, mask):
    """Loss and gradient, NumPy's and PyTorch's."""
    value, vjp = plain.correlation_loss(prediction, target, mask)
    leaf = torch.tensor(prediction, requires_grad=True)
    other = fast.correlation_loss(leaf, torch.tensor(target), torch.tensor(mask))
    other.backward()
    return (value, vjp(1.0)), (other.detach().numpy(), leaf.grad.numpy())


def varies(values):
    return len(values) > 0 and np.ptp(values) > 0


@given(maps=batches())
def test_both_forms_are_one_minus_the_correlation(maps):
    (value, gradient), (other, other_gradient) = both(*maps)
    expected, slopes = 0.0, [0.0]
    for p, t, m in zip(*maps, strict=True):
        if varies(p[m]) and varies(t[m]):
            expected += (1 - np.corrcoef(p[m], t[m])[0, 1]) / len(maps.mask)
            slopes.append(4 / (np.linalg.norm(p[m] - p[m].mean()) * len(maps.mask)))
    assert_same(np.asarray(value), np.asarray(expected), scale=1.0)
    assert_same(other, np.asarray(expected), scale=1.0)
    # Where two maps are proportional the gradient is zero: the two terms that cancel are each of this size.
    assert_same(other_gradient, gradient, scale=max(slopes))
    assert not gradient[~maps.mask].any()
    assert not other_gradient[~maps.mask].any()


@given(maps=batches(kinds=("normal",), masks=("some", "all"), largest=6), seed=st.integers(0, 99))
def test_the_vjp_by_differences(maps, seed):
    assume(all(m.sum() > 2 and np.ptp(p[m]) > 0.5 for p, m in zip(maps.prediction, maps.mask, strict=True)))
    function = lambda p: plain.correlation_loss(p, maps.target, maps.mask)  # noqa: E731
    prediction = np.where(maps.mask, 10 * maps.prediction, 0.0)
    check_vjp(function, [prediction], np.random.default_rng(seed))


@given(maps=batches(kinds=("normal",)), scale=st.sampled_from([0.3, 2.0, 1e3]), shift=st.integers(-9, 9))
def test_scale_and_shift_change_nothing_and_a_negative_scale_does(maps, scale, shift):
    value, _ = plain.correlation_loss(*maps)
    moved = np.where(maps.mask, scale * maps.prediction + shift, 0.0)
    assert_same(np.asarray(plain.correlation_loss(moved, *maps[1:])[0]), np.asarray(value), scale=1.0)
    contributing = np.mean([varies(p[m]) and varies(t[m]) for p, t, m in zip(*maps, strict=True)])
    flipped, _ = plain.correlation_loss(np.where(maps.mask, -maps.prediction, 0.0), *maps[1:])
    assert_same(np.asarray(flipped), np.asarray(2 * contributing - value), scale=1.0)


@pytest.mark.parametrize("which", [0, 1])
def test_a_large_common_offset_costs_no_digits(which):
    """Multiples of 1/8 below 2^20 stay what they are when 2^20 is added, in float32; so does what is computed from them."""
    rng = np.random.default_rng(0)
    maps = [(rng.integers(0, 64, (1, 9, 11)) / 8).astype(np.float32) for _ in range(2)]
    mask = np.ones((1, 9, 11), bool)
    value, vjp = plain.correlation_loss(*maps, mask)
    gradient = vjp(np.float32(1))
    maps[which] = maps[which] + np.float32(2**20)
    moved, moved_vjp = plain.correlation_loss(*maps, mask)
    assert moved == value
    assert (moved_vjp(np.float32(1)) == gradient).all()


def test_constant_maps_contribute_nothing_and_pass_no_gradient():
    prediction, target = np.full((2, 2, 3), 0.1), np.arange(12.0).reshape(2, 2, 3)
    for maps in ((prediction, target), (target, prediction)):
        for value, gradient in both(*maps, np.ones((2, 2, 3), bool)):
            assert value == 0
            assert not gradient.any()


@pytest.mark.parametrize("form", [plain, fast])
def test_shapes_that_differ_are_refused(form):
    wrap = torch.tensor if form is fast else np.asarray
    with pytest.raises(ValueError, match=r"target has shape \(1, 2, 2\): expected \(1, 2, 3\)"):
        form.correlation_loss(wrap(np.ones((1, 2, 3))), wrap(np.ones((1, 2, 2))), wrap(np.ones((1, 2, 3), bool)))
