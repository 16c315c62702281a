"""A scene description, rendered by Mitsuba 3 (variant scalar_rgb, one thread): image (S, S, 3), depth (S, S), class (S, S).

Two passes. The picture is path-traced with several samples per pixel and tone-mapped. Depth and class come from a second
pass with one ray through each pixel's centre and a box filter: the renderer filters every channel that it outputs, and an
average of two depths or of two class ids is neither. That pass asks for the point that the ray hits; depth is that point's
coordinate along the optical axis (not its distance, which the renderer also offers).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from accelerated.data.scene_description import CLASSES, SKY, Camera, Colour, Material, Part, SceneDescription

SAMPLES = 16  # per pixel of the picture
BOUNCES = 4  # vertices of a light path: three surfaces at most


class Scene(NamedTuple):
    """image (S, S, 3) uint8 sRGB; depth (S, S) float32, metres along the optical axis, 0 where nothing is hit; label (S, S)
    uint8, index into CLASSES."""

    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray


def renderer() -> Any:
    """The mitsuba module, in its scalar variant; ImportError naming the extra where it is missing."""
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError('Rendering scenes needs Mitsuba 3: install it with pip install ".[train]"') from error
    if mitsuba.variant() != "scalar_rgb":
        mitsuba.set_variant("scalar_rgb")
    return mitsuba


@contextmanager
def one_thread():
    """Rendering parallelises over scenes, in processes, so a render itself keeps to the thread that asked for it."""
    import drjit

    before = drjit.thread_count()
    drjit.set_thread_count(1)
    try:
        yield
    finally:
        drjit.set_thread_count(before)


def bsdf(mi: Any, material: Material, extent: tuple[float, float]) -> Any:
    colour: dict[str, Any] = {"type": "rgb", "value": list(material.colour)}
    if material.pixels is not None:
        repeat = mi.ScalarTransform4f().scale([extent[0] / material.metres, extent[1] / material.metres, 1.0])
        colour = {"type": "bitmap", "bitmap": mi.Bitmap(material.pixels), "raw": True, "to_uv": repeat}
    if material.kind == "diffuse":
        surface = {"type": "diffuse", "reflectance": colour}
    elif material.kind == "plastic":
        surface = {"type": "roughplastic", "diffuse_reflectance": colour, "alpha": material.roughness}
    elif material.kind == "metal":
        surface = {"type": "roughconductor", "specular_reflectance": colour, "material": "none", "alpha": material.roughness}
    else:
        raise ValueError(f"material kind {material.kind!r}: expected diffuse, plastic or metal")
    return mi.load_dict({"type": "twosided", "surface": surface})


def light(mi: Any, emission: Colour) -> Any:
    return mi.load_dict({"type": "area", "radiance": {"type": "rgb", "value": list(emission)}})


def joined(mi: Any, parts: list[Part], surface: Any) -> Any:
    """Meshes of one class and material as one shape: the renderer's second pass takes time in proportion to their number."""
    vertices, faces, uv, count = [], [], [], 0
    for part in parts:
        assert part.vertices is not None and part.faces is not None and part.uv is not None
        vertices.append(part.vertices @ part.to_world[:3, :3].T + part.to_world[:3, 3])
        faces.append(part.faces + count)
        uv.append(part.uv)
        count += len(part.vertices)
    properties = mi.Properties()
    properties["surface"] = surface
    if parts[0].emission is not None:
        properties["glow"] = light(mi, parts[0].emission)
    shape = mi.Mesh(parts[0].label, count, sum(len(face) for face in faces), has_vertex_texcoords=True, props=properties)
    data = mi.traverse(shape)
    data["vertex_positions"] = np.concatenate(vertices).astype(np.float32).ravel()
    data["vertex_texcoords"] = np.concatenate(uv).astype(np.float32).ravel()
    data["faces"] = np.concatenate(faces).astype(np.uint32).ravel()
    data.update()
    return shape


def primitive(mi: Any, part: Part, surface: Any) -> Any:
    entry = {"type": part.kind, "to_world": mi.ScalarTransform4f(part.to_world), "bsdf": surface}
    return mi.load_dict(entry if part.emission is None else {**entry, "emitter": light(mi, part.emission)})


def sensor(mi: Any, camera: Camera, size: int, sampler: dict[str, Any]) -> Any:
    placed = np.eye(4)
    placed[:3, :3] = camera.axes().T
    placed[:3, 3] = camera.position
    film = {"type": "hdrfilm", "width": size, "height": size, "rfilter": {"type": "box"}, "pixel_format": "rgb", "component_format": "float32"}
    pose = {"to_world": mi.ScalarTransform4f(placed), "fov": math.degrees(camera.fov), "near_clip": 0.01, "far_clip": 1000.0}
    return mi.load_dict({"type": "perspective", **pose, "film": film, "sampler": sampler})


