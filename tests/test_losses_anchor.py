"""The anchor, which holds the scale and shift that the losses cannot see: both forms equal, by definition, by differences."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import accelerated.losses as fast
import reference.losses as plain
from tests.equality import assert_same, check_vjp
from tests.maps import batches


def both(prediction, mask):
    """Loss and gradient, NumPy's and PyTorch's."""
    value, vjp = plain.anchor_loss(prediction, mask)
    leaf = torch.tensor(prediction, requires_grad=True)
    other = fast.anchor_loss(leaf, torch.tensor(mask))
    other.backward()
    return (value, vjp(1.0)), (other.detach().numpy(), leaf.grad.numpy())


@given(maps=batches())
def test_both_forms_are_what_the_docstring_says(maps):
    (value, gradient), (other, other_gradient) = both(maps.prediction, maps.mask)
    seen = [p[m] for p, m in zip(maps.prediction, maps.mask, strict=True) if m.any()]
    expected = 0.0
    if seen:
        medians = [np.sort(p)[(len(p) - 1) // 2] for p in seen]
        deviations = [max(np.abs(p - t).mean(), 1e-6) for p, t in zip(seen, medians, strict=True)]
        t, s = np.mean(medians), np.mean(deviations)
        expected = np.log(s) ** 2 + (t - 3) ** 2
    assert_same(np.asarray(value), np.asarray(expected))
    assert_same(other, np.asarray(expected))
    assert_same(other_gradient, gradient)
    assert not gradient[~maps.mask].any()
    assert not other_gradient[~maps.mask].any()


@given(maps=batches(kinds=("normal",), masks=("some", "all"), largest=6), seed=st.integers(0, 99))
def test_the_vjp_by_differences(maps, seed):
    gaps = [np.diff(np.sort(p[m])) for p, m in zip(maps.prediction, maps.mask, strict=True)]
    assume(all(len(gap) > 1 and gap.min() > 1e-3 for gap in gaps))  # away from where another pixel becomes the median
    prediction = np.where(maps.mask, 10 * maps.prediction, 0.0)
    check_vjp(lambda p: plain.anchor_loss(p, maps.mask), [prediction], np.random.default_rng(seed))


@given(maps=batches(kinds=("normal",), masks=("all",)), seed=st.integers(0, 99))
def test_it_is_zero_where_scale_and_shift_are_as_wanted_and_only_there(maps, seed):
    assume(maps.prediction[0].size > 2)
    aligned = fast.align_median(torch.tensor(maps.prediction), torch.tensor(maps.mask)).numpy()
    for scale, shift, expected in ((1, 3, 0.0), (np.e, 3, 1.0), (1, 5, 4.0)):
        value, _ = plain.anchor_loss(scale * aligned + shift, maps.mask)
        assert_same(np.asarray(value), np.asarray(expected), scale=10.0)


def test_without_a_valid_pixel_it_is_zero_and_passes_no_gradient():
    for value, gradient in both(np.full((2, 2, 3), np.nan), np.zeros((2, 2, 3), bool)):
        assert value == 0
        assert not gradient.any()


@pytest.mark.parametrize("form", [plain, fast])
def test_a_mask_of_another_shape_is_refused(form):
    wrap = torch.tensor if form is fast else np.asarray
    with pytest.raises(ValueError, match=r"mask has shape \(1, 2, 2\): expected \(1, 2, 3\)"):
        form.anchor_loss(wrap(np.ones((1, 2, 3))), wrap(np.ones((1, 2, 2), bool)))


@pytest.mark.parametrize("form", [plain, fast])
def test_a_value_that_is_not_finite_is_not_hidden(form):
    prediction, mask = np.array([[[1.0, np.nan, 2.0]]]), np.ones((1, 1, 3), bool)
    if form is plain:
        with pytest.raises(ValueError, match="prediction"):
            form.anchor_loss(prediction, mask)
    else:
        assert torch.isnan(form.anchor_loss(torch.tensor(prediction), torch.tensor(mask)))
