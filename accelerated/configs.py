"""The configurations of the paper's models, as plain data.

A configuration is one flat dictionary of numbers, strings and lists. It is what a weight file carries in its metadata, so it
is all that either form of the model (NumPy or PyTorch) needs to know besides the parameters.

Sources: paper section 3 (taps, readout, widths of the three models) and the authors' published inference code (0-based taps,
widths of the reassemble stages, LayerNorm eps, preprocessing).
"""

from __future__ import annotations

import copy
from typing import Any

Config = dict[str, Any]

_PREPROCESSING: Config = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "network_size": 384,  # pixels; both sides of the image are brought near it
    "resize_method": "minimal",  # keep the aspect ratio; the side that needs the smaller change of scale reaches network_size
    "resize_multiple": 32,
}

_DECODER: Config = {
    "task": "depth",
    "readout": "project",  # "ignore", "add" or "project"
    "fusion_width": 256,
    "fusion_batch_norm": False,  # the paper: none for depth, batch norm for segmentation
    "head_widths": [128, 32],
}

_VIT_BASE: Config = {
    "embedding": "patch",
    "patch_size": 16,
    "image_size": 384,  # side of the square image whose patch grid the stored position embedding covers
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_dim": 3072,
    "prefix_tokens": 1,  # the readout token, and the distillation token where there is one
    "layer_norm_eps": 1e-6,
}

_RESNET50: Config = {
    "embedding": "resnet",
    "resnet_stem_width": 64,
    "resnet_layers": [3, 4, 9],
    "resnet_widths": [256, 512, 1024],
    "resnet_groups": 32,
    "weight_standardization": "variance",  # or "deviation": what the authors' files were trained with
}

CONFIGS: dict[str, Config] = {
    "dpt_base": {
        "name": "dpt_base",
        "backbone": "vit_base_patch16_384",
        **_VIT_BASE,
        "taps": [2, 5, 8, 11],
        "reassemble_widths": [96, 192, 384, 768],
        **_DECODER,
        **_PREPROCESSING,
    },
    "dpt_large": {
        "name": "dpt_large",
        "backbone": "vit_large_patch16_384",
        **_VIT_BASE,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_dim": 4096,
        "taps": [5, 11, 17, 23],
        "reassemble_widths": [256, 512, 1024, 1024],
        **_DECODER,
        **_PREPROCESSING,
    },
    "dpt_hybrid": {
        "name": "dpt_hybrid",
        "backbone": "vit_base_r50_s16_384",
        **_VIT_BASE,
        **_RESNET50,
        "taps": ["R0", "R1", 8, 11],
        "reassemble_widths": [256, 512, 768, 768],
        **_DECODER,
        **_PREPROCESSING,
    },
    "dpt_deit_base": {
        "name": "dpt_deit_base",
        "backbone": "deit_base_patch16_384",
        **_VIT_BASE,
        "taps": [2, 5, 8, 11],
        "reassemble_widths": [96, 192, 384, 768],
        **_DECODER,
        **_PREPROCESSING,
    },
    "dpt_deit_base_distilled": {
        "name": "dpt_deit_base_distilled",
        "backbone": "deit_base_distilled_patch16_384",
        **_VIT_BASE,
        "prefix_tokens": 2,
        "taps": [2, 5, 8, 11],
        "reassemble_widths": [96, 192, 384, 768],
        **_DECODER,
        **_PREPROCESSING,
    },
    # A Hybrid in miniature, for demonstrations: trains from scratch on a laptop. Not a model of the paper.
    "dpt_tiny": {
        "name": "dpt_tiny",
        "backbone": "hybrid_tiny",
        **_VIT_BASE,
        **_RESNET50,
        "image_size": 96,
        "embed_dim": 192,
        "depth": 3,
        "num_heads": 3,
        "mlp_dim": 768,
        "resnet_stem_width": 32,
        "resnet_layers": [2, 2, 2],
        "resnet_widths": [64, 128, 256],
        "resnet_groups": 8,
        "taps": ["R0", "R1", 1, 2],
        "reassemble_widths": [64, 128, 192, 192],
        **_DECODER,
        "fusion_width": 64,
        "head_widths": [32, 16],
        **_PREPROCESSING,
        "network_size": 64,  # what the demo trains at
    },
}

# MiDaS, the convolutional network that the paper measures itself against (section 4.1 and table 8). Sources: Ranftl et al.,
# "Towards Robust Monocular Depth Estimation" (2020), and the authors' published code for v2.1 (widths, preprocessing, quirks).
_MIDAS_PREPROCESSING: Config = {
    **_PREPROCESSING,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resize_method": "upper_bound",
}

