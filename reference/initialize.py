"""Fresh parameters for a configuration: which tensors a DPT has, their shapes, and what they hold before training.

The paper takes the encoder from ImageNet weights and draws the decoder at random (section 4); a model trained from scratch draws
all of it. Transformer: normal of deviation 0.02, cut at two deviations, biases zero (ViT). Convolutions and the decoder's
linear maps: uniform within 1 / sqrt(fan_in), biases too. Norms: weight one, bias zero. The tensors of a convolutional MiDaS are
listed at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .configs import Config
from .dpt import check_taps
from .midas import check_midas
from .parameters import Params

Shape = tuple[int, ...]

DEPTH_BIAS = 0.5
"""The depth head's last bias: positive, so that its final ReLU passes a gradient everywhere when training starts."""


def parameter_shapes(config: Config) -> dict[str, Shape]:
    """Key and shape of every tensor of the model that `config` describes, batch statistics included, none of them unused."""
    if "encoder" in config:
        check_midas(config)
        encoder = _bottlenecks if config["encoder"] == "resnet" else _inverted_residuals
        return dict([*encoder(config), *_midas_decoder(config)])
    check_taps(config)
    return dict([*_backbone(config), *_reassemble(config), *_fusion(config), *_heads(config)])


def initialize(config: Config, rng: np.random.Generator, dtype: type = np.float32) -> Params:
    """Draw parameters for `config` from `rng`: a dict of arrays of `dtype` (float32 or float64)."""
    return {key: _draw(key, shape, rng).astype(dtype) for key, shape in parameter_shapes(config).items()}


