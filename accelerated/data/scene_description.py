"""What a rendered scene is, as plain data: no renderer is needed to make, inspect or test one.

The paper trains on photographs that cannot be shipped with code (Section 4.1); this project's demonstrations train on
scenes made here instead. A `SceneDescription` is a camera, a list of labelled parts and lights. Units are metres, z is
up, colours are linear reflectances or radiances, angles are radians. `scene_rooms` and `scene_stages` draw descriptions
at random, `scene_rendering` turns one into image (S, S, 3), depth (S, S) and class (S, S).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CLASSES: tuple[str, ...] = (
    "sky",
    "floor",
    "ground",
    "wall",
    "ceiling",
    "box",
    "ball",
    "pillar",
    "table",
    "chair",
    "shelf",
    "tree",
    "cone",
    "picture",
    "door",
    "lamp",
    "hill",
    "house",
)
SKY = CLASSES.index("sky")

Colour = tuple[float, float, float]
Point = tuple[float, float, float]
MeshArrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # vertices (V, 3), faces (F, 3), uv (V, 2) in metres


class Material(NamedTuple):
    """How a surface reflects. `kind` is diffuse, plastic (rough, one colour) or metal; `pixels` (h, w, 3) is a texture that
    tiles and covers `metres` of surface per tile, None for the plain `colour`."""

    kind: str
    colour: Colour
    roughness: float = 0.3
    pixels: np.ndarray | None = None
    metres: float = 1.0


class Part(NamedTuple):
    """One shape of one class. `kind` is mesh with vertices (V, 3), faces (F, 3) and texture coordinates uv (V, 2) in metres, or
    sphere (of radius 1) whose texture coordinates 0..1 span `extent` metres; `to_world` (4, 4) places it; `emission` (radiance)
    makes it a light."""

    kind: str
    label: str
    to_world: np.ndarray
    material: Material
    extent: tuple[float, float] = (1.0, 1.0)
    emission: Colour | None = None
    vertices: np.ndarray | None = None
    faces: np.ndarray | None = None
    uv: np.ndarray | None = None


class Camera(NamedTuple):
    """A pinhole at `position`; yaw turns about z (0 looks along +y, positive to the left), pitch is positive upwards, roll
    about the optical axis; `fov` is the full angle across the (square) image."""

    position: Point
    yaw: float
    pitch: float
    roll: float
    fov: float

    def axes(self) -> np.ndarray:
        """(3, 3): the image's left, its up, and the optical axis, as rows, in world coordinates."""
        level = math.cos(self.pitch)
        forward = np.array([-math.sin(self.yaw) * level, math.cos(self.yaw) * level, math.sin(self.pitch)])
        left = np.array([-math.cos(self.yaw), -math.sin(self.yaw), 0.0])
        up = np.cross(forward, left)
        c, s = math.cos(self.roll), math.sin(self.roll)
        return np.stack([c * left + s * up, c * up - s * left, forward])


class Sun(NamedTuple):
    """A light from infinitely far away."""

    direction: Point  # the way its light travels
    irradiance: Colour


class Bulb(NamedTuple):
    """A light at a point."""

    position: Point
    intensity: Colour


class SceneDescription(NamedTuple):
    """`sky` (h, w, 3) is the radiance from every direction, latitude by longitude, zenith first, None for darkness;
    `exposure` the grey level (0..1,
    linear) that the geometric mean of the picture is brought to."""

    camera: Camera
    parts: list[Part]
    sky: np.ndarray | None
    sun: Sun | None = None
    bulbs: tuple[Bulb, ...] = ()
    exposure: float = 0.2


class Scene(NamedTuple):
    """image (S, S, 3) uint8 sRGB; depth (S, S) float32, metres along the optical axis, 0 where nothing is hit; label (S, S)
    uint8, index into CLASSES."""

    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray


class SceneArrays(NamedTuple):
    """N scenes: image (N, S, S, 3) uint8 sRGB; depth (N, S, S) float32 metres, 0 where invalid; label (N, S, S) uint8."""

    image: np.ndarray
    depth: np.ndarray
    label: np.ndarray


class Thing(NamedTuple):
    """An object standing at the origin on z = 0, to be placed: its parts, the radius of its footprint and its height."""

    parts: list[Part]
    radius: float
    height: float


def translation(x: float, y: float, z: float) -> np.ndarray:
    """(4, 4): a move by (x, y, z) metres."""
    matrix = np.eye(4)
    matrix[:3, 3] = x, y, z
    return matrix


def scaling(x: float, y: float, z: float) -> np.ndarray:
    """(4, 4): a scaling along each axis."""
    return np.diag([x, y, z, 1.0])


