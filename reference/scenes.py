"""The rendered scenes that `reference.train` learns from: read from the cache that the accelerated form's renderer writes.

The cache is a folder of plain .npy files, and a manifest with a checksum for each scene: one without its checksum is not used.
A batch is a square crop of some scenes, mirrored half the time (paper, sections 4 and 5).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .configs import Config

SEED, SIZE = 1, 64  # of the scenes that the accelerated form trains on
CLASSES = 18  # what the scenes' labels count


class UsageError(ValueError):
    """Options or scenes that cannot be used; the message is one sentence."""


class Scenes(NamedTuple):
    """N scenes: image (N, H, W, 3) uint8, depth (N, H, W) float32 in metres, 0 where unknown, label (N, H, W) uint8."""

    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray


def load_scenes(cache: Path, count: int) -> Scenes:
    """The first `count` scenes of the cache. Raises UsageError where they are missing, or are not what the manifest says."""
    folder = cache / f"seed-{SEED}-size-{SIZE}"
    render = f"`python -c \"from accelerated.data.scenes import load_scenes; load_scenes({SEED}, {count}, {SIZE}, '{cache}')\"`"
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        identity, checksums = (manifest["seed"], manifest["size"]), list(manifest["scenes"])
        files = Scenes(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in Scenes._fields))
    except FileNotFoundError as error:
        raise UsageError(f"there is no {error.filename}: {render} renders the scenes") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UsageError(f"the scenes in {folder} cannot be read ({error!r}): {render} renders them anew") from None
    square = (SIZE, SIZE)
    layout = {"image": ((*square, 3), "uint8"), "depth": (square, "float32"), "label": (square, "uint8")}
    if identity != (SEED, SIZE) or any(
        (array.shape[1:], str(array.dtype)) != layout[name] for name, array in zip(Scenes._fields, files, strict=True)
    ):
        raise UsageError(f"{folder} does not hold scenes of seed {SEED} and size {SIZE}: {render} renders them")
    whole = min(len(checksums), *map(len, files))
    if whole < count or None in checksums[:count]:
        raise UsageError(f"{folder} does not hold {count} scenes: {render} renders what is missing")
    scenes = Scenes(*(np.array(array[:count]) for array in files))
    for i, checksum in enumerate(checksums[:count]):
        if hashlib.sha256(b"".join(array[i].tobytes() for array in scenes)).hexdigest() != checksum:
            raise UsageError(f"scene {i} in {folder} does not have its checksum: {render} renders it anew")
    if scenes.label.max() >= CLASSES:
        raise UsageError(f"{folder} holds the label {scenes.label.max()}: expected classes from 0 to {CLASSES - 1}")
    return scenes


def batches(count: int, batch: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield the indices (batch,) of every step's scenes: each pass over the `count` scenes in an order of its own."""
    queue = np.empty(0, np.intp)
    for _ in range(steps):
        while len(queue) < batch:
            queue = np.concatenate([queue, rng.permutation(count)])
        yield queue[:batch]
        queue = queue[batch:]


def random_crops(scenes: Scenes, indices: np.ndarray, crop: int, rng: np.random.Generator) -> Scenes:
    """A square of crop x crop pixels from each of the scenes `indices` (B,), anywhere in it, mirrored half the time."""
    pieces = []
    for i in indices:
        top, left = rng.integers(SIZE - crop + 1, size=2)
        columns = np.arange(left, left + crop)[:: 1 if rng.random() < 0.5 else -1]
        pieces.append([array[i, top : top + crop][:, columns] for array in scenes])
    return Scenes(*map(np.stack, zip(*pieces, strict=True)))


def normalized(image: np.ndarray, config: Config) -> np.ndarray:
    """From (B, H, W, 3) uint8 to what the network reads: (B, 3, H, W) float32, less the mean, over the standard deviation."""
    mean, std = np.float32(config["image_mean"]), np.float32(config["image_std"])
    return np.ascontiguousarray(((image / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