def assemble(mi: Any, description: SceneDescription) -> tuple[Any, np.ndarray]:
    """The renderer's scene, and the class of each of its shapes, in its order."""
    content: dict[str, Any] = {"type": "scene"}
    surfaces: dict[tuple[Any, ...], Any] = {}
    groups: dict[tuple[Any, ...], list[Part]] = {}
    for i, part in enumerate(description.parts):
        alone = i if part.kind != "mesh" or part.emission is not None else None
        groups.setdefault((part.label, id(part.material), alone), []).append(part)
    for i, parts in enumerate(groups.values()):
        first = parts[0]
        key = (id(first.material), *(first.extent if first.material.pixels is not None else ()))
        if key not in surfaces:
            surfaces[key] = bsdf(mi, first.material, first.extent)
        make = joined(mi, parts, surfaces[key]) if first.kind == "mesh" else primitive(mi, first, surfaces[key])
        content[f"shape{i:04d}"] = make
    if description.sky is not None:
        # Under a roof few rays reach the sky: aim few of them there.
        weight = 0.15 if any(part.label == "ceiling" for part in description.parts) else 1.0
        up = mi.ScalarTransform4f().rotate([1, 0, 0], 90)
        content["sky"] = {"type": "envmap", "bitmap": mi.Bitmap(description.sky), "to_world": up, "sampling_weight": weight}
    if description.sun is not None:
        strength = {"type": "rgb", "value": list(description.sun.irradiance)}
        content["sun"] = {"type": "directional", "direction": list(description.sun.direction), "irradiance": strength, "sampling_weight": 0.5}
    for i, bulb in enumerate(description.bulbs):
        content[f"bulb{i}"] = {"type": "point", "position": list(bulb.position), "intensity": {"type": "rgb", "value": list(bulb.intensity)}}
    # Without optimisation: it would merge shapes of one material, and with them their classes.
    classes = np.array([CLASSES.index(parts[0].label) for parts in groups.values()], np.uint8)
    return mi.load_dict(content, optimize=False), classes


def geometry(mi: Any, scene: Any, classes: np.ndarray, camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Depth (S, S) float32 and class (S, S) uint8 at the pixels' centres; sky has depth 0."""
    centre = {"type": "stratified", "sample_count": 1, "jitter": False}
    integrator = mi.load_dict({"type": "aov", "aovs": "point:position,shape:shape_index"})
    channels = np.array(mi.render(scene, sensor=sensor(mi, camera, size, centre), integrator=integrator, spp=1, seed=0))
    index = np.rint(channels[..., 3]).astype(np.int64)  # 0: nothing hit; else 1 + the shape's position in the scene
    label = np.concatenate([np.array([SKY], np.uint8), classes])[index]
    depth = (channels[..., :3].astype(np.float64) - camera.position) @ camera.axes()[2]
    return np.where(index > 0, depth, 0.0).astype(np.float32), label


def tone_mapped(radiance: np.ndarray, exposure: float) -> np.ndarray:
    """(S, S, 3) linear radiance -> uint8 sRGB: the geometric mean goes to `exposure`, a shoulder keeps bright parts from clipping."""
    radiance = np.clip(np.nan_to_num(radiance.astype(np.float64)), 0.0, None)
    luminance = radiance @ np.array([0.2126, 0.7152, 0.0722])
    scale = exposure / max(math.exp(np.log(luminance + 1e-4).mean()), 1e-6)
    scaled = radiance * scale
    white = max(4.0 * exposure, float(np.percentile(luminance, 98)) * scale, 0.5)
    linear = np.clip(scaled * (1 + scaled / white**2) / (1 + scaled), 0.0, 1.0)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def render(description: SceneDescription, size: int, seed: int) -> Scene:
    """Both passes; `seed` chooses the picture's random light paths."""
    mi = renderer()
    with one_thread():
        scene, classes = assemble(mi, description)
        depth, label = geometry(mi, scene, classes, description.camera, size)
        paths = {"type": "multijitter", "sample_count": SAMPLES}
        integrator = mi.load_dict({"type": "path", "max_depth": BOUNCES})
        view = sensor(mi, description.camera, size, paths)
        radiance = np.array(mi.render(scene, sensor=view, integrator=integrator, spp=SAMPLES, seed=seed))
    return Scene(tone_mapped(radiance[..., :3], description.exposure), depth, label)
