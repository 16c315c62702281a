"""State dicts as PyTorch saves them, read without ever running what a file may hold besides tensors."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from accelerated.weights import read_safetensors

_WRAPPERS = ("model", "state_dict", "model_state_dict")  # under which training runs save the model, beside its optimizer
_PARALLEL = "module."  # what torch's DataParallel puts before every key


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save, bare or wrapped as {"model": ..., "optimizer": ...}, or of a safetensors file.

    Nothing but tensors and containers is ever unpickled. Raises FileNotFoundError, or ValueError for anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no weight file at {path}")
    tensors = read_safetensors(path)[0] if is_safetensors(path) else _unpickle(path)
    if all(key.startswith(_PARALLEL) for key in tensors):
        tensors = {key.removeprefix(_PARALLEL): value for key, value in tensors.items()}
    return tensors


def is_safetensors(path: Path) -> bool:
    """Whether a file says by its suffix or by its beginning, a length and a JSON object, that it holds safetensors."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _unpickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how the file was written, which is no one's concern where it is refused
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # which one, for a foreign file, depends on what its bytes happen to be taken for
            # What torch says of it ends in the advice to load the file without care.
            more = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            what = (
                f"holds {more[1]}, more than tensors, which is never loaded"
                if more
                else ("is no PyTorch state dict, is truncated, or holds more than tensors, which is never loaded")
            )
            raise ValueError(f"{path} {what}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not named or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: expected a dictionary from names to tensors")
    return dict(content)
