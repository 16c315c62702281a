"""Our configuration as Hugging Face's config.json and preprocessor_config.json; what their DPT cannot compute is refused."""

from __future__ import annotations

import math

from accelerated.checkpoints.huggingface_config import Json
from accelerated.configs import CONFIGS, Config

_CLASSES = {"depth": "DPTForDepthEstimation", "segmentation": "DPTForSemanticSegmentation"}
_KNOWN = {"num_classes", "dropout", *CONFIGS["dpt_base"], *CONFIGS["dpt_hybrid"]}


def describe(config: Config) -> Json:
    """Return the content of config.json, without its dtype. Raises ValueError for what their classes cannot compute."""
    _refuse(config)
    hybrid, segments = config["embedding"] == "resnet", config["task"] == "segmentation"
    blocks = [tap for tap in config["taps"] if isinstance(tap, int)]
    described: Json = {
        "model_type": "dpt",
        "architectures": [_CLASSES[config["task"]]],
        "hidden_size": config["embed_dim"],
        "num_hidden_layers": blocks[-1] + 1,  # ours holds no block after the last tap
        "num_attention_heads": config["num_heads"],
        "intermediate_size": config["mlp_dim"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": config["layer_norm_eps"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "num_channels": 3,
        "qkv_bias": True,
        "is_hybrid": hybrid,
        "backbone_config": _describe_resnet(config) if hybrid else None,
        "backbone_featmap_shape": None,
        "backbone_out_indices": [0, 1, *blocks] if hybrid else blocks,
        "neck_ignore_stages": [0, 1] if hybrid else [],
        "readout_type": config["readout"],
        "reassemble_factors": [4, 2, 1, 0.5],
        "neck_hidden_sizes": list(config["reassemble_widths"]),
        "fusion_hidden_size": config["fusion_width"],
        "use_batch_norm_in_fusion_residual": config["fusion_batch_norm"],
        "use_bias_in_fusion_residual": not config["fusion_batch_norm"],
        "head_in_index": -1,
        "add_projection": False,
        "use_auxiliary_head": segments,
        "auxiliary_loss_weight": 0.4,
        "semantic_loss_ignore_index": 255,
        "semantic_classifier_dropout": config.get("dropout", 0.1),
        "pooler_output_size": config["embed_dim"],
        "pooler_act": "tanh",
    }
    if hybrid:
        grid = config["image_size"] // config["patch_size"]
        described["backbone_featmap_shape"] = [1, config["resnet_widths"][2], grid, grid]
    if segments:
        labels = [f"LABEL_{k}" for k in range(config["num_classes"])]
        described["id2label"] = {str(k): label for k, label in enumerate(labels)}
        described["label2id"] = {label: k for k, label in enumerate(labels)}
    return described


def describe_preprocessing(config: Config) -> Json:
    """Return the content of preprocessor_config.json: pictures become squares, since their classes take nothing else.

    The side is network_size, for a Hybrid image_size, with an even number of patches. Raises ValueError for a network_size of
    two different sides.
    """
    size = config["network_size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise ValueError(f"network_size is {size}, and Hugging Face's DPT takes square images alone: expected one number")
    multiple = math.lcm(config["resize_multiple"], 2 * config["patch_size"])
    if config["embedding"] == "resnet":
        side, multiple = config["image_size"], 2 * config["patch_size"]
    else:
        side = max(round(sides.pop() / multiple), 1) * multiple
    return {
        "image_processor_type": "DPTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "keep_aspect_ratio": False,
        "ensure_multiple_of": multiple,
        "resample": 3,  # Pillow's number for bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config["image_mean"]),
        "image_std": list(config["image_std"]),
        "do_pad": False,
    }


def head_widths(config: Config) -> list[int]:
    """The two widths of their depth head, of which the second is 32 whatever the configuration."""
    return [config["fusion_width"] // 2, 32]


def _refuse(config: Config) -> None:
    """Raise ValueError, naming key and value, for the first thing in `config` that their classes cannot compute."""

    def refuse(key: str, expected: str) -> None:
        raise ValueError(f"{key} is {config[key]!r}, which Hugging Face's DPT cannot compute: expected {expected}")

    if "encoder" in config:
        refuse("encoder", "a DPT, which has none (this is a convolutional MiDaS)")
    if "metric_scale" in config:
        refuse("metric_scale", "a model of inverse depth without a metric scale, since metres would become inverse depth")
    for key in config:
        if key not in _KNOWN:
            refuse(key, "no such key")
    if config["prefix_tokens"] != 1:
        refuse("prefix_tokens", "1, the readout token alone")
    own, theirs = config.get("head_widths", [0, 0]), head_widths(config)
    if own[0] > theirs[0] or own[1] > theirs[1]:
        refuse("head_widths", f"at most {theirs}")
    if config["embedding"] == "resnet":
        if list(config["taps"])[:2] != ["R0", "R1"]:
            refuse("taps", "'R0', 'R1' and two blocks, of a Hybrid")
        if config["readout"] != "project":
            refuse("readout", "'project', of a Hybrid")
        if config["image_size"] % (2 * config["patch_size"]):
            refuse("image_size", f"a multiple of {2 * config['patch_size']}, of a Hybrid: it takes images of that size alone")


def _describe_resnet(config: Config) -> Json:
    stages = [f"stage{stage}" for stage in (1, 2, 3)]
    return {
        "model_type": "bit",
        "num_channels": 3,
        "embedding_size": config["resnet_stem_width"],
        "hidden_sizes": list(config["resnet_widths"]),
        "depths": list(config["resnet_layers"]),
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "global_padding": "SAME",
        "num_groups": config["resnet_groups"],
        "drop_path_rate": 0.0,
        "embedding_dynamic_padding": True,
        "output_stride": 32,
        "width_factor": 1,
        "stage_names": ["stem", *stages],
        "out_features": stages,
        "out_indices": [1, 2, 3],
    }
