"""The authors' weight files: PyTorch state dicts of DPT and of the convolutional MiDaS.

Their keys are `pretrained.*` (encoder and reassemble), `scratch.*` (fusion, head) and `auxlayer.*` (the auxiliary head); stages
and fusion blocks count from 1, finest first. The Hybrids were trained with an older timm, whose weight standardisation divides by
std + 1e-5: their configuration says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from accelerated.checkpoints import published
from accelerated.checkpoints.state_dicts import read_state_dict
from accelerated.configs import Config, configuration
from accelerated.dpt import DPT
from accelerated.weights import from_tensors

# The ImageNet classifier and the final norm before it, the deepest block's unit for a skip it has not, and a count of batches.
DEAD = re.compile(r"pretrained\.model\.(norm|head|head_dist)\.|scratch\.refinenet4\.resConfUnit1\.|.*\.num_batches_tracked$")

_KEY = re.compile(
    r"pretrained\.model\.(?P<backbone>.+)"
    r"|pretrained\.layer(?P<level>[1-4])\.(?P<encoder>.+)"
    r"|pretrained\.act_postprocess(?P<stage>[1-4])\.(?P<step>0\.project\.0|3|4)\.(?P<stage_leaf>weight|bias)"
    r"|scratch\.layer(?P<out>[1-4])_rn\.weight"
    r"|scratch\.refinenet(?P<block>[1-4])\.(?P<part>out_conv|resConfUnit(?P<unit>[12])\.(?P<layer>\w+))\.(?P<block_leaf>\w+)"
    r"|(?P<head>scratch\.output_conv|auxlayer)\.(?P<index>\d)\.(?P<head_leaf>\w+)"
)
_STEPS = {"0.project.0": "readout", "3": "project", "4": "resample"}
_HEADS = {"scratch.output_conv": "head", "auxlayer": "auxiliary"}
_LAYERS = {
    "depth": {"0": "conv1", "2": "conv2", "4": "conv3"},
    "segmentation": {"0": "conv", "1": "bn", "4": "classifier"},
}

# MiDaS's encoders are cut into four levels, each a sequence of modules: what stands where in ours.
_RESNET_LEVELS = {"1.0": "conv1", "1.1": "bn1", "1.4": "layer1"}
_EFFICIENTNET_LEVELS = {
    "1.0": "conv_stem",
    "1.1": "bn1",
    "1.3": "blocks.0",
    "1.4": "blocks.1",
    "2.0": "blocks.2",
    "3.0": "blocks.3",
    "3.1": "blocks.4",
    "4.0": "blocks.5",
    "4.1": "blocks.6",
}
_WIDTHS = {768: "dpt_base", 1024: "dpt_large"}


def load(path: Path, name: str | None) -> DPT:
    """Return the model of the state dict at `path`; `name`, if given, is what it has to be. Raises ValueError where it is not."""
    state = read_state_dict(path)
    config = recognise(state, path)
    if name is not None and not published.agrees(config, name) and not _is_candidate(config, name):
        raise ValueError(f"{path} holds a {config['name']} ({config['task']}), not the {name} it was opened as")
    config = _settled(config, path, name)
    tensors = {rename(key, config): value for key, value in state.items() if not DEAD.match(key)}
    return from_tensors(config, tensors, str(path))


def recognise(state: Mapping[str, Tensor], path: Path) -> Config:
    """Return the configuration that the keys and shapes of the authors' `state` tell: the network and its task.

    What they cannot tell, whether a Hybrid gives metres, is left out. Raises ValueError where the layout is not theirs.
    """
    if any(key.startswith("pretrained.layer1.") for key in state):
        return configuration("midas_v21_small" if "scratch.refinenet1.out_conv.weight" in state else "midas_v21")
    norm = next(
        (value for key, value in state.items() if re.fullmatch(r"pretrained\.model\.blocks\.\d+\.norm1\.weight", key)), None
    )
    if norm is None or any(".gamma_1" in key for key in state):
        some = ", ".join(list(state)[:3])
        raise ValueError(
            f"{path} has tensors of no known layout ({some}, ...): expected the authors' DPT or MiDaS v2.1, a folder of "
            "Hugging Face's DPT, or a file that accelerated.save has written"
        )
    name = _WIDTHS.get(norm.shape[0] if norm.ndim else 0)
    if any(key.startswith("pretrained.model.patch_embed.backbone.") for key in state):
        name = "dpt_hybrid"
    elif "pretrained.model.dist_token" in state:
        name = "dpt_deit_base_distilled"
    if name is None:
        raise ValueError(f"{path} has an encoder of width {norm.shape[0]}: expected {' or '.join(map(str, _WIDTHS))}")
    segments = any(key.startswith(("scratch.output_conv.1.", "auxlayer.")) for key in state)
    classifier = state.get("scratch.output_conv.4.weight")
    classes = classifier.shape[0] if segments and classifier is not None and classifier.ndim else None
    config = configuration(name, "segmentation" if segments else "depth", num_classes=classes)
    return config | ({"weight_standardization": "deviation"} if name == "dpt_hybrid" else {})


def _is_candidate(config: Config, name: str) -> bool:
    return published.ALIASES.get(name, name) in published.candidates(config)


def _settled(config: Config, path: Path, name: str | None) -> Config:
    """Add to `config` what the published model is besides its network, told by hash, file name or `name`; they must agree."""
    among = published.candidates(config)
    if len(among) < 2:
        return config
    by_hash = published.by_hash(path, among)
    told = by_hash or published.by_file_name(path, among)
    if name is not None and name not in (config["name"], *among):
        name = published.ALIASES[name]
    if told is not None and name not in (None, config["name"], told):
        evidence = "SHA-256" if by_hash else "file name"
        raise ValueError(f"{path} is {told} by its {evidence}, not the {name} it was opened as")
    told = told or (published.plain(name) or name if name is not None else None)
    if told is None:
        raise ValueError(
            f"{path} is one of {', '.join(among)}, and neither its tensors nor its SHA-256 nor its name say which: "
            "give that name as model= (on the command line, --model)"
        )
    return config | published.PUBLISHED[told].settings


def rename(key: str, config: Config) -> str:
    """Return our key for the authors' `key`; a key that is none of theirs comes back as it is, to be reported."""
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    part: dict[str, Any] = match.groupdict()
    if part["backbone"]:
        return f"backbone.{part['backbone']}"
    if part["level"]:
        return _rename_level(part["level"], part["encoder"], config) or key
    if part["stage"]:
        return f"reassemble.{int(part['stage']) - 1}.{_STEPS[part['step']]}.{part['stage_leaf']}"
    if part["out"]:
        return f"reassemble.{int(part['out']) - 1}.out.weight"
    if part["block"]:
        layer = "project" if part["unit"] is None else f"rcu{part['unit']}.{part['layer']}"
        return f"fusion.{int(part['block']) - 1}.{layer}.{part['block_leaf']}"
    layer = _LAYERS[config["task"]].get(part["index"], "")
    return f"{_HEADS[part['head']]}.{layer}.{part['head_leaf']}" if layer else key


def _rename_level(level: str, rest: str, config: Config) -> str | None:
    """Our key for `pretrained.layer{level}.{rest}` of a MiDaS, or None where it has none."""
    if config.get("encoder") == "resnet" and level != "1":
        return f"backbone.layer{level}.{rest}"
    index, _, leaf = rest.partition(".")
    levels = _RESNET_LEVELS if config.get("encoder") == "resnet" else _EFFICIENTNET_LEVELS
    module = levels.get(f"{level}.{index}")
    return f"backbone.{module}.{leaf}" if module else None
