"""Small parameters for the tests of optimisers: both groups, and batch statistics, which no step may touch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

SHAPES = {
    "backbone.blocks.0.attn.qkv.weight": (4, 3),
    "backbone.norm.bias": (5,),
    "fusion.0.bn1.weight": (2,),
    "fusion.0.bn1.running_mean": (2,),
    "fusion.0.bn1.running_var": (2,),
    "head.conv1.weight": (2, 3, 3, 3),
    "head.backbone.bias": (1,),  # of the decoder: its key only contains the word
}
BUFFERS = {"fusion.0.bn1.running_mean", "fusion.0.bn1.running_var"}
TRAINABLE = [key for key in SHAPES if key not in BUFFERS]

Arrays = dict[str, np.ndarray]


def draw_params(seed: int, dtype: Any = np.float64) -> Arrays:
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in SHAPES.items()}


def torchs(params: Arrays) -> dict[str, torch.nn.Parameter]:
    return {key: torch.nn.Parameter(torch.tensor(params[key])) for key in TRAINABLE}
