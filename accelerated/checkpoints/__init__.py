"""Published weights: the authors' files, Hugging Face's folders, and our own files, each opened by `load_checkpoint`."""

from __future__ import annotations

import os
from pathlib import Path

from accelerated import weights
from accelerated.checkpoints import authors, huggingface
from accelerated.configs import CONFIGS
from accelerated.dpt import DPT

__all__ = ["load_checkpoint"]

_TASKS = {"midas": "depth", "ade20k": "segmentation"}  # what the part of a name after its dash says


def load_checkpoint(path: str | os.PathLike[str], model: str | None = None) -> DPT:
    """Return the DPT that `path` holds, in evaluation mode, float32 (float64 where every tensor of the file is).

    `path` is a `.safetensors` file of ours, a state dict of the authors (`.pt`, for which `model` names what it is: "dpt_base",
    "dpt_hybrid", "dpt_large", with "-midas" or "-ade20k" for the published depth and segmentation models), or a folder of Hugging
    Face's `DPTForDepthEstimation` or `DPTForSemanticSegmentation`. Every tensor is used, or known to be dead; every parameter is
    filled. Raises FileNotFoundError, or ValueError for a file that is damaged, that is no DPT, or that contradicts `model`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    if path.is_file() and path.suffix != ".safetensors":
        return authors.load(path, model)
    found = huggingface.load(path) if path.is_dir() else weights.load(path)
    if model is not None:
        _check_name(found, model, path)
    return found


def _check_name(found: DPT, model: str, path: Path) -> None:
    name, _, suffix = model.partition("-")
    if name not in CONFIGS or (suffix and suffix not in _TASKS):
        raise ValueError(f"unknown model {model!r}: expected one of {', '.join([*CONFIGS, *authors.MODELS])}")
    config = found.config
    if config["name"] != name or (suffix and config["task"] != _TASKS[suffix]):
        raise ValueError(f"{path} holds a {config['name']} ({config['task']}), not the {model} it was opened as")
