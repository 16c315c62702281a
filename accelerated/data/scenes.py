"""Embedded data: procedurally generated, physically shaded scenes with exact depth and class (in place of Section 4.1's datasets).

`load_scenes(TRAIN_SEED, 2400)` gives image (N, S, S, 3) uint8 sRGB, depth (N, S, S) float32 metres along the optical axis (0
where there is none: sky) and label (N, S, S) uint8, index into CLASSES. Even indices are open stages, odd ones rooms. A scene
is a function of (seed, index, size) alone, so a cache of N scenes begins every larger one of its seed and size.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from accelerated.data import scene_cache
from accelerated.data.scene_description import CLASSES, SKY, SceneDescription
from accelerated.data.scene_rendering import Scene, render, renderer
from accelerated.data.scene_rooms import draw_room
from accelerated.data.scene_stages import draw_stage

__all__ = ["CLASSES", "GENERATOR_VERSION", "HELD_OUT_SEED", "SKY", "TRAIN_SEED", "Scene", "SceneArrays", "describe", "load_scenes", "render_scene"]

GENERATOR_VERSION = 1  # raise it with every change that changes a rendered byte: caches of other versions are rendered again
TRAIN_SEED, HELD_OUT_SEED = 1, 2  # a scene's random numbers come from (seed, index): other seed, no scene in common
RECORD_EVERY = 32  # scenes between two entries in the cache's record: what a killed render may lose


class SceneArrays(NamedTuple):
    """image (N, S, S, 3) uint8 sRGB; depth (N, S, S) float32 metres, 0 where invalid; label (N, S, S) uint8."""

    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray


def describe(seed: int, index: int) -> SceneDescription:
    """What scene `index` of `seed` consists of, before it is rendered."""
    rng = np.random.default_rng([seed, index])
    return draw_room(rng) if index % 2 else draw_stage(rng)


def render_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Scene `index` of `seed`: image (size, size, 3) uint8, depth (size, size) float32, label (size, size) uint8.

    The same arguments give the same bytes. ValueError for a negative seed or index or a size below 8; ImportError without Mitsuba.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index}: expected numbers of at least 0")
    if size < 8:
        raise ValueError(f"size {size}: expected at least 8 pixels")
    return render(describe(seed, index), size, seed=index)


def rendered(seed: int, indices: list[int], size: int, workers: int) -> Iterator[Scene]:
    """The scenes in order; with several workers, by processes that start afresh (a fork would inherit the renderer's locks)."""
    job = partial(render_scene, seed, size=size)
    if workers == 1:
        yield from map(job, indices)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(job, indices, chunksize=4)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def load_scenes(
    seed: int, count: int, size: int = 128, cache: Path | str = "cache/scenes", workers: int | None = None, progress: bool = True
) -> SceneArrays:
    """The first `count` scenes of `seed`, memory-mapped from the cache; those missing there are rendered first.

    `workers` processes render (default: one per available core; 1 renders in this process). ValueError for a bad size, seed,
    count or number of workers; OSError naming a cache folder that cannot be written; ImportError without Mitsuba.
    """
    if count < 1 or size < 8 or seed < 0:
        raise ValueError(f"seed {seed}, count {count}, size {size}: expected at least 0, 1 and 8")
    if workers is not None and workers < 1:
        raise ValueError(f"workers {workers}: expected at least 1")
    layout = scene_cache.Layout(GENERATOR_VERSION, seed, size)
    folder = Path(cache) / f"seed-{seed}-size-{size}"
    with scene_cache.opened(folder):
        digests = scene_cache.verified(folder, layout, count, lambda sentence: warnings.warn(sentence, stacklevel=4))
        missing = [i for i in range(count) if digests[i] is None]
        if missing:
            renderer()
            scene_cache.allocate(folder, layout, digests)
            fill(folder, layout, digests, missing, min(workers or len(os.sched_getaffinity(0)), len(missing)), progress)
        arrays = scene_cache.mapped(folder, layout)
        assert arrays is not None
    return SceneArrays(*(array[:count] for array in arrays.values()))


def fill(folder: Path, layout: scene_cache.Layout, digests: list[str | None], missing: list[int], workers: int, progress: bool) -> None:
    """Render the missing scenes into the cache's files, putting them on record every so often."""
    from tqdm import tqdm

    writer = scene_cache.Writer(folder, layout, digests)
    try:
        scenes = rendered(layout.seed, missing, layout.size, workers)
        bar = tqdm(scenes, total=len(missing), desc=f"rendering scenes (seed {layout.seed})", unit="scene", disable=not progress)
        for done, (i, scene) in enumerate(zip(missing, bar, strict=True), 1):
            writer.put(i, scene)
            if done % RECORD_EVERY == 0 or done == len(missing):
                writer.record()
    finally:
        writer.close()