_MIDAS_DECODER: Config = {
    "task": "depth",
    "fusion_block": "rectified",  # ReLU(x) + f(x), no 1x1 convolution; or "projected": x + f(x), and the paper's 1x1 convolution
    "fusion_widths": [256, 256, 256, 256],  # finest first
    "head_widths": [128, 32],
}

_MIDAS_RESNET: Config = {
    "encoder": "resnet",
    "resnet_layers": [3, 4, 6, 3],
    "resnet_widths": [256, 512, 1024, 2048],
    "resnet_cardinality": 1,  # groups of a bottleneck's 3x3 convolution
    "resnet_base_width": 64,  # channels of each group where the bottleneck is 64 wide
    "batch_norm_eps": 1e-5,
}

MIDAS: dict[str, Config] = {
    "midas_v21": {
        "name": "midas_v21",
        "backbone": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k",
        **_MIDAS_RESNET,
        "resnet_layers": [3, 4, 23, 3],
        "resnet_cardinality": 32,
        "resnet_base_width": 8,
        **_MIDAS_DECODER,
        **_MIDAS_PREPROCESSING,
    },
    "midas_resnet50": {
        "name": "midas_resnet50",
        "backbone": "resnet50.tv_in1k",
        **_MIDAS_RESNET,
        **_MIDAS_DECODER,
        **_MIDAS_PREPROCESSING,
    },
    "midas_v21_small": {
        "name": "midas_v21_small",
        "backbone": "tf_efficientnet_lite3.in1k",
        "encoder": "efficientnet",
        "efficientnet_stem_width": 32,
        "efficientnet_layers": [1, 3, 3, 5, 5, 6, 1],
        "efficientnet_widths": [24, 32, 48, 96, 136, 232, 384],
        "efficientnet_kernels": [3, 3, 5, 3, 5, 5, 3],
        "efficientnet_strides": [1, 2, 2, 2, 1, 2, 1],
        "efficientnet_expansions": [1, 6, 6, 6, 6, 6, 6],
        "efficientnet_taps": [1, 2, 4, 6],  # 0-based stages: the last at each of 1/4, 1/8, 1/16, 1/32
        "batch_norm_eps": 1e-3,
        **_MIDAS_DECODER,
        "fusion_block": "projected",
        "fusion_widths": [64, 128, 256, 512],
        "head_widths": [32, 32],
        **_MIDAS_PREPROCESSING,
        "network_size": 256,
    },
}

TASKS = ("depth", "segmentation")

# What a depth model whose output is in metres has besides: 1 / max(metric_scale * inverse depth + metric_shift, 1e-8) is that
# output, and metric_png_scale the factor by which its benchmark's PNG of 16 bits holds metres.
METRIC = ("metric_scale", "metric_shift", "metric_png_scale")


def configuration(
    name: str,
    task: str = "depth",
    readout: str | None = None,
    taps: list[int | str] | None = None,
    num_classes: int | None = None,
) -> Config:
    """Return a fresh copy of `CONFIGS[name]` or `MIDAS[name]`, changed as asked.

    `task="segmentation"` adds `num_classes` (150 unless given, as ADE20K), batch norm in the fusion blocks, dropout 0.1 before
    the classifiers and a network size of 480 (paper section 5.2). Raises ValueError for an unknown name or task, for
    `num_classes` with a depth model, and for a MiDaS with a readout, taps or another task than depth.
    """
    if name not in CONFIGS | MIDAS:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(sorted(CONFIGS | MIDAS))}")
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    if name in MIDAS and (task != "depth" or readout is not None or taps is not None):
        raise ValueError(f"{name} is a MiDaS: expected task='depth', and neither readout nor taps, which are a transformer's")
    config = copy.deepcopy((CONFIGS | MIDAS)[name])
    config["task"] = task
    if task == "segmentation":
        del config["head_widths"]
        config["num_classes"] = 150 if num_classes is None else num_classes
        config["fusion_batch_norm"] = True
        config["dropout"] = 0.1
        if config["network_size"] == 384:
            config["network_size"] = 480
    elif num_classes is not None:
        raise ValueError(f"num_classes={num_classes} was given for a depth model: it belongs to task='segmentation'")
    if readout is not None:
        config["readout"] = readout
    if taps is not None:
        config["taps"] = list(taps)
    return config
