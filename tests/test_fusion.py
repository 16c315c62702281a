"""Fusion: residual convolutional units and fusion blocks, with and without batch norm."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerated.fusion import fusion_blocks, upsample
from reference.fusion import deepest_fusion, fusion, residual_conv_unit
from tests.equality import LOGIC, MODEL, assert_same
from tests.models import assert_same_operation, grids, model_parameters, small

MODES = st.sampled_from([("depth", False), ("segmentation", False), ("segmentation", True)])


def block(task, training, k, seed):
    """Parameters and torch module of fusion block k."""
    config = small("dpt_base", task)
    params = {key: v for key, v in model_parameters(config, seed).items() if key.startswith(f"fusion.{k}.")}
    return params, fusion_blocks(config)[k].train(training)


@given(mode=MODES, batch=st.integers(2, 3), size=grids(2, 5), seed=st.integers(0, 99))
def test_residual_conv_unit_in_both_forms(mode, batch, size, seed):
    rng = np.random.default_rng(seed)
    params, module = block(*mode, 1, seed)
    x = rng.standard_normal((batch, 8, *size))
    prefix = "fusion.1.rcu1"
    params = {key: v for key, v in params.items() if key.startswith(prefix)}
    operation = residual_conv_unit(params, prefix, x, training=mode[1])
    assert_same_operation(operation, module.rcu1, params, prefix, [x], rng, rtol=MODEL)


@given(mode=MODES, batch=st.integers(2, 3), size=grids(2, 4), out=grids(1, 9), k=st.integers(0, 2), seed=st.integers(0, 99))
def test_fusion_in_both_forms(mode, batch, size, out, k, seed):
    rng = np.random.default_rng(seed)
    params, module = block(*mode, k, seed)
    previous, skip = rng.standard_normal((2, batch, 8, *size))
    operation = fusion(params, f"fusion.{k}", previous, skip, out, training=mode[1])
    assert_same_operation(
        operation, module, params, f"fusion.{k}", [previous, skip], rng, call=lambda f, p, s: upsample(f(p, s), out), rtol=MODEL
    )


@given(mode=MODES, batch=st.integers(2, 3), size=grids(2, 4), out=grids(1, 9), seed=st.integers(0, 99))
def test_deepest_fusion_in_both_forms(mode, batch, size, out, seed):
    rng = np.random.default_rng(seed)
    params, module = block(*mode, 3, seed)
    x = rng.standard_normal((batch, 8, *size))
    operation = deepest_fusion(params, "fusion.3", x, out, training=mode[1])
    assert_same_operation(operation, module, params, "fusion.3", [x], rng, call=lambda f, x: upsample(f(x), out), rtol=MODEL)
    assert not any("rcu1" in key for key in params)


@given(seed=st.integers(0, 99))
def test_training_reports_the_running_statistics_of_torch(seed):
    rng = np.random.default_rng(seed)
    params, module = block("segmentation", True, 3, seed)
    x = rng.standard_normal((2, 8, 3, 4))
    statistics = {}
    deepest_fusion(params, "fusion.3", x, (5, 6), training=True, statistics=statistics)
    module = module.double()
    module.load_state_dict({key.removeprefix("fusion.3."): torch.tensor(v) for key, v in params.items()})
    module(torch.tensor(x))
    expected = {f"fusion.3.{k}": v.numpy() for k, v in module.state_dict().items() if "running" in k}
    assert statistics.keys() == expected.keys()
    for key, value in expected.items():
        assert_same(statistics[key], value, LOGIC, what=key)
        assert (statistics[key] != params[key]).any()


def test_evaluation_leaves_the_statistics_alone():
    params, _ = block("segmentation", False, 3, 0)
    statistics = {}
    deepest_fusion(params, "fusion.3", np.ones((2, 8, 2, 2)), (4, 4), training=False, statistics=statistics)
    assert statistics == {}


def test_maps_of_different_sizes_are_refused():
    params, _ = block("depth", False, 0, 0)
    with pytest.raises(ValueError, match=r"fusion\.0: the previous map has shape \(1, 8, 2, 2\), the skip \(1, 8, 3, 2\)"):
        fusion(params, "fusion.0", np.zeros((1, 8, 2, 2)), np.zeros((1, 8, 3, 2)), (4, 4))
