"""The two passes over a scene: image (S, S, 3) uint8 sRGB; depth (S, S) float32 metres and class (S, S) uint8.

The picture is path-traced with several samples per pixel, denoised and tone-mapped. Depth and class come from a second pass
with one ray through each pixel's centre and a box filter: the renderer filters every channel that it outputs, and an
average of two depths or of two class ids is neither. That pass asks for the point that the ray hits; depth is that point's
coordinate along the optical axis (not its distance, which is what the renderer calls depth).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from accelerated.data.scene_assembly import Stage, assemble, renderer, sensor
from accelerated.data.scene_denoising import denoised
from accelerated.data.scene_description import SKY, Scene, SceneDescription

SAMPLES = 6  # per pixel of the picture
GUIDE_SAMPLES = 4
BOUNCES = 3  # edges of a light path: light from a lamp, and from a surface that a lamp lights


@contextmanager
def staged(description: SceneDescription) -> Iterator[Stage]:
    """The scene, ready for both passes. Work is shared out by scene, among processes: a pass keeps to one thread."""
    mi = renderer()
    import drjit

    before = drjit.thread_count()
    drjit.set_thread_count(1)
    try:
        yield assemble(mi, description)
    finally:
        drjit.set_thread_count(before)


def geometry(stage: Stage, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth (S, S) float32 and class (S, S) uint8 at the pixels' centres; sky has depth 0."""
    mi, camera = renderer(), stage.camera
    centre = {"type": "stratified", "sample_count": 1, "jitter": False}
    integrator = mi.load_dict({"type": "aov", "aovs": "point:position,shape:shape_index,face:prim_index"})
    channels = np.array(mi.render(stage.scene, sensor=sensor(mi, camera, size, centre), integrator=integrator, spp=1, seed=0))
    shape, face = np.rint(channels[..., 3:5]).astype(np.int64).transpose(2, 0, 1)
    counts = np.array([1, *map(len, stage.classes)])  # shape 0 is no shape; the scene's first is 1
    starts = np.cumsum(counts) - counts
    # What the renderer reports as the face is defined for meshes only.
    label = np.concatenate([[SKY], *stage.classes]).astype(np.uint8)[starts[shape] + np.where(counts[shape] > 1, face, 0)]
    depth = (channels[..., :3].astype(np.float64) - camera.position) @ camera.axes()[2]
    return np.where(shape > 0, depth, 0.0).astype(np.float32), label


def radiance(stage: Stage, size: int, seed: int) -> np.ndarray:
    """(S, S, 3) linear light, path-traced and denoised; `seed` chooses the light paths.

    The denoiser's guides are rendered on their own: an integrator nested in the one that collects them costs three times both.
    """
    mi = renderer()
    paths = mi.load_dict({"type": "path", "max_depth": BOUNCES})
    view = sensor(mi, stage.camera, size, {"type": "multijitter", "sample_count": SAMPLES})
    light = np.array(mi.render(stage.scene, sensor=view, integrator=paths, spp=SAMPLES, seed=seed))
    surfaces = mi.load_dict({"type": "aov", "aovs": "albedo:albedo,normal:sh_normal,point:position,distance:depth"})
    view = sensor(mi, stage.camera, size, {"type": "stratified", "sample_count": GUIDE_SAMPLES, "jitter": False})
    guides = np.array(mi.render(stage.scene, sensor=view, integrator=surfaces, spp=GUIDE_SAMPLES, seed=0))
    return denoised(light, guides[..., :3], guides[..., 3:6], guides[..., 6:9], guides[..., 9])


def tone_mapped(radiance: np.ndarray, exposure: float) -> np.ndarray:
    """(S, S, 3) linear radiance -> uint8 sRGB: the geometric mean goes to `exposure`, a shoulder spares the highlights."""
    radiance = np.clip(np.nan_to_num(radiance.astype(np.float64)), 0.0, None)
    luminance = radiance @ np.array([0.2126, 0.7152, 0.0722])
    scale = exposure / max(math.exp(np.log(luminance + 1e-4).mean()), 1e-6)
    scaled = radiance * scale
    white = max(4.0 * exposure, float(np.percentile(luminance, 98)) * scale, 0.5)
    linear = np.clip(scaled * (1 + scaled / white**2) / (1 + scaled), 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def render(stage: Stage, size: int, seed: int, exposure: float) -> Scene:
    """Render one scene: its picture, brought to `exposure`, and its geometry. Deterministic in `seed`."""
    depth, label = geometry(stage, size)
    return Scene(tone_mapped(radiance(stage, size, seed), exposure), depth, label)
