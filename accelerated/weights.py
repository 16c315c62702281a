"""One weight file for both forms: safetensors, its metadata {"format": "pt", "config": the configuration as JSON}.

`save` and `load` read and write the file that `reference.save` and `reference.load` do; `to_numpy` hands the parameters over.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from accelerated.configs import Config
from accelerated.dpt import DPT, from_config

_NAMED = 4  # keys that an error names before it says "and N more"


def to_numpy(model: DPT) -> dict[str, np.ndarray]:
    """Return copies of the model's parameters and batch statistics by key, ready for `reference.apply`."""
    return {key: _portable(value).numpy().copy() for key, value in model.state_dict().items()}


def save(model: DPT, path: str | os.PathLike[str]) -> None:
    """Write the model to one safetensors file. The file appears complete or not at all. Raises OSError where it cannot."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    tensors = {key: _portable(value).contiguous() for key, value in model.state_dict().items()}
    metadata = {"format": "pt", "config": json.dumps(model.config)}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        (Path(folder) / "mode").touch()
        shutil.copymode(Path(folder) / "mode", temporary)  # readable to those that the umask lets, not to its owner alone
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


def read_safetensors(path: str | os.PathLike[str], tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors (none where `tensors` is false) and the metadata of a safetensors file. Raises as `load` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no weight file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            keys = file.keys() if tensors else []
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file, or is truncated: {error}") from error


def has_configuration(path: str | os.PathLike[str]) -> bool:
    """Whether a safetensors file carries a configuration, as `save` writes it. Raises as `load` does."""
    return "config" in read_safetensors(path, tensors=False)[1]


def from_tensors(config: Config, tensors: Mapping[str, Tensor], source: str) -> DPT:
    """Return the DPT of `config` holding exactly `tensors`, in evaluation mode; `source` names their origin in errors.

    Half precision becomes float32. Raises ValueError where a tensor is missing, left over or of another shape.
    """
    try:
        with torch.device("meta"):  # every value comes from the tensors: allocate and initialise nothing
            model = from_config(config)
        name, task = config["name"], config["task"]
    except KeyError as error:
        raise ValueError(f"{source} has a configuration without {error}: it describes no DPT") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has a configuration that describes no DPT: {error}") from error
    _compare(model.state_dict(), tensors, f"{source} does not hold the {name} ({task}) it should")
    double = all(value.dtype == torch.float64 for value in tensors.values())
    dtype = torch.float64 if double else torch.float32
    model.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    return model.eval()


def _compare(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor], verdict: str) -> None:
    missing = [key for key in expected if key not in actual]
    extra = [_with_nearest(key, missing or expected) for key in actual if key not in expected]
    common = [key for key in expected if key in actual]
    misshaped = [
        f"{key} is {tuple(actual[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in common
        if actual[key].shape != expected[key].shape
    ]
    integers = [key for key in common if not actual[key].is_floating_point()]
    kinds = {"missing": missing, "unexpected": extra, "of another shape": misshaped, "not floating point": integers}
    faults = [f"{len(keys)} {kind} ({_few(keys)})" for kind, keys in kinds.items() if keys]
    if faults:
        raise ValueError(f"{verdict}: tensors {'; '.join(faults)}")


def _with_nearest(key: str, expected: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, expected, n=1)
    return f"{key}; the nearest expected is {near[0]}" if near else key


def _few(names: Collection[Any]) -> str:
    shown = ", ".join(list(names)[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _portable(tensor: Tensor) -> Tensor:
    """On the CPU and of a type NumPy has, which bfloat16 is not."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
