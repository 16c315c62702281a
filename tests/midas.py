"""Small MiDaS models for the tests, and the gradients that a batch norm takes away."""

from __future__ import annotations

import numpy as np

import reference
import reference.configs
from tests.equality import MODEL, assert_same, assert_same_dict

NAMES = sorted(reference.configs.MIDAS)
RESNETS = ("midas_resnet50", "midas_v21")


def small(name: str, **changes) -> dict:
    """The configuration `name` at reduced depth and width."""
    config = reference.configuration(name) | {"head_widths": [5, 4]}
    if config["encoder"] == "resnet":
        config |= {"resnet_layers": [1, 2, 1, 1], "resnet_widths": [16, 24, 32, 40], "fusion_widths": [6] * 4}
        config |= {"resnet_cardinality": 4, "resnet_base_width": 32} if config["resnet_cardinality"] > 1 else {}
    else:
        config |= {
            "efficientnet_stem_width": 8,
            "efficientnet_layers": [1, 2, 1, 1, 2, 1, 1],
            "efficientnet_widths": [8, 16, 8, 16, 8, 16, 24],
            "efficientnet_expansions": [1, 2, 3, 2, 2, 2, 2],
            "fusion_widths": [4, 6, 8, 10],
        }
    return config | changes


def assert_same_gradients(actual, expected, config, training):
    """Compare gradients by key.

    In training, the shift of a linear bottleneck's norm has the gradient zero where all that follows is a 1x1 convolution whose
    batch norm takes it away again: in the stages that are not tapped. There the scale is the gradient of the same norm's weight.
    """
    cancelling = set()
    if training and config["encoder"] == "efficientnet":
        for stage in set(range(7)) - set(config["efficientnet_taps"]):
            last = "bn2" if config["efficientnet_expansions"][stage] == 1 else "bn3"
            blocks = range(config["efficientnet_layers"][stage])
            cancelling |= {f"backbone.blocks.{stage}.{i}.{last}" for i in blocks}
    biases = {f"{norm}.bias" for norm in cancelling}
    assert_same_dict(*({k: g for k, g in grads.items() if k not in biases} for grads in (actual, expected)), MODEL)
    for norm in cancelling:
        scale = float(np.abs(expected[f"{norm}.weight"]).max())
        assert_same(actual[f"{norm}.bias"], np.zeros_like(expected[f"{norm}.bias"]), MODEL, scale, what=f"{norm}.bias")
    assert actual.keys() == expected.keys()
