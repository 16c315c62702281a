"""Embedded data: procedurally generated, physically shaded scenes with exact depth and class.

They stand where the paper has the datasets of its Section 4.1.

`load_scenes(TRAIN_SEED, 2400)` gives image (N, S, S, 3) uint8 sRGB, depth (N, S, S) float32 metres along the optical axis (0
where there is none: sky) and label (N, S, S) uint8, index into CLASSES. Even indices are open stages, odd ones rooms. A scene
is a function of (seed, index, size) alone, so a cache of N scenes begins every larger one of its seed and size.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from accelerated.data import scene_cache
from accelerated.data.scene_assembly import renderer
from accelerated.data.scene_description import CLASSES, SKY, Scene, SceneArrays, SceneDescription
from accelerated.data.scene_pictures import contact_sheet
from accelerated.data.scene_rendering import geometry, render, staged
from accelerated.data.scene_rooms import draw_room
from accelerated.data.scene_stages import draw_stage

__all__ = [
    "CLASSES",
    "GENERATOR_VERSION",
    "HELD_OUT_SEED",
    "SKY",
    "TRAIN_SEED",
    "Scene",
    "SceneArrays",
    "contact_sheet",
    "load_scenes",
    "render_scene",
]

GENERATOR_VERSION = 1  # raise it with every change that changes a rendered byte: caches of other versions are rendered again
TRAIN_SEED, HELD_OUT_SEED = 1, 2  # a scene's random numbers come from (seed, index): other seed, no scene in common
ATTEMPTS = 16
RECORD_EVERY = 32  # scenes between two entries in the cache's record: what a killed render may lose


def describe(seed: int, index: int, attempt: int = 0) -> SceneDescription:
    """What scene `index` of `seed` consists of, before it is rendered; a further attempt replaces one not worth showing."""
    rng = np.random.default_rng([seed, index, attempt])
    return draw_room(rng) if index % 2 else draw_stage(rng)


def worth_showing(depth: np.ndarray, label: np.ndarray) -> bool:
    """Whether a first look, depth and label (S, S), shows more than a wall from close by or the sky."""
    valid = depth[depth > 0]
    if valid.size < 0.35 * depth.size or valid.min() < 0.25 or np.mean(valid < 0.7) > 0.35:
        return False
    near, far = np.percentile(valid, (5, 95))
    shares = np.bincount(label.ravel(), minlength=len(CLASSES)) / label.size
    return bool(far > 2 * near and np.max(shares) < 0.8 and np.sum(shares > 0.01) >= 3)


def render_scene(seed: int, index: int, size: int = 128) -> Scene:
    """Scene `index` of `seed`: image (size, size, 3) uint8, depth (size, size) float32, label (size, size) uint8.

    The same arguments give the same bytes. ValueError for a negative seed or index or a size below 8; ImportError where Mitsuba
    is missing.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed}, index {index}: expected at least 0")
    if size < 8:
        raise ValueError(f"size {size}: expected at least 8 pixels")
    for attempt in range(ATTEMPTS):
        description = describe(seed, index, attempt)
        with staged(description) as stage:
            # The look is taken at one size, so that the scene does not depend on the size asked for.
            if attempt == ATTEMPTS - 1 or worth_showing(*geometry(stage, 32)):
                return render(stage, size, index, description.exposure)
    raise AssertionError("the last attempt returns")


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
    with scene_cache.opened(Path(cache) / f"seed-{seed}-size-{size}", layout, count) as store:
        missing = store.missing()
        if missing:
            renderer()  # where it is not installed, say so before any process starts
            store.allocate()
            fill(store, missing, min(workers or len(os.sched_getaffinity(0)), len(missing)), progress)
        return SceneArrays(*(array[:count] for array in store.arrays()))


def fill(cache: scene_cache.Cache, missing: list[int], workers: int, progress: bool) -> None:
    """Render the missing scenes into the cache, putting them on record every so often."""
    from tqdm import tqdm

    seed, size = cache.layout.seed, cache.layout.size
    with cache.writer() as writer:
        scenes = rendered(seed, missing, size, workers)
        bar = tqdm(scenes, total=len(missing), desc=f"rendering scenes (seed {seed})", unit="scene", disable=not progress)
        for done, (i, scene) in enumerate(zip(missing, bar, strict=True), 1):
            writer.put(i, scene)
            if done % RECORD_EVERY == 0 or done == len(missing):
                writer.record()
