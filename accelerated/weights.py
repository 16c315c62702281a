"""One weight file for both forms: safetensors, its metadata {"format": "pt", "config": the configuration as JSON}.

`save` and `load` read and write the file that `reference.save` and `reference.load` do; `to_numpy` hands the parameters over.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from accelerated.configs import Config
from accelerated.dpt import DPT

_NAMED = 4  # keys that an error names before it says "and N more"


def to_numpy(model: DPT) -> dict[str, np.ndarray]:
    """Return copies of the model's parameters and batch statistics by key, ready for `reference.apply`."""
    return {key: _portable(value).numpy().copy() for key, value in model.state_dict().items()}


def save(model: DPT, path: str | os.PathLike[str]) -> None:
    """Write the model to one safetensors file. The file appears complete or not at all. Raises OSError where it cannot."""
    path = Path(path)
    tensors = {key: _portable(value).contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(model.config)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / "weights"
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)


def load(path: str | os.PathLike[str]) -> DPT:
    """Return the model of a file written by `save` or `reference.save`, in evaluation mode.

    Raises FileNotFoundError, or ValueError for a file that is truncated, of another kind, or whose tensors are not those of its
    configuration.
    """
    tensors, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise ValueError(f"{path} has no configuration in its metadata: expected a file that save() has written")
    try:
        config = json.loads(metadata["config"])
    except ValueError as error:
        raise ValueError(f"{path} has a configuration that is no JSON: {error}") from error
    return from_tensors(config, tensors, str(path))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises as `load` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no weight file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file, or is truncated: {error}") from error


def from_tensors(config: Config, tensors: Mapping[str, Tensor], source: str) -> DPT:
    """Return the DPT of `config` holding exactly `tensors`, in evaluation mode; `source` names their origin in errors.

    Half precision becomes float32. Raises ValueError where a tensor is missing, left over or of another shape.
    """
    try:
        with torch.device("meta"):  # every value comes from the tensors: allocate and initialise nothing
            model = DPT(config)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} has a configuration that describes no DPT: {error!r}") from error
    _compare(model.state_dict(), tensors, f"{source} does not hold the {config['name']} ({config['task']}) it should")
    double = all(value.dtype == torch.float64 for value in tensors.values())
    dtype = torch.float64 if double else torch.float32
    model.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    return model.eval()


def _compare(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], verdict: str) -> None:
    faults = []
    if missing := [key for key in expected if key not in actual]:
        faults.append(f"{len(missing)} tensors are missing ({_few(missing)})")
    if extra := [key for key in actual if key not in expected]:
        faults.append(f"{len(extra)} are unexpected ({_few(extra)})")
    wrong = [
        f"{key} {tuple(actual[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in actual and (actual[key].shape != expected[key].shape)
    ]
    if wrong:
        faults.append(f"{len(wrong)} have another shape ({_few(wrong)})")
    if integers := [key for key in expected if key in actual and not actual[key].is_floating_point()]:
        faults.append(f"{len(integers)} are not floating point ({_few(integers)})")
    if faults:
        raise ValueError(f"{verdict}: {'; '.join(faults)}")


def _few(names: Collection[Any]) -> str:
    shown = ", ".join(list(names)[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _portable(tensor: Tensor) -> Tensor:
    """On the CPU and of a type NumPy has, which bfloat16 is not."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
