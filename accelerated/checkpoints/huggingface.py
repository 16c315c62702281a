"""Hugging Face's DPT: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

`DPTForDepthEstimation` and `DPTForSemanticSegmentation`, plain or hybrid (`is_hybrid`, with a BiT backbone). Unlike ours: query,
key and value are three matrices; fusion blocks count from the deepest; the auxiliary head, which only training uses, was trained
on the last fusion output. Their library is not needed, and what it can compute that DPT does not is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from accelerated.checkpoints.huggingface_config import Json, translate
from accelerated.checkpoints.state_dicts import read_state_dict
from accelerated.configs import Config
from accelerated.dpt import DPT
from accelerated.heads import SegmentationHead
from accelerated.weights import from_tensors, read_safetensors

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
    tensors = _fuse_qkv(_without_untapped_blocks(tensors, config), config["depth"])
    tensors = _settle_biases(tensors, config)
    if config["task"] == "segmentation" and not any(key.startswith("auxiliary") for key in tensors):
        # Theirs is optional. It serves training alone: begin it anew, as create_model does.
        tensors |= {f"auxiliary.{key}": value for key, value in SegmentationHead(config).state_dict().items()}
    return from_tensors(config, tensors, str(folder))


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


def _without_untapped_blocks(tensors: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Drop the transformer blocks after the last tap, which no output depends on."""
    dead = tuple(f"backbone.blocks.{block}." for block in range(config["taps"][-1] + 1, config["depth"]))
    return {key: value for key, value in tensors.items() if not key.startswith(dead)}


def _fuse_qkv(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Stack query, key and value, in this order, as timm's one matrix; attention without biases gets zeros."""
    fused = dict(tensors)
    for block in range(depth):
        prefix = f"backbone.blocks.{block}.attn"
        for leaf in ("weight", "bias"):
            parts = [f"{prefix}.{name}.{leaf}" for name in ("query", "key", "value")]
            if all(part in fused and fused[part].ndim > 0 for part in parts) and len({fused[p].shape[1:] for p in parts}) == 1:
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
    if classifier is None or classifier.ndim == 0:
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
        return read_state_dict(folder / "pytorch_model.bin")
    raise FileNotFoundError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin in it")
