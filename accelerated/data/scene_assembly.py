"""A scene description turned into objects of the renderer, Mitsuba 3 in its variant scalar_rgb."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from accelerated.data.scene_description import CLASSES, Camera, Material, Part, SceneDescription

INDOOR_SKY = 0.15  # share of light samples: under a roof few rays reach the sky


class Stage(NamedTuple):
    """The renderer's scene; the class of each face of each of its shapes, in its order (a sphere has one face); the camera."""

    scene: Any
    classes: list[np.ndarray]
    camera: Camera


def renderer() -> Any:
    """The mitsuba module, in its scalar variant; ImportError naming the extra where it is missing."""
    try:
        import mitsuba
    except ImportError as error:
        raise ImportError('rendering scenes needs Mitsuba 3: install it with pip install ".[train]"') from error
    if mitsuba.variant() != "scalar_rgb":
        mitsuba.set_variant("scalar_rgb")
    return mitsuba


def rgb(colour: tuple[float, float, float]) -> dict[str, Any]:
    """A linear RGB colour as the renderer reads it."""
    return {"type": "rgb", "value": list(colour)}


def bsdf(mi: Any, material: Material, reflectance: dict[str, Any]) -> Any:
    """The two-sided surface of `material`, coloured by `reflectance`, a colour or texture; ValueError for another kind."""
    if material.kind == "diffuse":
        surface: dict[str, Any] = {"type": "diffuse", "reflectance": reflectance}
    elif material.kind == "plastic":
        surface = {"type": "roughplastic", "diffuse_reflectance": reflectance, "alpha": material.roughness}
    elif material.kind == "metal":
        surface = {"type": "roughconductor", "specular_reflectance": reflectance, "material": "none", "alpha": material.roughness}
    else:
        raise ValueError(f"material kind {material.kind!r}: expected diffuse, plastic or metal")
    return mi.load_dict({"type": "twosided", "surface": surface})


def textured(mi: Any, material: Material, extent: tuple[float, float]) -> dict[str, Any]:
    """The material's colour, or its texture repeated so that one period is `material.metres` of a part of `extent` metres."""
    if material.pixels is None:
        return rgb(material.colour)
    repeat = mi.ScalarTransform4f().scale([extent[0] / material.metres, extent[1] / material.metres, 1.0])
    return {"type": "bitmap", "bitmap": mi.Bitmap(material.pixels), "raw": True, "to_uv": repeat}


def joined(mi: Any, parts: list[Part], surface: Any) -> Any:
    """Meshes as one shape, each face with its part's colour: the renderer's time per sample grows with the number of shapes."""
    vertices, faces, uv, colours, count = [], [], [], [], 0
    for part in parts:
        assert part.vertices is not None and part.faces is not None and part.uv is not None
        vertices.append(part.vertices @ part.to_world[:3, :3].T + part.to_world[:3, 3])
        faces.append(part.faces + count)
        uv.append(part.uv)
        colours.append(np.tile(part.material.colour, (len(part.faces), 1)))
        count += len(part.vertices)
    properties = mi.Properties()
    properties["surface"] = surface
    if parts[0].emission is not None:
        properties["glow"] = mi.load_dict({"type": "area", "radiance": rgb(parts[0].emission)})
    shape = mi.Mesh(parts[0].label, count, sum(map(len, faces)), has_vertex_texcoords=True, props=properties)
    shape.add_attribute("face_color", 3, np.concatenate(colours).astype(np.float32).ravel())
    data = mi.traverse(shape)
    data["vertex_positions"] = np.concatenate(vertices).astype(np.float32).ravel()
    data["vertex_texcoords"] = np.concatenate(uv).astype(np.float32).ravel()
    data["faces"] = np.concatenate(faces).astype(np.uint32).ravel()
    data.update()
    return shape


def grouped(parts: list[Part]) -> list[list[Part]]:
    """Meshes that may become one shape: those of one material, and all those that are diffuse and of one colour."""
    groups: dict[Hashable, list[Part]] = {}
    for i, part in enumerate(parts):
        material = part.material
        if part.kind == "sphere" or part.emission is not None:
            key: Hashable = ("alone", i)
        elif material.kind == "diffuse" and material.pixels is None:
            key = "plain"
        else:
            key = id(material)
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def shape(mi: Any, parts: list[Part], surfaces: dict[Hashable, Any]) -> Any:
    """One shape of the renderer from `parts`, a group of `grouped`; `surfaces` keeps the surfaces made so far, to be shared."""
    first = parts[0]
    material, extent = first.material, first.extent
    # The slow ones of the surfaces, those with a table to compute, have neither texture nor extent: spheres share them.
    key = (id(material), *(extent if material.pixels is not None else ()), len({id(part.material) for part in parts}) > 1)
    if key not in surfaces:
        reflectance = {"type": "mesh_attribute", "name": "face_color"} if key[-1] else textured(mi, material, extent)
        surfaces[key] = bsdf(mi, material, reflectance)
    if first.kind == "mesh":
        return joined(mi, parts, surfaces[key])
    return mi.load_dict({"type": first.kind, "to_world": mi.ScalarTransform4f(first.to_world), "bsdf": surfaces[key]})


def lights(mi: Any, description: SceneDescription) -> dict[str, Any]:
    """The sky, the sun and the bulbs of a scene, by name."""
    content: dict[str, Any] = {}
    if description.sky is not None:
        indoors = any(part.label == "ceiling" for part in description.parts)
        up = mi.ScalarTransform4f().rotate([1, 0, 0], 90)
        sky = {"type": "envmap", "bitmap": mi.Bitmap(description.sky), "to_world": up}
        content["sky"] = {**sky, "sampling_weight": INDOOR_SKY if indoors else 1.0}
    if description.sun is not None:
        direction, irradiance = list(description.sun.direction), rgb(description.sun.irradiance)
        content["sun"] = {"type": "directional", "direction": direction, "irradiance": irradiance, "sampling_weight": 0.5}
    for i, bulb in enumerate(description.bulbs):
        content[f"bulb{i}"] = {"type": "point", "position": list(bulb.position), "intensity": rgb(bulb.intensity)}
    return content


def assemble(mi: Any, description: SceneDescription) -> Stage:
    """Build the renderer's scene from a description, and remember the class of every face of every shape."""
    groups = grouped(description.parts)
    surfaces: dict[Hashable, Any] = {}
    shapes = {f"shape{i:04d}": shape(mi, parts, surfaces) for i, parts in enumerate(groups)}
    classes = []
    for parts in groups:
        faces = [1 if part.faces is None else len(part.faces) for part in parts]
        classes.append(np.repeat([CLASSES.index(part.label) for part in parts], faces))
    # Without optimisation, which would merge and reorder shapes, and with them their classes.
    scene = mi.load_dict({"type": "scene", **shapes, **lights(mi, description)}, optimize=False)
    return Stage(scene, classes, description.camera)


def sensor(mi: Any, camera: Camera, size: int, sampler: dict[str, Any]) -> Any:
    """A square box-filtered film of `size` pixels behind the camera."""
    pose = np.eye(4)
    pose[:3, :3] = camera.axes().T
    pose[:3, 3] = camera.position
    pixels = {"width": size, "height": size, "pixel_format": "rgb", "component_format": "float32", "rfilter": {"type": "box"}}
    lens = {"fov": math.degrees(camera.fov), "near_clip": 0.01, "far_clip": 1000.0, "to_world": mi.ScalarTransform4f(pose)}
    return mi.load_dict({"type": "perspective", **lens, "film": {"type": "hdrfilm", **pixels}, "sampler": sampler})
