"""Transformer blocks, the encoder and its taps."""

from functools import partial

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import Block

from reference.transformer import block, encoder, mlp
from tests.equality import LOGIC, assert_same, assert_same_dict
from tests.models import assert_same_operation, model_parameters, part, small


def encoder_parameters(seed):
    config = small("dpt_base")
    return {k: v for k, v in model_parameters(config, seed).items() if ".blocks." in k}


def timm_block(heads, eps):
    return Block(16, heads, mlp_ratio=24 / 16, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=eps))


@given(batch=st.integers(1, 2), length=st.integers(1, 7), seed=st.integers(0, 99))
def test_mlp_in_both_forms(batch, length, seed):
    rng = np.random.default_rng(seed)
    prefix = "backbone.blocks.1.mlp"
    params = {k: v for k, v in encoder_parameters(seed).items() if k.startswith(f"{prefix}.")}
    x = rng.standard_normal((batch, length, 16))
    assert_same_operation(mlp(params, prefix, x), timm_block(2, 1e-6).mlp, params, prefix, [x], rng, rtol=LOGIC)


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 7),
    heads=st.sampled_from([1, 2, 4]),
    eps=st.sampled_from([1e-6, 1e-3]),
    scale=st.sampled_from([1.0, 1e-2]),  # at 1e-2 the eps of the norm is felt
    seed=st.integers(0, 99),
)
def test_block_in_both_forms(batch, length, heads, eps, scale, seed):
    rng = np.random.default_rng(seed)
    prefix = "backbone.blocks.2"
    params = {k: v for k, v in encoder_parameters(seed).items() if k.startswith(f"{prefix}.")}
    x = scale * rng.standard_normal((batch, length, 16))
    operation = block(params, prefix, x, heads, eps)
    assert_same_operation(operation, timm_block(heads, eps), params, prefix, [x], rng)


@given(taps=st.sets(st.integers(0, 3), min_size=1).map(sorted), length=st.integers(1, 5), seed=st.integers(0, 99))
def test_encoder_taps_are_the_tokens_after_each_block(taps, length, seed):
    rng = np.random.default_rng(seed)
    params, tokens = encoder_parameters(seed), rng.standard_normal((2, length, 16))
    outputs, vjp = encoder(params, "backbone.blocks", tokens, taps, 2, 1e-6)
    used = {k: v for k, v in params.items() if int(k.split(".")[2]) <= taps[-1]}
    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in used.items()}
    x = start = torch.tensor(tokens, requires_grad=True)
    module, expected = timm_block(2, 1e-6).double(), []
    for i in range(taps[-1] + 1):
        x = torch.func.functional_call(module, part(leaves, f"backbone.blocks.{i}"), (x,))
        if i in taps:
            expected.append(x)
    for y, e in zip(outputs, expected, strict=True):
        assert_same(y, e.detach().numpy(), what="tap")
    douts = [rng.standard_normal(y.shape) for y in outputs]
    dtokens, grads = vjp(douts)
    dexpected = torch.autograd.grad(expected, [start, *leaves.values()], [torch.tensor(d) for d in douts])
    assert_same(dtokens, dexpected[0].numpy(), 1e-9)
    assert_same_dict(grads, {k: g.numpy() for k, g in zip(leaves, dexpected[1:], strict=True)}, 1e-9)


def test_encoder_takes_none_for_a_zero_gradient():
    rng = np.random.default_rng(0)
    params, tokens = encoder_parameters(0), rng.standard_normal((1, 3, 16))
    outputs, vjp = encoder(params, "backbone.blocks", tokens, [0, 2], 2, 1e-6)
    d = rng.standard_normal(outputs[0].shape)
    with_none, with_zero = vjp([d, None]), vjp([d, np.zeros_like(d)])
    assert_same(with_none[0], with_zero[0])
    assert_same_dict(with_none[1], with_zero[1])


def test_encoder_shows_every_attention_map():
    params, tokens, seen = encoder_parameters(0), np.random.default_rng(0).standard_normal((2, 3, 16)), {}
    encoder(params, "backbone.blocks", tokens, [0, 3], 2, 1e-6, observe=lambda name, a: seen.update({name: a.shape}))
    assert seen == {f"attention.{i}": (2, 2, 3, 3) for i in range(4)}
