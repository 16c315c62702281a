"""What makes a configuration one of which a model can be built, and for which images can be prepared."""

from __future__ import annotations

import math
from typing import Any

from accelerated.configs import CONFIGS, METRIC, MIDAS, TASKS, Config


def validate(config: Config) -> None:
    """Raise ValueError, in one sentence, where no model can be built from `config`, or no image prepared for it.

    A configuration with an "encoder" is a MiDaS's, every other one a DPT's.
    """
    if "encoder" in config:
        _validate_midas(config)
        _validate_output(config)
        return
    _one_of(config, "task", TASKS)
    _one_of(config, "embedding", ("patch", "resnet"))
    _complete(config)
    _one_of(config, "readout", ("ignore", "add", "project"))
    _one_of(config, "prefix_tokens", (1, 2))
    if config["embed_dim"] % config["num_heads"]:
        raise ValueError(f"embed_dim is {config['embed_dim']}: expected a multiple of num_heads, {config['num_heads']}")
    if config["image_size"] % config["patch_size"]:
        raise ValueError(f"image_size is {config['image_size']}: expected a multiple of patch_size, {config['patch_size']}")
    if config["embedding"] == "resnet":
        _validate_resnet(config)
    _validate_taps(config)
    _validate_output(config)
    _one_of(config, "resize_method", ("minimal", "lower_bound", "upper_bound"))
    if config["resize_multiple"] % config["patch_size"]:
        raise ValueError(
            f"resize_multiple is {config['resize_multiple']}: expected a multiple of patch_size, {config['patch_size']}"
        )


def _complete(config: Config) -> None:
    """Demand every key that a DPT of this task and embedding reads."""
    common = set(CONFIGS["dpt_base" if config["embedding"] == "patch" else "dpt_hybrid"]) - {"head_widths"}
    _has(config, common | ({"head_widths"} if config["task"] == "depth" else {"num_classes", "dropout"}))


def _has(config: Config, needed: set[str]) -> None:
    missing = sorted(needed - config.keys())
    if missing:
        raise ValueError(f"the configuration lacks {', '.join(missing)}: expected the keys of accelerated.configuration(...)")


def _validate_output(config: Config) -> None:
    """Demand sensible values of the keys that say at which size a model looks, and whether it answers in metres."""
    size = config["network_size"]
    sides = size if isinstance(size, list | tuple) else [size]
    if not (sides == [size] or len(sides) == 2) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"network_size is {size!r}: expected a number of pixels, or two, [height, width]")
    given = [key for key in METRIC if key in config]
    if not given:
        return
    _has(config, set(METRIC))
    if config["task"] != "depth" or "encoder" in config:
        raise ValueError(f"the configuration has {', '.join(given)}: expected them of a DPT for depth alone")
    for key in METRIC:
        value = config[key]
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0 or (key != "metric_shift" and value == 0):
            raise ValueError(f"{key} is {value!r}: expected a positive number")


def _one_of(config: Config, key: str, accepted: tuple[Any, ...]) -> None:
    if config[key] not in accepted:
        raise ValueError(f"unknown {key} {config[key]!r}: expected one of {', '.join(map(str, accepted))}")


def _validate_resnet(config: Config) -> None:
    _one_of(config, "weight_standardization", ("variance", "deviation"))
    layers, widths = config["resnet_layers"], config["resnet_widths"]
    if len(layers) != 3 or len(widths) != 3 or config["patch_size"] != 16:
        raise ValueError(
            f"resnet_layers {layers}, resnet_widths {widths} and patch_size {config['patch_size']} do not fit: "
            "expected three stages, whose strides are 4, 8 and 16, and patch_size 16"
        )
    if any(width % 8 for width in [config["resnet_stem_width"], *widths]):
        raise ValueError(f"resnet_stem_width {config['resnet_stem_width']}, resnet_widths {widths}: expected multiples of 8")


