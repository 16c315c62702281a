"""Hugging Face's `config.json` for DPT, translated into our configuration; what the paper's DPT cannot compute is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerated.config_checks import validate
from accelerated.configs import CONFIGS, Config, configuration

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
    if theirs["backbone"] or (theirs["backbone_config"] and not theirs["is_hybrid"]):
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
    try:
        validate(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
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
