"""Weight files: one safetensors file holds the parameters and, in its metadata, the configuration they belong to.

The PyTorch form writes and reads the same files.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .configs import Config
from .initialize import parameter_shapes
from .parameters import Params


def save(path: str | os.PathLike[str], params: Params, config: Config) -> None:
    """Write `params` and `config` to one safetensors file. The file appears whole or not at all.

    Raises ValueError where the parameters are not those of the configuration.
    """
    check_parameters(params, config)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        arrays = {key: np.ascontiguousarray(value) for key, value in params.items()}
        save_file(arrays, temporary, metadata={"format": "pt", "config": json.dumps(config)})
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> tuple[Params, Config]:
    """Read a file written by `save`, here or by the PyTorch form: `(params, config)`.

    Raises FileNotFoundError, or ValueError for a file that is damaged, is no safetensors file, carries no configuration, or whose
    tensors are not those of its configuration.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no weight file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            params = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from None
    if "config" not in metadata:
        raise ValueError(f"{path} carries no configuration: expected a file written by reference.save or accelerated.save")
    config = json.loads(metadata["config"])
    check_parameters(params, config)
    return params, config


def check_parameters(params: Params, config: Config) -> None:
    """Raise ValueError unless `params` has exactly the tensors of `config`; the error names the keys at fault."""
    expected = parameter_shapes(config)
    missing = [key for key in expected if key not in params]
    extra = [key for key in params if key not in expected]
    misshaped = [
        f"{key} {params[key].shape}, not {shape}"
        for key, shape in expected.items()
        if key in params and params[key].shape != shape
    ]
    problems = []
    for what, keys in (("missing", missing), ("unexpected", extra), ("of another shape", misshaped)):
        if keys:
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            problems.append(f"{len(keys)} {what} ({shown})")
    if problems:
        raise ValueError(f"these are not the parameters of {config.get('name', 'this configuration')!r}: {'; '.join(problems)}")
