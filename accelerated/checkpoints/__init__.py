"""Published weights: the authors' files, Hugging Face's folders, and our own files, each opened by `load_checkpoint`."""

from __future__ import annotations

import os
from pathlib import Path

from accelerated import weights
from accelerated.checkpoints import authors, huggingface, published
from accelerated.checkpoints.published import published_file
from accelerated.checkpoints.state_dicts import is_safetensors
from accelerated.dpt import DPT

__all__ = ["load_checkpoint", "published_file"]


def load_checkpoint(path: str | os.PathLike[str], model: str | None = None) -> DPT:
    """Return the model that `path` holds, in evaluation mode, float32 (float64 where every tensor of the file is).

    `path` is one of
    - the authors' files of DPT and MiDaS v2.1 (state dicts, bare or beside an optimizer);
    - a folder of Hugging Face's `DPTForDepthEstimation` or `DPTForSemanticSegmentation`;
    - a `.safetensors` file of ours.
    Which, is read off the file. The three published Hybrids for depth have the same keys and shapes, and only two of them give
    metres: their SHA-256 tells, else their file name, else `model`, else they are refused. `model` is a name of `create_model`,
    or of a published file without hash and extension ("dpt_hybrid_kitti"); one that contradicts the file is refused.

    Every tensor is used, or known to be dead; every parameter is filled. Nothing but tensors is ever unpickled. The model carries
    its configuration, and with it its preprocessing. Raises FileNotFoundError, or ValueError for a file that is damaged, that
    is none of these, or that contradicts `model`.
    """
    path = Path(path)
    if model is not None:
        published.check_name(model)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder at {path}")
    if path.is_file() and not (is_safetensors(path) and weights.has_configuration(path)):
        return authors.load(path, model)
    found = huggingface.load(path) if path.is_dir() else weights.load(path)
    if model is not None and not published.agrees(found.config, model):
        metres = ", in metres" if "metric_scale" in found.config else ""
        raise ValueError(
            f"{path} holds a {found.config['name']} ({found.config['task']}{metres}), not the {model} it was opened as"
        )
    return found
