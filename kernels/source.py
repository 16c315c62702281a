"""The CUDA sources, where this package is installed, and what is compiled from them, kept between runs.

`fusion.cu` and its like include `element.cuh` and, on the host, the headers of `host/`. All are package data, found
relative to this package. A compiled file is kept in the user's cache folder under a name that is a hash of everything it
was made from, so a changed source is never answered with an old binary.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(str(resources.files(__package__)))

# The element types, by the name of their NumPy dtype. double exists on the host alone, to prove the formulas exactly.
DEVICE_ELEMENTS = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
HOST_ELEMENTS = {**DEVICE_ELEMENTS, "float64": "double"}


class Source(NamedTuple):
    """A `.cu` file and the kernels in it, each with its template arguments: "attend<{}, 64>", {} standing for the element type.

    Those of `half` work on tensor cores, and exist for float16 and bfloat16 alone.
    """

    file: str
    templates: tuple[str, ...]
    half: tuple[str, ...] = ()

    def has(self, template: str, dtype: str) -> bool:
        """Whether this kernel exists for elements of `dtype`."""
        return template not in self.half or dtype in ("float16", "bfloat16")


def symbol(template: str) -> str:
    """A name for a kernel that C accepts: "attend<{}, 64>" becomes "attend_64"."""
    return re.sub(r"\W+", "_", template.replace("{}", "")).strip("_")


def digest() -> str:
    """A hash of all sources and headers: every one of them may be included by the file that is compiled."""
    files = [path for pattern in ("*.cu", "*.cuh", "host/*.h") for path in sorted(FOLDER.glob(pattern))]
    return fingerprint(part for path in files for part in (path.name, path.read_text(encoding="utf-8")))


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """One hash of several strings; where one ends and the next begins counts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def cached(name: str, build: Callable[[Path], object]) -> Path:
    """The file `name` in the user's cache folder; `build(path)` writes it where it is missing.

    It appears under its name whole or not at all: it is written in a folder of its own and moved, so neither a killed build
    nor one that runs at the same time is ever seen. RuntimeError where the folder cannot be written.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "dense-prediction-transformers" / "kernels"
    path = folder / name
    if path.is_file():
        return path
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        workspace = tempfile.TemporaryDirectory(dir=folder, prefix="build-")
    except OSError as error:
        raise RuntimeError(
            f"compiled kernels are kept in {folder}, which cannot be written ({error.strerror}): "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
    with workspace:
        unfinished = Path(workspace.name) / name
        build(unfinished)
        os.replace(unfinished, path)
    return path