def _validate_taps(config: Config) -> None:
    taps, depth = list(config["taps"]), config["depth"]
    maps = taps[:2] == ["R0", "R1"]
    blocks = taps[2:] if maps else taps
    wanted = f"expected four increasing block indices from 0 to {depth - 1}, the first two of which may be 'R0', 'R1'"
    if len(taps) != 4 or not all(type(tap) is int and 0 <= tap < depth for tap in blocks) or blocks != sorted(set(blocks)):
        raise ValueError(f"taps are {taps}: {wanted}")
    if not maps:
        return
    if config["embedding"] != "resnet":
        raise ValueError(f"taps are {taps}: 'R0' and 'R1' are stages of the resnet embedding, and {config['name']} has none")
    if config["reassemble_widths"][:2] != config["resnet_widths"][:2]:
        raise ValueError(
            f"reassemble_widths are {config['reassemble_widths']}: where 'R0' and 'R1' are tapped the first two are those of "
            f"the resnet, {config['resnet_widths'][:2]}"
        )


def _validate_midas(config: Config) -> None:
    _one_of(config, "encoder", ("resnet", "efficientnet"))
    resnet = config["encoder"] == "resnet"
    _has(config, set(MIDAS["midas_v21" if resnet else "midas_v21_small"]))
    _one_of(config, "task", ("depth",))
    _one_of(config, "fusion_block", ("rectified", "projected"))
    widths = config["fusion_widths"]
    if len(widths) != 4 or (config["fusion_block"] == "rectified" and len(set(widths)) > 1):
        raise ValueError(f"fusion_widths are {widths}: expected four, all the same where fusion_block is 'rectified'")
    if resnet:
        _validate_bottlenecks(config)
    else:
        _validate_inverted_residuals(config)
    _one_of(config, "resize_method", ("minimal", "lower_bound", "upper_bound"))
    if config["resize_multiple"] % 4:
        raise ValueError(f"resize_multiple is {config['resize_multiple']}: expected a multiple of 4")


def _validate_bottlenecks(config: Config) -> None:
    layers, widths, base = config["resnet_layers"], config["resnet_widths"], config["resnet_base_width"]
    if len(layers) != 4 or len(widths) != 4:
        raise ValueError(f"resnet_layers {layers} and resnet_widths {widths} do not fit: expected four stages")
    if any(width % 4 or width // 4 * base < 64 for width in widths):
        raise ValueError(
            f"resnet_widths are {widths}, resnet_base_width is {base}: expected multiples of 4, and each a channel in every group"
        )


def _validate_inverted_residuals(config: Config) -> None:
    names = ("layers", "widths", "kernels", "strides", "expansions")
    stages = [config[f"efficientnet_{name}"] for name in names]
    taps, count = list(config["efficientnet_taps"]), len(stages[0])
    if any(len(values) != count for values in stages):
        raise ValueError(
            f"efficientnet_{', efficientnet_'.join(names)} are of lengths {[len(v) for v in stages]}: expected one length"
        )
    if len(taps) != 4 or taps != sorted(set(taps)) or not all(type(tap) is int and 0 <= tap < count for tap in taps):
        raise ValueError(f"efficientnet_taps are {taps}: expected four increasing stages from 0 to {count - 1}")
    reached = [2 * math.prod(config["efficientnet_strides"][: tap + 1]) for tap in taps]
    if reached != [4, 8, 16, 32]:
        raise ValueError(f"efficientnet_taps are {taps}, where the stride is {reached}: expected [4, 8, 16, 32]")
    inputs = [config["efficientnet_stem_width"], *config["efficientnet_widths"][:-1]]
    for stage, expansion in enumerate(config["efficientnet_expansions"]):
        if any(width * expansion % 8 for width in (inputs[stage], config["efficientnet_widths"][stage])):
            raise ValueError(
                f"efficientnet_widths are {config['efficientnet_widths']}, efficientnet_stem_width {inputs[0]}: "
                f"expected multiples of 8 once expanded, which in stage {stage} is by {expansion}"
            )