def _draw(key: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    owner, _, name = key.rpartition(".")
    if name == "running_mean":
        return np.zeros(shape)
    if name == "running_var":
        return np.ones(shape)
    if key == "head.conv3.bias":
        return np.full(shape, DEPTH_BIAS)
    if "norm" in owner.rpartition(".")[2] or owner.endswith((".bn", ".bn1", ".bn2", ".bn3", ".downsample.1")):
        return np.ones(shape) if name == "weight" else np.zeros(shape)
    transformer = key.startswith("backbone.") and not key.startswith("backbone.patch_embed.") and len(shape) < 4
    if transformer:
        return np.zeros(shape) if name == "bias" else 0.02 * _truncated_normal(shape, rng)
    # The draw of a bias is bounded by its layer's fan_in too; biases are short, so their width stands in for it.
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    return rng.uniform(-1, 1, shape) / math.sqrt(fan_in)


def _truncated_normal(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(int(far.sum()))
    return x


def _layer(prefix: str, *weight: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.weight", weight
    yield f"{prefix}.bias", weight[:1]


def _batch_norm(prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield f"{prefix}.{name}", (width,)


def _backbone(config: Config) -> Iterator[tuple[str, Shape]]:
    width, patch, hidden = config["embed_dim"], config["patch_size"], config["mlp_dim"]
    channels = 3
    if config["embedding"] == "resnet":
        yield from _resnet(config)
        channels, patch_kernel = config["resnet_widths"][-1], 1
    else:
        patch_kernel = patch
    side = config["image_size"] // patch
    yield "backbone.cls_token", (1, 1, width)
    if config["prefix_tokens"] == 2:
        yield "backbone.dist_token", (1, 1, width)
    yield "backbone.pos_embed", (1, config["prefix_tokens"] + side * side, width)
    yield from _layer("backbone.patch_embed.proj", width, channels, patch_kernel, patch_kernel)
    for i in range(max(tap for tap in config["taps"] if isinstance(tap, int)) + 1):  # later blocks would be dead weight
        block = f"backbone.blocks.{i}"
        yield from _layer(f"{block}.norm1", width)
        yield from _layer(f"{block}.attn.qkv", 3 * width, width)
        yield from _layer(f"{block}.attn.proj", width, width)
        yield from _layer(f"{block}.norm2", width)
        yield from _layer(f"{block}.mlp.fc1", hidden, width)
        yield from _layer(f"{block}.mlp.fc2", width, hidden)


def _resnet(config: Config) -> Iterator[tuple[str, Shape]]:
    root, channels = "backbone.patch_embed.backbone", config["resnet_stem_width"]
    yield f"{root}.stem.conv.weight", (channels, 3, 7, 7)
    yield from _layer(f"{root}.stem.norm", channels)
    for stage, (blocks, width) in enumerate(zip(config["resnet_layers"], config["resnet_widths"], strict=True)):
        inner = width // 4
        for i in range(blocks):
            block = f"{root}.stages.{stage}.blocks.{i}"
            if i == 0:
                yield f"{block}.downsample.conv.weight", (width, channels, 1, 1)
                yield from _layer(f"{block}.downsample.norm", width)
            for name, shape in {
                "1": (inner, channels, 1, 1),
                "2": (inner, inner, 3, 3),
                "3": (width, inner, 1, 1),
            }.items():
                yield f"{block}.conv{name}.weight", shape
                yield from _layer(f"{block}.norm{name}", shape[0])
            channels = width


def _reassemble(config: Config) -> Iterator[tuple[str, Shape]]:
    width = config["embed_dim"]
    kernels = {0: 4, 1: 2, 3: 3}
    for k, (tap, stage_width) in enumerate(zip(config["taps"], config["reassemble_widths"], strict=True)):
        prefix = f"reassemble.{k}"
        if isinstance(tap, int):
            if config["readout"] == "project":
                yield from _layer(f"{prefix}.readout", width, 2 * width)
            yield from _layer(f"{prefix}.project", stage_width, width, 1, 1)
            if k in kernels:
                yield from _layer(f"{prefix}.resample", stage_width, stage_width, kernels[k], kernels[k])
        yield f"{prefix}.out.weight", (config["fusion_width"], stage_width, 3, 3)


def _fusion(config: Config) -> Iterator[tuple[str, Shape]]:
    width = config["fusion_width"]
    for k in range(4):
        for unit in ("rcu1", "rcu2") if k < 3 else ("rcu2",):
            for i in (1, 2):
                prefix = f"fusion.{k}.{unit}"
                yield f"{prefix}.conv{i}.weight", (width, width, 3, 3)
                if config["fusion_batch_norm"]:
                    yield from _batch_norm(f"{prefix}.bn{i}", width)
                else:
                    yield f"{prefix}.conv{i}.bias", (width,)
        yield from _layer(f"fusion.{k}.project", width, width, 1, 1)


def _heads(config: Config) -> Iterator[tuple[str, Shape]]:
    width = config["fusion_width"]
    if config["task"] == "depth":
        yield from _depth_head(width, *config["head_widths"])
        return
    for head in ("head", "auxiliary"):
        yield f"{head}.conv.weight", (width, width, 3, 3)
        yield from _batch_norm(f"{head}.bn", width)
        yield from _layer(f"{head}.classifier", config["num_classes"], width, 1, 1)


def _depth_head(width: int, first: int, second: int) -> Iterator[tuple[str, Shape]]:
    yield from _layer("head.conv1", first, width, 3, 3)
    yield from _layer("head.conv2", second, first, 3, 3)
    yield from _layer("head.conv3", 1, second, 1, 1)


def _conv_norm(conv: str, norm: str, *weight: int) -> Iterator[tuple[str, Shape]]:
    yield f"{conv}.weight", weight
    yield from _batch_norm(norm, weight[0])


def _bottlenecks(config: Config) -> Iterator[tuple[str, Shape]]:
    """MiDaS's ResNet or ResNeXt."""
    groups, channels = config["resnet_cardinality"], 64
    yield from _conv_norm("backbone.conv1", "backbone.bn1", channels, 3, 7, 7)
    for stage, (blocks, width) in enumerate(zip(config["resnet_layers"], config["resnet_widths"], strict=True)):
        inner = width // 4 * config["resnet_base_width"] // 64 * groups
        for i in range(blocks):
            block = f"backbone.layer{stage + 1}.{i}"
            yield from _conv_norm(f"{block}.conv1", f"{block}.bn1", inner, channels, 1, 1)
            yield from _conv_norm(f"{block}.conv2", f"{block}.bn2", inner, inner // groups, 3, 3)
            yield from _conv_norm(f"{block}.conv3", f"{block}.bn3", width, inner, 1, 1)
            if i == 0 and (stage > 0 or channels != width):
                yield from _conv_norm(f"{block}.downsample.0", f"{block}.downsample.1", width, channels, 1, 1)
            channels = width


def _inverted_residuals(config: Config) -> Iterator[tuple[str, Shape]]:
    """MiDaS's EfficientNet, up to the last tapped stage: later ones would be dead weight."""
    channels = config["efficientnet_stem_width"]
    yield from _conv_norm("backbone.conv_stem", "backbone.bn1", channels, 3, 3, 3)
    for stage in range(config["efficientnet_taps"][-1] + 1):
        width, kernel = config["efficientnet_widths"][stage], config["efficientnet_kernels"][stage]
        expansion = config["efficientnet_expansions"][stage]
        for i in range(config["efficientnet_layers"][stage]):
            block, inner = f"backbone.blocks.{stage}.{i}", expansion * channels
            if expansion == 1:
                yield from _conv_norm(f"{block}.conv_dw", f"{block}.bn1", inner, 1, kernel, kernel)
                yield from _conv_norm(f"{block}.conv_pw", f"{block}.bn2", width, inner, 1, 1)
            else:
                yield from _conv_norm(f"{block}.conv_pw", f"{block}.bn1", inner, channels, 1, 1)
                yield from _conv_norm(f"{block}.conv_dw", f"{block}.bn2", inner, 1, kernel, kernel)
                yield from _conv_norm(f"{block}.conv_pwl", f"{block}.bn3", width, inner, 1, 1)
            channels = width


def _midas_decoder(config: Config) -> Iterator[tuple[str, Shape]]:
    widths = config["fusion_widths"]
    if config["encoder"] == "resnet":
        tapped = config["resnet_widths"]
    else:
        tapped = [config["efficientnet_widths"][tap] for tap in config["efficientnet_taps"]]
    for k, (width, channels) in enumerate(zip(widths, tapped, strict=True)):
        yield f"reassemble.{k}.out.weight", (width, channels, 3, 3)
    for k, width in enumerate(widths):
        for unit in ("rcu1", "rcu2") if k < 3 else ("rcu2",):
            for i in (1, 2):
                yield from _layer(f"fusion.{k}.{unit}.conv{i}", width, width, 3, 3)
        if config["fusion_block"] == "projected":
            yield from _layer(f"fusion.{k}.project", widths[max(k - 1, 0)], width, 1, 1)
    yield from _depth_head(widths[0], *config["head_widths"])
