"""Rendered scenes on disk: plain .npy files, and a manifest that says which of their rows may be trusted.

A folder holds image.npy (N, S, S, 3) uint8, depth.npy (N, S, S) float32, label.npy (N, S, S) uint8 and manifest.json with
the generator's version, seed, size and one SHA-256 per scene. A scene is on record only after its bytes are on the disk,
and is believed only if they still have that checksum, so a render killed at any moment leaves nothing that a later run
would trust, and loses no more than what it had not put on record yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MANIFEST = "manifest.json"


class Layout(NamedTuple):
    """The identity of a cache: what a manifest must say for its scenes to be these."""

    version: int
    seed: int
    size: int

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> shape of one row and type, in the order in which a scene holds them."""
        square = (self.size, self.size)
        return {"image": ((*square, 3), np.dtype("uint8")), "depth": (square, np.dtype("float32")), "label": (square, np.dtype("uint8"))}


def digest(rows: Iterable[np.ndarray]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(np.ascontiguousarray(row).data)
    return total.hexdigest()


def write_safely(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file so that `path` is either what it was or all of the new one, whenever the power goes."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """The folder, made if missing and held against other processes that would render into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as error:
        raise OSError(f"cannot write the scene cache {folder}: {error.strerror}; choose a folder that can be written") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def recorded(folder: Path, layout: Layout, say: Callable[[str], object]) -> list[str | None]:
    """The checksums on record, one per scene; none where the manifest is missing, damaged or of another cache."""
    path = folder / MANIFEST
    if not path.exists():
        if any((folder / f"{name}.npy").exists() for name in layout.arrays()):
            say(f"{path} is missing, so the scenes beside it are rendered again")
        return []
    try:
        manifest = json.loads(path.read_text())
        found = tuple(manifest[field] for field in Layout._fields)
        digests = [entry if isinstance(entry, str) else None for entry in manifest["scenes"]]
    except (ValueError, KeyError, TypeError, OSError):
        say(f"{path} cannot be read, so the scenes beside it are rendered again")
        return []
    if found != tuple(layout):
        say(f"{path} is of (version, seed, size) {found}, not {tuple(layout)}, so the scenes beside it are rendered again")
        return []
    return digests


def mapped(folder: Path, layout: Layout) -> dict[str, np.ndarray] | None:
    """The three arrays, read-only and memory-mapped; None where one is missing, cut short or of another shape."""
    arrays = {}
    for name, (row, dtype) in layout.arrays().items():
        try:
            array = np.load(folder / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return None
        if array.shape[1:] != row or array.dtype != dtype:
            return None
        arrays[name] = array
    return arrays if len({len(array) for array in arrays.values()}) == 1 else None


def verified(folder: Path, layout: Layout, count: int, say: Callable[[str], object]) -> list[str | None]:
    """One checksum per scene that is on record and on the disk as recorded, None for each that must be rendered."""
    digests = recorded(folder, layout, say)
    if not digests:
        return [None] * count
    arrays = mapped(folder, layout)
    if arrays is None or len(arrays["image"]) < len(digests):
        say(f"the arrays in {folder} are missing, cut short or of another shape, so their scenes are rendered again")
        return [None] * count
    damaged = []
    for i, expected in enumerate(digests[:count]):
        if expected is not None and digest(array[i] for array in arrays.values()) != expected:
            damaged.append(i)
            digests[i] = None
    if damaged:
        say(f"{len(damaged)} scenes in {folder} (the first is {damaged[0]}) differ from their checksums and are rendered again")
    return digests + [None] * (count - len(digests))


def allocate(folder: Path, layout: Layout, digests: list[str | None]) -> None:
    """Files with a row for each of `digests`, the rows already believed carried over."""
    arrays = mapped(folder, layout)
    if arrays is not None and len(arrays["image"]) >= len(digests):
        return
    kept = 0 if arrays is None else min(len(arrays["image"]), len(digests))
    for name, (row, dtype) in layout.arrays().items():
        old = None if arrays is None else arrays[name]

        def write(file: Any, row=row, dtype=dtype, old=old) -> None:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (len(digests), *row)}
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(kept):
                file.write(np.ascontiguousarray(old[i]).data)
            file.truncate(file.tell() + (len(digests) - kept) * int(np.prod(row)) * dtype.itemsize)

        write_safely(folder / f"{name}.npy", write)


class Writer:
    """Puts scenes into the files' rows, and on record once they are on the disk. Plain writes, not a writable memory map: a
    full disk is then an error that can be told, not a bus error."""

    def __init__(self, folder: Path, layout: Layout, digests: list[str | None]) -> None:
        self.folder, self.layout, self.digests = folder, layout, digests
        self.pending: dict[int, str] = {}
        self.files = {name: open(folder / f"{name}.npy", "r+b") for name in layout.arrays()}
        self.starts = {}
        for name, file in self.files.items():
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self.starts[name] = file.tell()

    def put(self, i: int, scene: Iterable[np.ndarray]) -> None:
        rows = list(scene)
        for (name, (shape, dtype)), row in zip(self.layout.arrays().items(), rows, strict=True):
            if row.shape != shape or row.dtype != dtype:
                raise ValueError(f"scene {i}'s {name} is {row.dtype} {row.shape}: expected {dtype} {shape}")
            self.files[name].seek(self.starts[name] + i * row.nbytes)
            self.files[name].write(np.ascontiguousarray(row).data)
        self.pending[i] = digest(rows)

    def record(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        for i, checksum in self.pending.items():
            self.digests[i] = checksum
        self.pending.clear()
        text = json.dumps({**self.layout._asdict(), "scenes": self.digests})
        write_safely(self.folder / MANIFEST, lambda file: file.write(text.encode()))

    def close(self) -> None:
        for file in self.files.values():
            file.close()
