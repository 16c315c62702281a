"""Multi-head self-attention."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention

from reference.attention import attention, scaled_dot_product_attention
from tests.equality import LOGIC, assert_same, check_vjp
from tests.models import assert_same_operation, random_parameters


def attention_parameters(width, rng):
    shapes = {
        "a.qkv.weight": (3 * width, width),
        "a.qkv.bias": (3 * width,),
        "a.proj.weight": (width, width),
        "a.proj.bias": (width,),
    }
    return random_parameters(shapes, rng)


@given(
    lead=st.lists(st.integers(1, 3), max_size=2),
    length=st.integers(1, 9),
    width=st.integers(1, 6),
    gain=st.sampled_from([1, 30]),
    seed=st.integers(0, 99),
)
def test_scaled_dot_product_attention(lead, length, width, gain, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((*lead, length, width)) for _ in range(3))
    q *= gain  # 30: rows that look almost entirely at one token
    y, vjp = scaled_dot_product_attention(q, k, v)
    leaves = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves)
    assert_same(y, expected.detach().numpy())
    dy = rng.standard_normal(y.shape)
    # Gradients of q and k vanish where a row looks at one token only: the terms that cancel are of the size of dy and v.
    for dx, dexpected in zip(vjp(dy), torch.autograd.grad(expected, leaves, torch.tensor(dy)), strict=True):
        scale = float(np.abs(dy).max() * max(np.abs(x).max() for x in (q, k, v)) ** 2) * length
        assert_same(dx, dexpected.numpy(), LOGIC, scale=scale)
    if gain == 1:
        check_vjp(scaled_dot_product_attention, [q, k, v], rng)


@given(length=st.integers(1, 9), seed=st.integers(0, 99))
def test_observed_attention_rows_sum_to_one_and_do_not_change_the_result(length, seed):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, length, 3)) for _ in range(3))
    seen = []
    y, _ = scaled_dot_product_attention(q, k, v, seen.append)
    assert_same(seen[0].sum(axis=-1), np.ones((2, length)))
    assert_same(seen[0] @ v, y)
    assert (y == scaled_dot_product_attention(q, k, v)[0]).all()


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    heads=st.sampled_from([1, 2, 4]),
    per_head=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_attention_in_both_forms(batch, length, heads, per_head, seed):
    rng = np.random.default_rng(seed)
    params = attention_parameters(heads * per_head, rng)
    x = rng.standard_normal((batch, length, heads * per_head))
    module = Attention(heads * per_head, num_heads=heads, qkv_bias=True)
    assert_same_operation(attention(params, "a", x, heads), module, params, "a", [x], rng, rtol=LOGIC)


@given(seed=st.integers(0, 99))
def test_attention_does_not_see_the_order_of_tokens(seed):
    rng = np.random.default_rng(seed)
    params, x, order = attention_parameters(8, rng), rng.standard_normal((1, 6, 8)), rng.permutation(6)
    y, _ = attention(params, "a", x, 2)
    permuted, _ = attention(params, "a", x[:, order], 2)
    assert_same(permuted, y[:, order])


def test_heads_that_do_not_divide_the_width_are_refused():
    params = attention_parameters(8, np.random.default_rng(0))
    with pytest.raises(ValueError, match="width 8 cannot be split into 3 heads"):
        attention(params, "a", np.zeros((1, 4, 8)), 3)
