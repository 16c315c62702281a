"""Snapshots of a training run, from which it goes on after whatever ended it: a kill, a signal, a full disk, a lost machine.

A snapshot is one file, `step-00001200-3f9a....pt`, whose name ends in the first half of the SHA-256 of its content. It is written
beside its place and moved there when it is on the disk, so at every moment the newest snapshot under such a name is whole; one
that a disk spoilt later is found by its hash, passed over and named. Only tensors and plain data are in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{32})\.pt")
_PARTIAL = ".partial-snapshot"


class Snapshot(NamedTuple):
    """After how many steps it was taken, and what it holds."""

    step: int
    state: dict[str, Any]


class Snapshots:
    """The snapshots of one run, in a folder of their own; at most `keep` stay, the newest."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: expected at least 1")
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write what `newest` then returns, drop the oldest, and return the file.

        Raises OSError, naming the file, where it cannot be written; the older snapshots stay.
        """
        import torch  # here, so that a command line that makes no sense need not wait for it

        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / _PARTIAL
        try:
            with partial.open("wb") as file:
                # torch hides why a write failed behind an error of its own, whatever the reason: here it is an OSError.
                try:
                    torch.save(dict(state), file)
                except RuntimeError as error:
                    raise OSError(f"{partial} could not be written: {error.__cause__ or error}") from error
                file.flush()
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:08d}-{_digest(partial)}.pt"
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(self.folder)
        for _, old in list(self._files())[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, complain: Callable[[str], object]) -> Snapshot | None:
        """The newest snapshot that is whole, its tensors on the CPU; None where there is none.

        `complain` gets one sentence for each newer one that is not.
        """
        import torch

        files = list(self._files())
        for k, (step, path) in enumerate(files, start=1):
            try:
                if _digest(path) == path.stem.rpartition("-")[2]:
                    return Snapshot(step, torch.load(path, map_location="cpu", weights_only=True))
                reason = "its content is not what its name says"
            except Exception as error:  # whatever a file that is not what we wrote raises
                reason = str(error.strerror) if isinstance(error, OSError) else "it is not what this program writes"
            then = "an older snapshot is looked for" if k < len(files) else "there is no older snapshot, so the run begins anew"
            complain(f"{path} is damaged ({reason}): {then}")
        return None

    def steps(self) -> list[int]:
        """After how many steps the snapshots were taken, the newest first, whether they are whole or not."""
        return [step for step, _ in self._files()]

    def clear(self) -> None:
        """Drop all of them; whatever else is in the folder stays."""
        for _, path in list(self._files()):
            with contextlib.suppress(IsADirectoryError):
                path.unlink(missing_ok=True)
        (self.folder / _PARTIAL).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> Iterator[tuple[int, Path]]:
        """Steps and files, the newest first; of one step the last written."""
        if not self.folder.is_dir():
            return
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        yield from sorted(found, key=lambda item: (item[0], item[1].stat().st_mtime_ns), reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _sync(folder: Path) -> None:
    """Wait until the folder's own entries are on the disk, where the system offers that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
