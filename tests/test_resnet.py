"""The Hybrid's BiT-style ResNet."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerated.backbones import Backbone
from reference.resnet import bottleneck, resnet, standardized_conv
from tests.equality import assert_same, assert_same_dict
from tests.models import assert_same_operation, model_parameters, small

PREFIX = "backbone.patch_embed.backbone"


def resnet_model(seed, standardization):
    config = small("dpt_hybrid", weight_standardization=standardization)
    params = {k: v for k, v in model_parameters(config, seed).items() if k.startswith(PREFIX)}
    return config, params, Backbone(config).patch_embed.backbone


class Stages(torch.nn.Module):
    """The timm network as far as the reference goes: the output of every stage."""

    def __init__(self, network):
        super().__init__()
        self.stem, self.stages = network.stem, network.stages

    def forward(self, x):
        outputs, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(17, 50), st.integers(17, 50)),  # 'SAME' padding makes sense of any size
    standardization=st.sampled_from(["variance", "deviation"]),
    seed=st.integers(0, 99),
)
def test_resnet_in_both_forms(batch, size, standardization, seed):
    rng = np.random.default_rng(seed)
    config, params, module = resnet_model(seed, standardization)
    image = rng.standard_normal((batch, 3, *size))
    operation = resnet(params, PREFIX, image, config["resnet_layers"], config["resnet_groups"], standardization)
    assert_same_operation(operation, Stages(module), params, PREFIX, [image], rng)


def test_the_two_weight_standardizations_differ():
    rng = np.random.default_rng(0)
    params, x = {"c.weight": 1e-3 * rng.standard_normal((4, 3, 3, 3))}, rng.standard_normal((1, 3, 8, 8))
    variance, _ = standardized_conv(params, "c", x, 1, "variance")
    deviation, _ = standardized_conv(params, "c", x, 1, "deviation")
    assert np.abs(variance - deviation).max() > 1e-3


def test_an_unknown_weight_standardization_is_refused():
    with pytest.raises(ValueError, match="unknown weight standardization 'std'"):
        standardized_conv({"c.weight": np.ones((1, 1, 1, 1))}, "c", np.ones((1, 1, 2, 2)), 1, "std")


def test_resnet_takes_none_for_a_zero_gradient():
    rng = np.random.default_rng(1)
    config, params, _ = resnet_model(1, "variance")
    outputs, vjp = resnet(params, PREFIX, rng.standard_normal((1, 3, 32, 32)), config["resnet_layers"], 4, "variance")
    d = [rng.standard_normal(y.shape) for y in outputs]
    with_none, with_zero = vjp([d[0], None, d[2]]), vjp([d[0], np.zeros_like(d[1]), d[2]])
    assert_same(with_none[0], with_zero[0])
    assert_same_dict(with_none[1], with_zero[1])


def test_a_bottleneck_without_downsampling_passes_its_input_on():
    rng = np.random.default_rng(2)
    _, params, _ = resnet_model(2, "variance")
    prefix = f"{PREFIX}.stages.2.blocks.1"
    params = params | {f"{prefix}.norm3.weight": np.zeros(96), f"{prefix}.norm3.bias": np.zeros(96)}
    x = rng.standard_normal((1, 96, 3, 5))
    y, _ = bottleneck(params, prefix, x, 1, 4, "variance")
    assert_same(y, np.maximum(x, 0))
