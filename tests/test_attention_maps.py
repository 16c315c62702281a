"""Attention maps: the accelerated model's are the reference's, and a token's map is its row, laid out as the image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerated
import reference
from accelerated import attention as fast
from accelerated.dpt import DPT
from reference import attention as plain
from tests.equality import assert_same
from tests.models import configs, grids, model_parameters, small


def both_models(config, seed):
    params = model_parameters(config, seed)
    model = DPT(config).double().eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in params.items()})
    return params, model


def observed(params, image, config):
    seen = {}
    reference.apply(params, image, config, observe=lambda name, array: seen.update({name: array}))
    return {name: array for name, array in seen.items() if name.startswith("attention.")}


@settings(max_examples=15)
@given(config=configs(), batch=st.integers(1, 2), grid=grids(), seed=st.integers(0, 999))
def test_both_forms_look_at_the_same_places(config, batch, grid, seed):
    params, model = both_models(config, seed)
    image = np.random.default_rng(seed).standard_normal((batch, 3, 16 * grid[0], 16 * grid[1]))
    expected = observed(params, image, config)
    every = fast.attention_maps(model, torch.tensor(image), range(len(model.backbone.blocks)))
    assert every.keys() == expected.keys()
    for name, array in expected.items():
        assert_same(every[name].numpy(), array, what=name)
    tapped = fast.attention_maps(model, torch.tensor(image))
    assert list(tapped) == [f"attention.{tap}" for tap in config["taps"] if isinstance(tap, int)]
    assert all(torch.equal(array, every[name]) for name, array in tapped.items())
    for query in (None, (0, 0), (grid[0] - 1, grid[1] - 1)):
        for name, array in tapped.items():
            ours = plain.attention_map(expected[name], grid, query, config["prefix_tokens"])
            theirs = fast.attention_map(array, grid, query, config["prefix_tokens"])
            assert ours.shape == (batch, config["num_heads"], *grid)
            assert_same(theirs.numpy(), ours, what=f"{name} {query}")


@given(grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), prefix=st.integers(1, 2), heads=st.integers(1, 3), data=st.data())
def test_a_map_is_the_row_of_its_token(grid, prefix, heads, data):
    height, width = grid
    length = prefix + height * width
    # Every entry says who looks where: token, place, head.
    attention = np.arange(2.0 * heads * length * length).reshape(2, heads, length, length)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    for query, token in ((None, 0), ((row, column), prefix + row * width + column)):
        for maps in (
            plain.attention_map(attention, grid, query, prefix),
            fast.attention_map(torch.tensor(attention), grid, query, prefix).numpy(),
        ):
            for y in range(height):
                for x in range(width):
                    assert (maps[:, :, y, x] == attention[:, :, token, prefix + y * width + x]).all()


def test_a_map_sums_to_one_less_what_the_prefix_tokens_get():
    config = small("dpt_deit_base_distilled")
    params, image = model_parameters(config, 1), np.random.default_rng(1).standard_normal((1, 3, 32, 48))
    for attention in observed(params, image, config).values():
        maps = plain.attention_map(attention, (2, 3), (1, 2), prefix_tokens=2)
        assert (maps > 0).all()
        assert_same(maps.sum(axis=(2, 3)), 1 - attention[:, :, 7, :2].sum(axis=-1))


def test_equal_keys_are_looked_at_equally():
    """A witness by hand: with keys that are their biases, every row is uniform."""
    config = small("dpt_base")
    _, model = both_models(config, 3)
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.attn.qkv.weight[16:32] = 0  # the keys
    maps = fast.attention_maps(model, torch.randn(1, 3, 32, 48, dtype=torch.float64))
    for array in maps.values():
        assert_same(array.numpy(), np.full((1, 2, 7, 7), 1 / 7))


def test_looking_changes_nothing_and_leaves_nothing_behind():
    config = small("dpt_hybrid")
    _, model = both_models(config, 4)
    image = torch.randn(1, 3, 32, 48, dtype=torch.float64)
    before = model(image)
    maps = accelerated.attention_maps(model, image)
    assert not any(array.requires_grad for array in maps.values())
    assert torch.equal(model(image), before)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="multiples of the patch size"):
        fast.attention_maps(model, image[..., :20])
    assert not any(module._forward_hooks for module in model.modules()), "left behind after an error"


def test_what_does_not_fit_is_refused_in_words():
    attention, grid = np.zeros((1, 2, 7, 7)), (2, 3)
    for form, wrap in ((plain, np.asarray), (fast, torch.tensor)):
        with pytest.raises(ValueError, match=r"attention has shape \(1, 2, 7, 7\): expected \(B, heads, 10, 10\), for 1 prefix"):
            form.attention_map(wrap(attention), (3, 3))
        with pytest.raises(ValueError, match=r"attention has shape \(2, 7, 7\): expected \(B, heads, 7, 7\)"):
            form.attention_map(wrap(attention[0]), grid)
        with pytest.raises(ValueError, match=r"expected \(B, heads, 8, 8\), for 2 prefix tokens and a grid of 2 x 3 patches"):
            form.attention_map(wrap(attention), grid, prefix_tokens=2)
        for query in ((2, 0), (0, 3), (-1, 0), (0, -1)):
            with pytest.raises(ValueError, match=r"query is \(.*\): expected the row and column of a patch in a grid of 2 x 3"):
                form.attention_map(wrap(attention), grid, query)
    model = DPT(small("dpt_base"))
    for blocks in ([4], [-1]):
        with pytest.raises(ValueError, match=rf"blocks are \[{blocks[0]}\]: expected indices from 0 to 3"):
            fast.attention_maps(model, torch.zeros(1, 3, 32, 32), blocks)
