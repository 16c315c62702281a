"""Reassemble: Read, Concatenate, Resample."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerated.reassemble import reassemble_stages
from reference.reassemble import READOUTS, reassemble, resample, to_fusion_width
from tests.equality import LOGIC, assert_same
from tests.models import assert_same_operation, grids, model_parameters, part, small


@given(
    batch=st.integers(1, 2),
    grid=grids(1, 5),
    stage=st.integers(0, 3),
    readout=st.sampled_from(["ignore", "add", "project"]),
    prefix_tokens=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_reassemble_in_both_forms(batch, grid, stage, readout, prefix_tokens, seed):
    rng = np.random.default_rng(seed)
    config = small("dpt_base", readout=readout, prefix_tokens=prefix_tokens)
    prefix = f"reassemble.{stage}"
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith(f"{prefix}.")}
    tokens = rng.standard_normal((batch, prefix_tokens + grid[0] * grid[1], config["embed_dim"]))
    operation = reassemble(params, prefix, tokens, grid, stage, readout, prefix_tokens)
    module = reassemble_stages(config)[stage]
    assert_same_operation(operation, module, params, prefix, [tokens], rng, call=lambda f, x: f(x, grid), rtol=LOGIC)
    strided = [(4 * n, 2 * n, n, -(-n // 2))[stage] for n in grid]
    assert operation[0].shape == (batch, config["fusion_width"], *strided)


@given(batch=st.integers(1, 2), size=grids(1, 6), stage=st.integers(0, 1), seed=st.integers(0, 99))
def test_a_resnet_map_only_changes_its_width(batch, size, stage, seed):
    rng = np.random.default_rng(seed)
    config = small("dpt_hybrid")
    prefix = f"reassemble.{stage}"
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith(f"{prefix}.")}
    x = rng.standard_normal((batch, config["resnet_widths"][stage], *size))
    module = reassemble_stages(config)[stage]
    operation = to_fusion_width(params, prefix, x)
    assert_same_operation(operation, module, params, prefix, [x], rng, call=lambda f, x: f(x, size), rtol=LOGIC)


@given(prefix_tokens=st.integers(1, 2), length=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_readouts_are_equations_3_4_and_5(prefix_tokens, length, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((2, prefix_tokens + length, 3))
    params = {"r.readout.weight": rng.standard_normal((3, 6)), "r.readout.bias": rng.standard_normal(3)}
    ignored = READOUTS["ignore"](params, "r", tokens, prefix_tokens)[0]
    added = READOUTS["add"](params, "r", tokens, prefix_tokens)[0]
    projected = READOUTS["project"](params, "r", tokens, prefix_tokens)[0]
    for b in range(2):
        for i in range(length):
            t, readouts = tokens[b, prefix_tokens + i], tokens[b, :prefix_tokens]
            assert (ignored[b, i] == t).all()
            assert_same(added[b, i], t + readouts.mean(axis=0), scale=float(np.abs(tokens[b]).max()))
            pair = np.concatenate([t, readouts[0]])
            mixed = params["r.readout.weight"] @ pair + params["r.readout.bias"]
            terms = np.abs(params["r.readout.weight"]) @ np.abs(pair) + np.abs(params["r.readout.bias"])  # they may cancel
            assert_same(projected[b, i], torch.nn.functional.gelu(torch.tensor(mixed)).numpy(), scale=float(terms.max()))


def test_an_unknown_readout_is_refused():
    with pytest.raises(ValueError, match="unknown readout 'mean': expected one of ignore, add, project"):
        reassemble({}, "reassemble.0", np.zeros((1, 5, 4)), (2, 2), 0, "mean", 1)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="no reassemble stage 4"):
        resample({}, "reassemble.4", np.zeros((1, 1, 2, 2)), 4)


def test_tokens_that_do_not_fill_the_grid_are_refused():
    params = model_parameters(small("dpt_base"), 0)
    with pytest.raises(ValueError, match="5 tokens do not fill a grid of 2 x 3"):
        reassemble(params, "reassemble.2", np.zeros((1, 6, 16)), (2, 3), 2, "ignore", 1)
    assert part(params, "reassemble.2")