def rotation(axis: str, angle: float) -> np.ndarray:
    """(4, 4): right-handed rotation about the axis "x", "y" or "z"."""
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(4)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[i, j], matrix[j, i] = -math.sin(angle), math.sin(angle)
    return matrix


def placed(thing: Thing, x: float, y: float, z: float = 0.0, heading: float = 0.0) -> list[Part]:
    """The parts of `thing`, turned by `heading` about the vertical and moved to (x, y, z)."""
    move = translation(x, y, z) @ rotation("z", heading)
    return [part._replace(to_world=move @ part.to_world) for part in thing.parts]


def panels(corners: np.ndarray, us: np.ndarray, vs: np.ndarray) -> MeshArrays:
    """The n parallelograms corner + a u + b v, 0 <= a, b <= 1; corners, us and vs are (n, 3)."""
    vertices = np.stack([corners, corners + us, corners + us + vs, corners + vs], 1)
    width, height = np.linalg.norm(us, axis=1)[:, None], np.linalg.norm(vs, axis=1)[:, None]
    uv = np.stack([width * [0, 1, 1, 0], height * [0, 0, 1, 1]], -1)
    first = 4 * np.arange(len(corners))[:, None]
    faces = np.concatenate([first + np.array([0, 1, 2]), first + np.array([0, 2, 3])])
    return vertices.reshape(-1, 3), faces, uv.reshape(-1, 2)


def mesh(label: str, material: Material, shape: MeshArrays, to_world: np.ndarray | None = None) -> Part:
    """A part from the arrays (vertices, faces, uv) of a mesh."""
    vertices, faces, uv = shape
    return Part("mesh", label, np.eye(4) if to_world is None else to_world, material, vertices=vertices, faces=faces, uv=uv)


def panel(label: str, material: Material, corner: np.ndarray, u: np.ndarray, v: np.ndarray) -> Part:
    """The flat rectangle corner + a u + b v, 0 <= a, b <= 1; it faces u x v."""
    return mesh(label, material, panels(corner[None], u[None], v[None]))


def block(label: str, material: Material, size: Point, centre: Point) -> Part:
    """An axis-aligned cuboid of `size` metres."""
    x, y, z = np.diag(np.asarray(size, float))
    low = np.asarray(centre) - (x + y + z) / 2
    corners = np.stack([low, low + x, low + x + y, low + y, low + z, low])
    return mesh(label, material, panels(corners, np.stack([x, y, -x, -y, x, x]), np.stack([z, z, z, z, y, y])))


def ball(label: str, material: Material, radius: float, centre: Point) -> Part:
    """A sphere; its texture goes once around it."""
    return Part("sphere", label, translation(*centre) @ scaling(radius, radius, radius), material, (6.0 * radius, 3.0 * radius))


def grid_faces(rows: int, columns: int) -> np.ndarray:
    """(F, 3): the triangles of a grid of rows x columns vertices, stored row by row."""
    first = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).reshape(-1)
    below = first + columns
    return np.concatenate([np.stack([first, below + 1, first + 1], -1), np.stack([first, below, below + 1], -1)])


def spire(label: str, material: Material, radius: float, height: float, base: Point, top: float = 0.0) -> Part:
    """An upright cone of 24 sides, its top of radius `top` left open."""
    angle = np.linspace(0.0, 2 * np.pi, 25)
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], -1)
    vertices = np.concatenate([radius * ring, top * ring + [0, 0, height]])
    uv = np.concatenate([np.stack([radius * angle, 0 * angle], -1), np.stack([radius * angle, height + 0 * angle], -1)])
    return mesh(label, material, (vertices, grid_faces(2, 25), uv), translation(*base))


def cloud(label: str, material: Material, radius: float, centre: Point, bumps: np.ndarray) -> Part:
    """A ball whose radius is multiplied by `bumps` (rows, columns), latitude by longitude."""
    rows, columns = bumps.shape
    theta, phi = np.linspace(0, np.pi, rows)[:, None], np.linspace(0, 2 * np.pi, columns)[None]
    reach = np.concatenate([bumps[:, :-1], bumps[:, :1]], 1)
    reach[0], reach[-1] = reach[0, 0], reach[-1, 0]
    directions = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta) + 0 * phi], -1)
    uv = radius * np.stack([4 * phi + 0 * theta, 3 * theta + 0 * phi], -1)
    vertices = radius * reach[..., None] * directions
    return mesh(label, material, (vertices.reshape(-1, 3), grid_faces(rows, columns), uv.reshape(-1, 2)), translation(*centre))


def column(label: str, material: Material, radius: float, height: float, base: Point) -> list[Part]:
    """An upright cylinder, closed at the top."""
    bx, by, bz = base
    lid = spire(label, material, radius, 0.0, (bx, by, bz + height))
    return [spire(label, material, radius, height, base, radius), lid]
