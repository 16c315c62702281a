"""Embed: patches, prefix tokens, positions and their resizing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from accelerated.backbones import Backbone
from reference.embed import embed, map_of, resize_positions, tokens_of
from tests.equality import LOGIC, assert_same, check_vjp
from tests.models import assert_same_operation, grids, model_parameters, part, small


@given(batch=st.integers(1, 3), grid=grids(1, 5), seed=st.integers(0, 99))
def test_map_of_and_tokens_of_are_inverse_and_row_major(batch, grid, seed):
    tokens = np.random.default_rng(seed).standard_normal((batch, grid[0] * grid[1], 3))
    laid = map_of(tokens, grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            assert (laid[:, :, i, j] == tokens[:, i * grid[1] + j]).all()
    assert (tokens_of(laid) == tokens).all()


@given(side=st.integers(1, 5), prefix=st.integers(1, 2), grid=grids(1, 7), seed=st.integers(0, 99))
def test_positions_are_resized_linearly_and_the_prefix_is_kept(side, prefix, grid, seed):
    rng = np.random.default_rng(seed)
    positions = rng.standard_normal((1, prefix + side * side, 3))
    resized, _ = resize_positions(positions, prefix, grid)
    stored = torch.tensor(positions[:, prefix:]).transpose(1, 2).reshape(1, 3, side, side)
    expected = F.interpolate(stored, size=grid, mode="bilinear", align_corners=False, antialias=False)
    assert (resized[:, :prefix] == positions[:, :prefix]).all()
    assert_same(resized[:, prefix:], expected.flatten(2).transpose(1, 2).numpy())
    check_vjp(lambda p: resize_positions(p, prefix, grid), [positions], rng)


def test_positions_on_the_stored_grid_are_unchanged():
    positions = np.random.default_rng(0).standard_normal((1, 1 + 9, 4))
    assert_same(resize_positions(positions, 1, (3, 3))[0], positions, LOGIC)


@pytest.mark.parametrize("length", [1, 3, 7])
def test_positions_that_are_no_square_are_refused(length):
    with pytest.raises(ValueError, match=rf"\(1, {length}, 4\).*no square"):
        resize_positions(np.zeros((1, length, 4)), 1, (2, 2))


@given(
    name=st.sampled_from(["dpt_base", "dpt_deit_base_distilled"]),
    batch=st.integers(1, 3),
    stored=st.integers(1, 3),
    grid=grids(),
    seed=st.integers(0, 99),
)
def test_embed_in_both_forms(name, batch, stored, grid, seed):
    config = small(name, grid=stored)
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith("backbone.") and ".blocks." not in k}
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((batch, 3, 16 * grid[0], 16 * grid[1]))
    module = Backbone(config)
    module.blocks, module.taps = torch.nn.ModuleList([torch.nn.Identity()]), [0]
    operation = embed(params, "backbone", image, config["prefix_tokens"])
    assert_same_operation(operation, module, params, "backbone", [image], rng, call=lambda f, x: f(x)[0], rtol=LOGIC)
    assert part(params, "backbone").keys() >= {"cls_token", "pos_embed"}


@pytest.mark.parametrize("shape", [(1, 3, 16, 24), (1, 3, 40, 32), (0, 3, 16, 16)])
def test_an_image_that_cannot_be_cut_into_patches_is_refused(shape):
    params = model_parameters(small("dpt_base"), 0)
    with pytest.raises(ValueError, match="patches of 16 x 16"):
        embed(params, "backbone", np.zeros(shape), 1)


def test_a_missing_parameter_is_named_with_its_nearest_keys():
    params = dict(model_parameters(small("dpt_base"), 0))
    params["backbone.cls_tokem"] = params.pop("backbone.cls_token")
    with pytest.raises(KeyError, match=r"backbone\.cls_token.*nearest.*backbone\.cls_tokem"):
        embed(params, "backbone", np.zeros((1, 3, 16, 16)), 1)
