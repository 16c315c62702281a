"""The depth head and the segmentation heads."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from accelerated.heads import FARTHEST, DepthHead, SegmentationHead, metric_depth, upsample_twice
from reference.heads import depth_head, segmentation_head, upsample_logits
from reference.heads import metric_depth as reference_metric_depth
from tests.equality import LOGIC, MODEL, assert_same
from tests.models import assert_same_operation, grids, model_parameters, small


@given(batch=st.integers(1, 3), size=grids(1, 5), seed=st.integers(0, 99))
def test_depth_head_in_both_forms(batch, size, seed):
    rng = np.random.default_rng(seed)
    config = small("dpt_base")
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith("head.")}
    x = rng.standard_normal((batch, 8, *size))
    operation = depth_head(params, "head", x)
    assert operation[0].shape == (batch, 2 * size[0], 2 * size[1])
    assert_same_operation(operation, DepthHead(config), params, "head", [x], rng, rtol=LOGIC)


@given(bias=st.floats(-3, 3), seed=st.integers(0, 99))
def test_inverse_depth_is_never_negative_and_closed_pixels_pass_no_gradient(bias, seed):
    rng = np.random.default_rng(seed)
    params = model_parameters(small("dpt_base"), seed) | {"head.conv3.bias": np.array([bias])}
    params["head.conv3.weight"] = rng.standard_normal(params["head.conv3.weight"].shape)
    depth, vjp = depth_head(params, "head", rng.standard_normal((1, 8, 3, 4)))
    assert (depth >= 0).all()
    dx, grads = vjp((depth == 0).astype(np.float64))
    assert not dx.any()
    assert not any(g.any() for g in grads.values())


@given(
    scale=st.floats(1e-5, 2),
    shift=st.floats(0, 1),
    offset=st.sampled_from([0.0, -0.5]),
    seed=st.integers(0, 99),
)
def test_metric_depth_in_both_forms(scale, shift, offset, seed):
    """Also where the inverse depth would be negative or zero: there depth is 1e8 metres, and passes no gradient."""
    rng = np.random.default_rng(seed)
    inverse, ddepth = rng.random((2, 3, 4)) + offset, rng.standard_normal((2, 3, 4))
    assume((np.abs(scale * inverse + shift - FARTHEST) > 1e-12).all())
    depth, vjp = reference_metric_depth(inverse, scale, shift)
    leaf = torch.tensor(inverse, requires_grad=True)
    ours = metric_depth(leaf, scale, shift)
    ours.backward(torch.tensor(ddepth))
    assert_same(ours.detach().numpy(), depth, LOGIC)
    assert_same(leaf.grad.numpy(), vjp(ddepth), LOGIC)
    expected = 1 / np.maximum(scale * inverse + shift, 1e-8)
    assert_same(depth, expected, LOGIC)
    assert (depth[scale * inverse + shift < 1e-8] == 1e8).all()
    assert not vjp(ddepth)[scale * inverse + shift < 1e-8].any()


def test_metric_depth_keeps_the_precision_it_can():
    inverse = torch.tensor([2.0, 400.0])
    assert metric_depth(inverse.bfloat16(), 0.0001, 0.005).dtype == torch.float32
    assert metric_depth(inverse.double(), 0.0001, 0.005).dtype == torch.float64
    assert reference_metric_depth(inverse.numpy(), 0.0001, 0.005)[0].dtype == np.float32


@given(
    head=st.sampled_from(["head", "auxiliary"]),
    training=st.booleans(),
    batch=st.integers(2, 3),
    size=grids(2, 4),
    seed=st.integers(0, 99),
)
def test_segmentation_head_in_both_forms(head, training, batch, size, seed):
    rng = np.random.default_rng(seed)
    config = small("dpt_base", "segmentation", dropout=0.0)
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith(f"{head}.")}
    x = rng.standard_normal((batch, 8, *size))
    module = SegmentationHead(config).train(training)
    operation = segmentation_head(params, head, x, training=training)
    assert_same_operation(operation, module, params, head, [x], rng, rtol=MODEL)


@given(rate=st.floats(0.05, 0.9), seed=st.integers(0, 99))
def test_dropout_keeps_what_the_mask_says(rate, seed):
    rng = np.random.default_rng(seed)
    config = small("dpt_base", "segmentation")
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith("head.")}
    x, mask = rng.standard_normal((2, 8, 3, 4)), rng.random((2, 8, 3, 4)) >= rate

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(mask) / (1 - rate)

    module = SegmentationHead(config).train()
    module.dropout = Masked()
    operation = segmentation_head(params, "head", x, training=True, dropout_mask=mask, dropout=rate)
    assert_same_operation(operation, module, params, "head", [x], rng)


@given(batch=st.integers(1, 2), size=grids(1, 5), seed=st.integers(0, 99))
def test_logits_are_upsampled_by_two_with_aligned_corners(batch, size, seed):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((batch, 3, *size))
    y, vjp = upsample_logits(logits)
    leaf = torch.tensor(logits, requires_grad=True)
    expected = F.interpolate(leaf, scale_factor=2, mode="bilinear", align_corners=True)
    assert_same(y, expected.detach().numpy())
    assert_same(y, upsample_twice(leaf).detach().numpy())
    dy = rng.standard_normal(y.shape)
    assert_same(vjp(dy), torch.autograd.grad(expected, leaf, torch.tensor(dy))[0].numpy())
