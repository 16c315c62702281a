"""The authors' weight files: PyTorch state dicts, keys `pretrained.*` (encoder and reassemble) and `scratch.*` (fusion, head).

Their stages and fusion blocks count from 1, finest first. `auxlayer.*` is the auxiliary head. Their models were trained with an
older timm, whose weight standardisation divides by std + 1e-5: the configuration says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelerated.configs import Config, configuration
from accelerated.dpt import DPT
from accelerated.weights import from_tensors

MODELS = {
    "dpt_base": ("dpt_base", "depth"),
    "dpt_hybrid": ("dpt_hybrid", "depth"),
    "dpt_hybrid-midas": ("dpt_hybrid", "depth"),
    "dpt_hybrid-ade20k": ("dpt_hybrid", "segmentation"),
    "dpt_large": ("dpt_large", "depth"),
    "dpt_large-midas": ("dpt_large", "depth"),
    "dpt_large-ade20k": ("dpt_large", "segmentation"),
}

# The ImageNet classifier and the final norm before it, the deepest block's unit for a skip it has not, and a count of batches.
DEAD = re.compile(r"pretrained\.model\.(norm|head)\.|scratch\.refinenet4\.resConfUnit1\.|.*\.num_batches_tracked$")

_KEY = re.compile(
    r"pretrained\.model\.(?P<backbone>.+)"
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


def load(path: Path, model: str | None) -> DPT:
    """Return the model of the state dict at `path`, which is the one `model` names. Raises ValueError where it is not."""
    if model is None:
        raise ValueError(f"{path} does not say which model it holds: give model= one of {', '.join(MODELS)}")
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}: expected one of {', '.join(MODELS)}")
    config = authors_configuration(*MODELS[model])
    state = read_state_dict(path)
    tensors = {rename(key, config["task"]): value for key, value in state.items() if not DEAD.match(key)}
    return from_tensors(config, tensors, str(path))


def authors_configuration(name: str, task: str) -> Config:
    """The configuration as the authors trained it."""
    config = configuration(name, task)
    if config["embedding"] == "resnet":
        config["weight_standardization"] = "deviation"
    return config


def rename(key: str, task: str) -> str:
    """Return our key for the authors' `key`; a key that is none of theirs comes back as it is, to be reported."""
    match = _KEY.fullmatch(key)
    if match is None:
        return key
    part: dict[str, Any] = match.groupdict()
    if part["backbone"]:
        return f"backbone.{part['backbone']}"
    if part["stage"]:
        return f"reassemble.{int(part['stage']) - 1}.{_STEPS[part['step']]}.{part['stage_leaf']}"
    if part["out"]:
        return f"reassemble.{int(part['out']) - 1}.out.weight"
    if part["block"]:
        layer = "project" if part["unit"] is None else f"rcu{part['unit']}.{part['layer']}"
        return f"fusion.{int(part['block']) - 1}.{layer}.{part['block_leaf']}"
    layer = _LAYERS[task].get(part["index"], "")
    return f"{_HEADS[part['head']]}.{layer}.{part['head_leaf']}" if layer else key


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file written by `torch.save`, also of one that wraps them as {"model": ..., "optimizer": ...}.

    Nothing but tensors and containers is ever unpickled. Raises FileNotFoundError, or ValueError for anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file at {path}")
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one, for a foreign file, depends on what its bytes happen to be taken for
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{path} is no PyTorch state dict, is truncated, or holds more than tensors, which is never loaded: {reason}"
            ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected a dictionary from names to tensors")
    return content
