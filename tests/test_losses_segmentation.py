"""The segmentation loss in both forms against PyTorch's own cross-entropy, by hand, and in lower precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerated.losses as fast
import reference.losses as plain
from tests.equality import assert_same


@st.composite
def segmentations(draw):
    """Logits of any resolution, auxiliary ones of another or none, labels with ignored pixels (some batches: nothing else)."""
    batch, classes = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    sides = st.tuples(st.integers(1, 9), st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    logits = rng.standard_normal((batch, classes, *draw(sides))) * draw(st.sampled_from([1, 100]))
    auxiliary = rng.standard_normal((batch, classes, *draw(sides))) if draw(st.booleans()) else None
    labels = rng.integers(0, classes, (batch, *draw(sides)))
    ignore_index = draw(st.sampled_from([255, -1, 0]))
    labels[rng.random(labels.shape) < draw(st.sampled_from([0, 0.3, 1]))] = ignore_index
    return logits, auxiliary, labels, draw(st.sampled_from([0.2, 1.0])), ignore_index


def witness(logits, labels, ignore_index):
    """PyTorch's own cross-entropy, which gives NaN where every pixel is ignored."""
    resized = torch.nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    value = torch.nn.functional.cross_entropy(resized, torch.tensor(labels), ignore_index=ignore_index)
    return torch.where(value.isnan(), 0 * logits.sum(), value)


@settings(max_examples=80)
@given(segmentations())
def test_segmentation_loss(case):
    logits, auxiliary, labels, weight, ignore_index = case
    ignored = (labels == ignore_index).all()
    leaves = [torch.tensor(x, requires_grad=True) for x in (logits, auxiliary) if x is not None]
    expected = sum(w * witness(leaf, labels, ignore_index) for w, leaf in zip((1, weight), leaves, strict=False))
    expected_gradients = torch.autograd.grad(3 * expected, leaves) if not ignored else [torch.zeros_like(x) for x in leaves]
    expected = expected.detach().numpy()
    scale = max(1.0, float(np.abs(logits).max()))

    value, vjp = plain.segmentation_loss(logits, auxiliary, labels, weight, ignore_index)
    gradients = vjp(3.0)
    assert len(gradients) == 2
    assert (gradients[1] is None) == (auxiliary is None)

    copies = [x.detach().clone().requires_grad_() for x in leaves]
    other = fast.segmentation_loss(copies[0], copies[1] if len(copies) > 1 else None, torch.tensor(labels), weight, ignore_index)
    other_gradients = torch.autograd.grad(3 * other, copies)
    assert_same(value, expected, scale=scale)
    assert_same(other.detach().numpy(), expected, scale=scale)
    for g, o, e in zip(gradients, other_gradients, expected_gradients, strict=False):
        assert_same(g, e.numpy(), scale=1.0)
        assert_same(o.numpy(), e.numpy(), scale=1.0)
    if ignored:
        assert value == other == 0
        assert not any(g.any() for g in (*gradients, *other_gradients) if g is not None)


def test_segmentation_loss_by_hand():
    """Two classes, logits 0 and ln 3: probabilities 1/4 and 3/4. The auxiliary logits are equal: ln 2 at weight 0.2."""
    logits = np.zeros((1, 2, 1, 1))
    logits[0, 1] = np.log(3)
    labels = np.array([[[1, 1, 255, 0]]], np.uint8)
    expected = np.float64((2 * np.log(4 / 3) + np.log(4)) / 3 + 0.2 * np.log(2))
    auxiliary = np.zeros((1, 2, 1, 2))
    assert_same(plain.segmentation_loss(logits, auxiliary, labels)[0], expected)
    assert_same(fast.segmentation_loss(*map(torch.tensor, (logits, auxiliary, labels))).numpy(), expected)


@given(case=segmentations())
def test_segmentation_loss_in_float32(case):
    """Resizing, the sum of exponentials and the mean each err by some 12 eps of the largest logit plus log K at most."""
    logits, _, labels, weight, ignore_index = case
    exact, _ = plain.segmentation_loss(logits, None, labels, weight, ignore_index)
    allowed = 64 * np.finfo(np.float32).eps * (2 * np.abs(logits).max() + np.log(logits.shape[1]))
    single = logits.astype(np.float32)
    value, vjp = plain.segmentation_loss(single, None, labels, weight, ignore_index)
    assert value.dtype == vjp(1.0)[0].dtype == np.float32
    assert abs(value - exact) <= allowed
    assert abs(fast.segmentation_loss(torch.tensor(single), None, torch.tensor(labels), weight, ignore_index) - exact) <= allowed
    half = torch.tensor(single).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = fast.segmentation_loss(half, None, torch.tensor(labels), weight, ignore_index)
    assert value.dtype == torch.float32
    assert value == fast.segmentation_loss(half.float(), None, torch.tensor(labels), weight, ignore_index)


@pytest.mark.parametrize("form", [plain, fast])
@pytest.mark.parametrize("wrong", [4, -1, 254])
def test_a_label_that_is_no_class(form, wrong):
    make = np.asarray if form is plain else torch.as_tensor
    logits, labels = make(np.zeros((1, 4, 2, 2))), np.array([[[0, 255], [wrong, 3]]])
    with pytest.raises(ValueError, match=f"labels hold {wrong}: expected a class from 0 to 3, or 255"):
        form.segmentation_loss(logits, None, make(labels))
    with pytest.raises(ValueError, match=r"dtype .*float64: expected integers"):
        form.segmentation_loss(logits, None, make(labels.astype(float)))
    with pytest.raises(ValueError, match=r"labels have shape \(2, 2, 2\)"):
        form.segmentation_loss(logits, None, make(np.zeros((2, 2, 2), int)))
