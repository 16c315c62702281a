"""Hugging Face's DPT: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

`DPTForDepthEstimation` and `DPTForSemanticSegmentation`, plain or hybrid (`is_hybrid`, with a BiT backbone). Unlike ours: query,
key and value are three matrices; fusion blocks count from the deepest; the auxiliary head, which only training uses, was trained
on the last fusion output. Their library is not needed, and what it can compute that DPT does not is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelerated.checkpoints.authors import read_state_dict
from accelerated.configs import CONFIGS, Config, configuration, validate
from accelerated.dpt import DPT
from accelerated.heads import SegmentationHead
from accelerated.weights import from_tensors, read_safetensors

Json = dict[str, Any]

# What config.json means where it says nothing.
_DEFAULTS: Json = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 384,
    "patch_size": 16,
    "num_channels": 3,
    "is_hybrid": False,
    "backbone": None,
    "backbone_config": None,
    "backbone_out_indices": [2, 5, 8, 11],
    "readout_type": "project",
    "reassemble_factors": [4, 2, 1, 0.5],
    "neck_hidden_sizes": [96, 192, 384, 768],
    "neck_ignore_stages": [0, 1],
    "fusion_hidden_size": 256,
    "head_in_index": -1,
    "use_batch_norm_in_fusion_residual": False,
    "add_projection": False,
    "semantic_classifier_dropout": 0.1,
}
_ACCEPTED: Json = {
    "hidden_act": ["gelu"],
    "num_channels": [3],
    "reassemble_factors": [[4, 2, 1, 0.5]],
    "head_in_index": [-1, 3],
    "add_projection": [False],
}
_BIT_DEFAULTS: Json = {
    "model_type": "bit",
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "preactivation",
    "hidden_act": "relu",
    "global_padding": None,
    "num_groups": 32,
    "embedding_dynamic_padding": False,
    "output_stride": 32,
    "width_factor": 1,
}
_BIT_OF_HYBRID: Json = {
    "layer_type": "bottleneck",
    "global_padding": "SAME",
    "depths": [3, 4, 9],
    "embedding_dynamic_padding": True,
}
_BIT_ACCEPTED: Json = {
    "model_type": ["bit"],
    "num_channels": [3],
    "layer_type": ["bottleneck"],
    "hidden_act": ["relu"],
    "global_padding": ["SAME", "same"],
    "embedding_dynamic_padding": [True],
    "output_stride": [16, 32],
    "width_factor": [1],
    "out_features": [None, ["stage1", "stage2", "stage3"]],
}
_TASKS = {"DPTForDepthEstimation": "depth", "DPTForSemanticSegmentation": "segmentation"}

# Final norm and pooler after the last tap, the deepest block's unit for a skip it has not, and counts of batches.
_DEAD = re.compile(r"dpt\.(layernorm|pooler\.dense)\.|neck\.fusion_stage\.layers\.0\.residual_layer1\.|.*\.num_batches_tracked$")
_RENAMES = [
    (r"dpt\.embeddings\.cls_token", "backbone.cls_token"),
    (r"dpt\.embeddings\.position_embeddings", "backbone.pos_embed"),
    (r"dpt\.embeddings\.(?:patch_embeddings\.)?projection\.", "backbone.patch_embed.proj."),
    (r"dpt\.embeddings\.backbone\.bit\.embedder\.convolution\.", "backbone.patch_embed.backbone.stem.conv."),
    (r"dpt\.embeddings\.backbone\.bit\.embedder\.norm\.", "backbone.patch_embed.backbone.stem.norm."),
    (r"dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d+)\.layers\.", r"backbone.patch_embed.backbone.stages.\1.blocks."),
    (r"dpt\.encoder\.layer\.(\d+)\.attention\.attention\.", r"backbone.blocks.\1.attn."),
    (r"dpt\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"backbone.blocks.\1.attn.proj."),
    (r"dpt\.encoder\.layer\.(\d+)\.intermediate\.dense\.", r"backbone.blocks.\1.mlp.fc1."),
    (r"dpt\.encoder\.layer\.(\d+)\.output\.dense\.", r"backbone.blocks.\1.mlp.fc2."),
    (r"dpt\.encoder\.layer\.(\d+)\.layernorm_before\.", r"backbone.blocks.\1.norm1."),
    (r"dpt\.encoder\.layer\.(\d+)\.layernorm_after\.", r"backbone.blocks.\1.norm2."),
    (r"neck\.reassemble_stage\.readout_projects\.(\d)\.0\.", r"reassemble.\1.readout."),
    (r"neck\.reassemble_stage\.layers\.(\d)\.projection\.", r"reassemble.\1.project."),
    (r"neck\.reassemble_stage\.layers\.(\d)\.resize\.", r"reassemble.\1.resample."),
    (r"neck\.convs\.(\d)\.", r"reassemble.\1.out."),
]
_FUSION = re.compile(
    r"neck\.fusion_stage\.layers\.([0-3])\.(projection|residual_layer([12])\.(convolution|batch_norm)([12]))\.(\w+)"
)
_HEAD = re.compile(r"(head|auxiliary_head)\.head\.(\d)\.(\w+)")
_HEAD_LAYERS = {
    "depth": {"0": "conv1", "2": "conv2", "4": "conv3"},
    "segmentation": {"0": "conv", "1": "bn", "4": "classifier"},
}


def load(folder: Path) -> DPT:
    """Return the model of a folder that `save_pretrained` has written. Raises FileNotFoundError or ValueError."""
    described = _read_json(folder / "config.json")
    state = _read_tensors(folder)
    config = translate(described, folder)
    if config["task"] == "segmentation":
        config["num_classes"] = _num_classes(state, folder)
    _carry_normalisation(config, folder)
    tensors = {rename(key, config["task"]): value for key, value in state.items() if not _DEAD.match(key)}
    tensors = _fuse_qkv(tensors, config["depth"])
    tensors = _settle_biases(tensors, config)
    if config["task"] == "segmentation" and not any(key.startswith("auxiliary") for key in tensors):
        # Theirs is optional. It serves training alone: begin it anew, as create_model does.
        tensors |= {f"auxiliary.{key}": value for key, value in SegmentationHead(config).state_dict().items()}
    return from_tensors(config, tensors, str(folder))


def translate(described: Json, folder: Path) -> Config:
    """Return our configuration for theirs, its `num_classes` still to be read off the weights.

    Raises ValueError for what the paper's DPT cannot compute.
    """
    source = f"{folder / 'config.json'} describes a model that is no DPT of the paper"
    if described.get("model_type") != "dpt":
        raise ValueError(f"{source}: model_type is {described.get('model_type')!r}, expected 'dpt'")
    kinds = described.get("architectures") or [None]
    if kinds[0] not in _TASKS:
        raise ValueError(f"{source}: architectures is {kinds}, expected {' or '.join(_TASKS)}")
    theirs = _DEFAULTS | described
    _refuse(theirs, _ACCEPTED, source)
    if not theirs["is_hybrid"] and (theirs["backbone"] or theirs["backbone_config"]):
        raise ValueError(f"{source}: its backbone is another network, expected the plain transformer, or is_hybrid with a BiT")
    config = configuration("dpt_hybrid" if theirs["is_hybrid"] else "dpt_base", _TASKS[kinds[0]])
    config |= {
        "patch_size": _side(theirs, "patch_size", source),
        "image_size": _side(theirs, "image_size", source),
        "embed_dim": theirs["hidden_size"],
        "depth": theirs["num_hidden_layers"],
        "num_heads": theirs["num_attention_heads"],
        "mlp_dim": theirs["intermediate_size"],
        "layer_norm_eps": theirs["layer_norm_eps"],
        "readout": theirs["readout_type"],
        "reassemble_widths": list(theirs["neck_hidden_sizes"]),
        "fusion_width": theirs["fusion_hidden_size"],
        "fusion_batch_norm": bool(theirs["use_batch_norm_in_fusion_residual"]),
        "taps": sorted(theirs["backbone_out_indices"]),  # they are read in the order of the blocks
    }
    if config["image_size"] != 384:
        config["network_size"] = config["image_size"]
    if config["task"] == "depth":
        config["head_widths"] = [config["fusion_width"] // 2, 32]
    else:
        config["dropout"] = theirs["semantic_classifier_dropout"]
    if theirs["is_hybrid"]:
        config |= _translate_bit(theirs, source)
    config |= _identity(config)
    validate(config)
    return config


def _translate_bit(theirs: Json, source: str) -> Config:
    if list(theirs["neck_ignore_stages"]) != [0, 1]:
        raise ValueError(f"{source}: neck_ignore_stages is {theirs['neck_ignore_stages']}, expected [0, 1]")
    bit = _BIT_DEFAULTS | (theirs["backbone_config"] or _BIT_OF_HYBRID)
    _refuse(bit | {"out_features": bit.get("out_features")}, _BIT_ACCEPTED, f"{source}: backbone_config")
    return {
        "resnet_stem_width": bit["embedding_size"],
        "resnet_layers": list(bit["depths"]),
        "resnet_widths": list(bit["hidden_sizes"][: len(bit["depths"])]),  # the list may be longer than the network
        "resnet_groups": bit["num_groups"],
        "weight_standardization": "variance",
        "taps": ["R0", "R1", *sorted(theirs["backbone_out_indices"][2:])],
    }


def _refuse(theirs: Json, accepted: Json, source: str) -> None:
    for key, values in accepted.items():
        if theirs[key] not in values:
            raise ValueError(f"{source}: {key} is {theirs[key]!r}, expected {' or '.join(map(repr, values))}")


def _side(theirs: Json, key: str, source: str) -> int:
    value = theirs[key]
    sides = set(value) if isinstance(value, list) else {value}
    if len(sides) != 1 or not isinstance(value_ := sides.pop(), int):
        raise ValueError(f"{source}: {key} is {value!r}, expected one whole number or a square")
    return value_


def _identity(config: Config) -> Config:
    """The paper's name for these dimensions, where it has one; pretrained encoders are looked up by it."""
    same = ("embedding", "patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "resnet_layers", "resnet_widths", "taps")
    for name in ("dpt_base", "dpt_large", "dpt_hybrid"):
        if all(config.get(key) == CONFIGS[name].get(key) for key in (*same, "reassemble_widths", "fusion_width")):
            return {"name": name, "backbone": CONFIGS[name]["backbone"]}
    return {"name": "dpt_custom", "backbone": "custom"}


def rename(key: str, task: str) -> str:
    """Return our key for Hugging Face's `key`; a key that is none of theirs comes back as it is, to be reported."""
    if match := _FUSION.fullmatch(key):
        block, part, unit, kind, index, leaf = match.groups()
        layer = "project" if part == "projection" else f"rcu{unit}.{'conv' if kind == 'convolution' else 'bn'}{index}"
        return f"fusion.{3 - int(block)}.{layer}.{leaf}"
    if match := _HEAD.fullmatch(key):
        head, index, leaf = match.groups()
        layer = _HEAD_LAYERS[task].get(index, "")
        return f"{'head' if head == 'head' else 'auxiliary'}.{layer}.{leaf}" if layer else key
    for pattern, ours in _RENAMES:
        renamed, count = re.subn(rf"^{pattern}", ours, key)
        if count:
            return renamed
    return key


def _fuse_qkv(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Stack query, key and value, in this order, as timm's one matrix; attention without biases gets zeros."""
    fused = dict(tensors)
    for block in range(depth):
        prefix = f"backbone.blocks.{block}.attn"
        for leaf in ("weight", "bias"):
            parts = [f"{prefix}.{name}.{leaf}" for name in ("query", "key", "value")]
            if all(part in fused for part in parts):
                fused[f"{prefix}.qkv.{leaf}"] = torch.cat([fused.pop(part) for part in parts])
        weight = fused.get(f"{prefix}.qkv.weight")
        if weight is not None:
            fused.setdefault(f"{prefix}.qkv.bias", weight.new_zeros(weight.shape[0]))
    return fused


def _settle_biases(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Give the fusion blocks' convolutions the biases ours have: zeros where theirs lack them, none where batch norm follows.

    There a bias only moves the mean that batch norm subtracts: BN(x + b) with running mean m is BN(x) with m - b.
    """
    settled = dict(tensors)
    for key, value in tensors.items():
        match = re.fullmatch(r"(fusion\.\d\.rcu[12])\.conv([12])\.weight", key)
        if not match:
            continue
        bias = f"{match[1]}.conv{match[2]}.bias"
        mean = f"{match[1]}.bn{match[2]}.running_mean"
        if not config["fusion_batch_norm"]:
            settled.setdefault(bias, value.new_zeros(value.shape[0]))
        elif bias in settled and mean in settled:
            settled[mean] = settled[mean] - settled.pop(bias)
    return settled


def _num_classes(state: dict[str, Tensor], folder: Path) -> int:
    classifier = state.get("head.head.4.weight")
    if classifier is None:
        raise ValueError(f"{folder} is said to hold a segmentation model, but its classifier, head.head.4.weight, is missing")
    return classifier.shape[0]


def _carry_normalisation(config: Config, folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        described = _read_json(path)
        for key in ("image_mean", "image_std"):
            config[key] = described.get(key, config[key])


def _read_json(path: Path) -> Json:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}: expected a folder that save_pretrained() has written")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, or is truncated: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a JSON object")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")[0]
    if (folder / "pytorch_model.bin").is_file():
        return dict(read_state_dict(folder / "pytorch_model.bin"))
    raise FileNotFoundError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin in it")
