"""Rendered scenes on disk: plain .npy files, and a manifest that says which of their rows may be trusted.

A folder holds image.npy (N, S, S, 3) uint8, depth.npy (N, S, S) float32, label.npy (N, S, S) uint8 and manifest.json with
the generator's version, seed, size and one SHA-256 per scene. A scene is put on record only when its bytes are on the disk,
and is believed only while they have that checksum. So a render killed at any moment leaves nothing that a later run would
trust, and loses no more than what was not on record yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

MANIFEST = "manifest.json"


class Layout(NamedTuple):
    """The identity of a cache: what a manifest must say for its scenes to be these."""

    version: int
    seed: int
    size: int

    def rows(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Array -> shape and type of one scene's row, in the order in which a scene holds them."""
        square, byte = (self.size, self.size), np.dtype("uint8")
        return {"image": ((*square, 3), byte), "depth": (square, np.dtype("float32")), "label": (square, byte)}


def digest(rows: Iterable[np.ndarray]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(np.ascontiguousarray(row).data)
    return total.hexdigest()


def replace_safely(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that, whenever the power goes, `path` is either what it was or all of the new one."""
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
def explained(folder: Path) -> Iterator[None]:
    """Errors of the operating system as one sentence that names the cache: a full disk's own does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"the scene cache {folder} cannot be written ({error.strerror}): choose a folder that can") from error


class Writer:
    """Puts scenes into the files' rows, then on record. Plain writes, not a writable memory map: a full disk is then an error
    that can be told, not a bus error."""

    def __init__(self, cache: Cache, files: Mapping[str, IO[bytes]]) -> None:
        self.cache, self.files = cache, files
        self.pending: dict[int, str] = {}
        self.starts = {}
        for name, file in files.items():
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self.starts[name] = file.tell()

    def put(self, i: int, scene: Iterable[np.ndarray]) -> None:
        """Write scene `i`, one row per array; ValueError where it does not fit. `record` makes it count."""
        rows = list(scene)
        for (name, (shape, dtype)), row in zip(self.cache.layout.rows().items(), rows, strict=True):
            if row.shape != shape or row.dtype != dtype:
                raise ValueError(f"scene {i}: {name} is {row.dtype} {row.shape}, expected {dtype} {shape}")
            with explained(self.cache.folder):
                self.files[name].seek(self.starts[name] + i * row.nbytes)
                self.files[name].write(np.ascontiguousarray(row).data)
        self.pending[i] = digest(rows)

    def record(self) -> None:
        """Put what was written on record, once it is on the disk."""
        with explained(self.cache.folder):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            for i, checksum in self.pending.items():
                self.cache.digests[i] = checksum
            self.pending.clear()
            text = json.dumps({**self.cache.layout._asdict(), "scenes": self.cache.digests})
            replace_safely(self.cache.folder / MANIFEST, lambda file: file.write(text.encode()))


class Cache:
    """The scenes of one folder; `digests` has a checksum for each that is believed, None for each that is not there.

    Opening it checks every scene among the first `count` against its checksum; scenes beyond them keep what is on record.
    """

    def __init__(self, folder: Path, layout: Layout, count: int) -> None:
        self.folder, self.layout = folder, layout
        self.digests = self.recorded()
        arrays = self.mapped()
        if self.digests and (arrays is None or len(arrays[0]) < len(self.digests)):
            self.distrust("its arrays are missing, cut short or of another shape")
            self.digests = []
        wrong = []
        if arrays is not None:
            wrong = [i for i, known in enumerate(self.digests[:count]) if known and digest(array[i] for array in arrays) != known]
        if wrong:
            self.distrust(f"{len(wrong)} of its scenes, the first is {wrong[0]}, do not have their checksums")
        for i in wrong:
            self.digests[i] = None
        self.digests += [None] * (count - len(self.digests))

    def distrust(self, reason: str) -> None:
        warnings.warn(f"the scene cache {self.folder} is not trusted: {reason}; what is affected is rendered again", stacklevel=6)

    def recorded(self) -> list[str | None]:
        """What the manifest says: nothing where it is missing, damaged or of another generator, seed or size."""
        path = self.folder / MANIFEST
        if not path.exists():
            if any((self.folder / f"{name}.npy").exists() for name in self.layout.rows()):
                self.distrust(f"it has no {MANIFEST}")
            return []
        try:
            manifest = json.loads(path.read_bytes())
            found = Layout(*(manifest[field] for field in Layout._fields))
            digests = [entry if isinstance(entry, str) else None for entry in manifest["scenes"]]
        except (ValueError, KeyError, TypeError, OSError):
            self.distrust(f"its {MANIFEST} cannot be read")
            return []
        if found != self.layout:
            self.distrust(f"it holds {found}, not {self.layout}")
            return []
        return digests

    def mapped(self) -> list[np.ndarray] | None:
        """image, depth and label, read-only and memory-mapped; None where one is missing, cut short or of another shape."""
        arrays = []
        for name, (shape, dtype) in self.layout.rows().items():
            try:
                array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            except (OSError, ValueError, EOFError):
                return None
            if array.shape[1:] != shape or array.dtype != dtype:
                return None
            arrays.append(array)
        return arrays if len({len(array) for array in arrays}) == 1 else None

    def arrays(self) -> list[np.ndarray]:
        arrays = self.mapped()
        if arrays is None:
            raise OSError(f"the scene cache {self.folder} changed while it was read: expected image.npy, depth.npy and label.npy")
        return arrays

    def missing(self) -> list[int]:
        return [i for i, known in enumerate(self.digests) if known is None]

    def allocate(self) -> None:
        """Make room for every scene, carrying over the rows that are there."""
        arrays = self.mapped()
        if arrays is not None and len(arrays[0]) >= len(self.digests):
            return
        for k, (name, (shape, dtype)) in enumerate(self.layout.rows().items()):
            old = np.empty((0, *shape), dtype) if arrays is None else arrays[k]
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (len(self.digests), *shape)}

            def write(file: IO[bytes], old: np.ndarray = old, header: dict = header) -> None:
                np.lib.format.write_array_header_1_0(file, header)
                start, row = file.tell(), int(np.prod(old.shape[1:])) * old.itemsize
                for scene in old:
                    file.write(np.ascontiguousarray(scene).data)
                file.truncate(start + len(self.digests) * row)

            with explained(self.folder):
                replace_safely(self.folder / f"{name}.npy", write)

    @contextmanager
    def writer(self) -> Iterator[Writer]:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / f"{name}.npy", "r+b")) for name in self.layout.rows()}
            yield Writer(self, files)


@contextmanager
def opened(folder: Path, layout: Layout, count: int) -> Iterator[Cache]:
    """The cache in `folder`, made if missing, and held against other processes that would render into it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            warnings.warn(f"another process is rendering into the scene cache {folder}: waiting for it", stacklevel=4)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield Cache(folder, layout, count)
    finally:
        os.close(lock)
