"""Multi-head self-attention."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Attention

from reference.attention import attention
from tests.equality import LOGIC, assert_same
from tests.models import assert_same_operation, random_parameters


def attention_parameters(width, rng):
    shapes = {
        "a.qkv.weight": (3 * width, width),
        "a.qkv.bias": (3 * width,),
        "a.proj.weight": (width, width),
        "a.proj.bias": (width,),
    }
    return random_parameters(shapes, rng)


@given(length=st.integers(1, 9), heads=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_observed_attention_is_what_weighs_the_values_and_changes_nothing(length, heads, seed):
    rng = np.random.default_rng(seed)
    params, x, seen = attention_parameters(6, rng), rng.standard_normal((2, length, 6)), []
    y, _ = attention(params, "a", x, heads, seen.append)
    (weights,) = seen
    assert_same(weights.sum(axis=-1), np.ones((2, heads, length)))
    assert (y == attention(params, "a", x, heads)[0]).all()
    values = (x @ params["a.qkv.weight"][12:].T + params["a.qkv.bias"][12:]).reshape(2, length, heads, -1).swapaxes(1, 2)
    joined = (weights @ values).swapaxes(1, 2).reshape(2, length, 6)
    assert_same(y, joined @ params["a.proj.weight"].T + params["a.proj.bias"])


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
