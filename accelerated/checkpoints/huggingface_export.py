"""Our DPT as a folder of Hugging Face's transformers: config.json, model.safetensors and preprocessor_config.json.

`DPTForDepthEstimation` and `DPTForSemanticSegmentation`, opened on that folder, are the same function of a square image whose
patch grid has even sides: of a grid that is not square, and of the halves of an odd one, they compute something else, and their
Hybrid takes images of image_size alone. What they hold and a DPT does not (a final norm, the deepest block's first unit, counts
of batches) is written as 1 and 0. Three things are rewritten, each without a change of value: query, key and value are three
matrices; a narrower depth head is filled up with channels that are zero; weights standardised as the authors' files have it are
scaled so that theirs gives the same. In training alone the auxiliary head differs: it reads their last fusion output, ours the
one before it, and its dropout is always 0.1. What their classes cannot compute is refused. Their library is not needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from accelerated.checkpoints.huggingface_export_config import describe, describe_preprocessing, head_widths
from accelerated.configs import Config

if TYPE_CHECKING:
    from accelerated.dpt import DPT

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")

_RESNET = "backbone.patch_embed.backbone."
_RENAMES = [
    (r"backbone\.cls_token", "dpt.embeddings.cls_token"),
    (r"backbone\.pos_embed", "dpt.embeddings.position_embeddings"),
    (r"backbone\.patch_embed\.backbone\.stem\.conv\.", "dpt.embeddings.backbone.bit.embedder.convolution."),
    (r"backbone\.patch_embed\.backbone\.stem\.norm\.", "dpt.embeddings.backbone.bit.embedder.norm."),
    (r"backbone\.patch_embed\.backbone\.stages\.(\d)\.blocks\.", r"dpt.embeddings.backbone.bit.encoder.stages.\1.layers."),
    (r"backbone\.blocks\.(\d+)\.attn\.(query|key|value)\.", r"dpt.encoder.layer.\1.attention.attention.\2."),
    (r"backbone\.blocks\.(\d+)\.attn\.proj\.", r"dpt.encoder.layer.\1.attention.output.dense."),
    (r"backbone\.blocks\.(\d+)\.mlp\.fc1\.", r"dpt.encoder.layer.\1.intermediate.dense."),
    (r"backbone\.blocks\.(\d+)\.mlp\.fc2\.", r"dpt.encoder.layer.\1.output.dense."),
    (r"backbone\.blocks\.(\d+)\.norm1\.", r"dpt.encoder.layer.\1.layernorm_before."),
    (r"backbone\.blocks\.(\d+)\.norm2\.", r"dpt.encoder.layer.\1.layernorm_after."),
    (r"reassemble\.(\d)\.readout\.", r"neck.reassemble_stage.readout_projects.\1.0."),
    (r"reassemble\.(\d)\.project\.", r"neck.reassemble_stage.layers.\1.projection."),
    (r"reassemble\.(\d)\.resample\.", r"neck.reassemble_stage.layers.\1.resize."),
    (r"reassemble\.(\d)\.out\.", r"neck.convs.\1."),
]
_PROJECTIONS = {"patch": "dpt.embeddings.patch_embeddings.projection.", "resnet": "dpt.embeddings.projection."}
_FUSION = re.compile(r"fusion\.(\d)\.(?:project|rcu([12])\.(conv|bn)([12]))\.(\w+)")
_UNIT_LAYERS = {"conv": "convolution", "bn": "batch_norm"}
_HEAD = re.compile(r"(head|auxiliary)\.(conv1|conv2|conv3|conv|bn|classifier)\.(\w+)")
_HEAD_INDEX = {"conv1": 0, "conv2": 2, "conv3": 4, "conv": 0, "bn": 1, "classifier": 4}


def save_huggingface(model: DPT, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Write the model to a new or empty folder, for transformers' `from_pretrained`, in the precision of its parameters.

    The three files appear complete and together, or not at all. `overwrite` permits a folder with files in it: it replaces those
    of the same names, and leaves the others. Raises ValueError for a model that their classes cannot compute, FileExistsError
    for a folder with files in it, OSError where nothing can be written.
    """
    folder = Path(folder)
    _check_folder(folder, overwrite)
    described, preprocessing = describe(model.config), describe_preprocessing(model.config)
    tensors = to_huggingface({key: value.cpu() for key, value in model.state_dict().items()}, model.config)
    described["dtype"] = str(tensors["dpt.embeddings.cls_token"].dtype).removeprefix("torch.")
    with _complete_folder(folder) as part:
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
        for name, content in (("config.json", described), ("preprocessor_config.json", preprocessing)):
            (part / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(part / "config.json", part / "model.safetensors")  # which its library makes readable to its owner alone


def to_huggingface(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Return the tensors of model.safetensors for a `state_dict` of `config`, on its device, all in the widest of its types.

    Those that are the same in both share their memory. The configuration is one that `describe` accepts.
    """
    dtype = functools.reduce(torch.promote_types, (value.dtype for value in state.values()))
    tensors = dict(state)
    if config.get("weight_standardization") == "deviation":
        tensors |= {k: _restandardised(v) for k, v in state.items() if k.startswith(_RESNET) and v.ndim == 4}
    if config["task"] == "depth":
        tensors |= _padded_head(state, head_widths(config))
    tensors = _split_qkv(tensors)
    theirs = {_rename(key, config): value for key, value in tensors.items()} | _identities(state, config)
    floating = {key: value.to(dtype).contiguous() for key, value in theirs.items()}  # the file format knows no strides
    counts = [key.removesuffix("running_var") for key in floating if key.endswith(".running_var")]
    device = floating["dpt.embeddings.cls_token"].device
    return floating | {f"{key}num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device) for key in counts}


def _restandardised(weight: Tensor) -> Tensor:
    """Return w' (out, in, h, w), float64, with (w' - m') / sqrt(v' + 1e-8) = (w - m) / (s + 1e-5), exactly, per output channel.

    m is the mean, s the standard deviation, v the variance. w' = c (w - m) has variance (c s)^2, and the left side is
    (w - m) / sqrt(s^2 + 1e-8 / c^2): so 1e-8 / c^2 = (s + 1e-5)^2 - s^2 = 2e-5 s + 1e-10, a sum in which nothing cancels.
    """
    weight = weight.double()
    deviation, mean = torch.std_mean(weight, dim=(1, 2, 3), keepdim=True, correction=0)
    return (weight - mean) * (1e-4 / (2e-5 * deviation + 1e-10).sqrt())


def _padded_head(state: Mapping[str, Tensor], widths: list[int]) -> dict[str, Tensor]:
    """Fill the depth head up to `widths` with channels of zeros, which the ReLU leaves zero and the next layer adds."""
    second, first = state["head.conv2.weight"].shape[:2]
    outer, inner = widths[0] - first, widths[1] - second
    return {
        "head.conv1.weight": pad(state["head.conv1.weight"], (0, 0, 0, 0, 0, 0, 0, outer)),
        "head.conv1.bias": pad(state["head.conv1.bias"], (0, outer)),
        "head.conv2.weight": pad(state["head.conv2.weight"], (0, 0, 0, 0, 0, outer, 0, inner)),
        "head.conv2.bias": pad(state["head.conv2.bias"], (0, inner)),
        "head.conv3.weight": pad(state["head.conv3.weight"], (0, 0, 0, 0, 0, inner)),
    }


def _split_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for key, value in tensors.items():
        prefix, found, leaf = key.rpartition(".qkv.")
        names = [f"{prefix}.{name}.{leaf}" for name in ("query", "key", "value")] if found else [key]
        split |= zip(names, value.chunk(len(names)), strict=True)
    return split


def _rename(key: str, config: Config) -> str:
    """Return their key for ours. Raises KeyError for a key that no DPT has."""
    if match := _FUSION.fullmatch(key):
        block, unit, kind, index, leaf = match.groups()
        layer = f"residual_layer{unit}.{_UNIT_LAYERS[kind]}{index}" if unit else "projection"
        return f"neck.fusion_stage.layers.{3 - int(block)}.{layer}.{leaf}"
    if match := _HEAD.fullmatch(key):
        head, layer, leaf = match.groups()
        return f"{'head' if head == 'head' else 'auxiliary_head'}.head.{_HEAD_INDEX[layer]}.{leaf}"
    if key.startswith("backbone.patch_embed.proj."):
        return key.replace("backbone.patch_embed.proj.", _PROJECTIONS[config["embedding"]])
    for pattern, theirs in _RENAMES:
        renamed, count = re.subn(rf"^{pattern}", theirs, key)
        if count:
            return renamed
    raise KeyError(key)


def _identities(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """What theirs holds and no output depends on: the final norm, and the deepest block's unit for a skip it has not."""
    width, like = config["embed_dim"], state["backbone.cls_token"]
    unused = {"dpt.layernorm.weight": like.new_ones(width), "dpt.layernorm.bias": like.new_zeros(width)}
    for key, value in state.items():
        if not key.startswith("fusion.3.rcu2."):
            continue
        ones = key.endswith(("running_var", "bn1.weight", "bn2.weight"))
        unused[_rename(key.replace("rcu2", "rcu1"), config)] = torch.ones_like(value) if ones else torch.zeros_like(value)
    return unused


def _check_folder(folder: Path, overwrite: bool) -> None:
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder} cannot be written: there is no folder {folder.parent}")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is no folder: expected a new or an empty one")
    if not folder.exists():
        return
    if any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} has files in it: expected a new or an empty folder, or overwrite=True")
    for name in FILES:
        if (folder / name).is_dir():
            raise FileExistsError(f"{folder / name} is a folder, where a file is to be written")


@contextlib.contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder whose files get into `folder`, all or none; on an error or an interruption nothing is left.

    What goes wrong is an OSError of one sentence.
    """
    exists = folder.is_dir()
    try:
        with tempfile.TemporaryDirectory(dir=folder if exists else folder.parent, prefix=".huggingface.") as temporary:
            part = Path(temporary, "new")
            part.mkdir()
            yield part
            if exists:
                _exchange(part, folder, Path(temporary, "old"))
            else:
                part.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OSError(f"{folder} cannot be written: {reason}") from error


def _exchange(new: Path, folder: Path, old: Path) -> None:
    """Move FILES from `new` to `folder`, and those they replace to `old`; on an error or an interruption, all of them back."""
    old.mkdir()
    try:
        for name in FILES:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
        for name in FILES:
            os.replace(new / name, folder / name)
    except BaseException:
        for name in FILES:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif not (new / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise
