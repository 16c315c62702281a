"""The objects that clutter the rendered scenes: each function draws one `Thing` from a generator and a palette."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from accelerated.data.scene_description import Camera, Material, Thing, ball, block, cloud, column, mesh, placed, spire
from accelerated.data.scene_materials import colour, mottled

Palette = list[Material]
BARK = Material("diffuse", (0.12, 0.07, 0.04))
GLASS = Material("diffuse", (0.05, 0.07, 0.1))


def pick(rng: np.random.Generator, palette: Palette) -> Material:
    """A random material of the palette."""
    return palette[rng.integers(len(palette))]


def rgb(values: np.ndarray) -> tuple[float, float, float]:
    """An array of three numbers as a colour."""
    return float(values[0]), float(values[1]), float(values[2])


def crate(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """A box, now and then with a smaller one on top."""
    x, y, z = rng.uniform(0.25, 0.9, 3) * scale
    parts = [block("box", pick(rng, palette), (x, y, z), (0, 0, z / 2))]
    height = z
    if rng.random() < 0.3:
        small = rng.uniform(0.4, 0.8) * min(x, y)
        top = Thing([block("box", pick(rng, palette), (small, small, small), (0, 0, small / 2))], small, small)
        parts += placed(top, 0, 0, z, rng.uniform(0, math.pi))
        height += small
    return Thing(parts, math.hypot(x, y) / 2, height)


def sphere(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """A ball that lies on the ground."""
    radius = rng.uniform(0.12, 0.45) * scale
    return Thing([ball("ball", pick(rng, palette), radius, (0, 0, radius))], radius, 2 * radius)


def pillar(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """An upright cylinder."""
    radius, height = rng.uniform(0.1, 0.3) * scale, rng.uniform(0.8, 2.4) * scale
    return Thing(column("pillar", pick(rng, palette), radius, height, (0, 0, 0)), radius, height)


def cone(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """An upright cone."""
    radius, height = rng.uniform(0.15, 0.4) * scale, rng.uniform(0.4, 1.1) * scale
    return Thing([spire("cone", pick(rng, palette), radius, height, (0, 0, 0))], radius, height)


def table(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """Four legs and a top, or a round top on a column; small things stand on it."""
    material, height = pick(rng, palette), rng.uniform(0.5, 0.8)
    x, y = rng.uniform(0.8, 1.8), rng.uniform(0.6, 1.0)
    if rng.random() < 0.3:
        x = y
        parts = column("table", material, 0.06, height, (0, 0, 0)) + column("table", material, x / 2, 0.05, (0, 0, height - 0.05))
    else:
        parts = [block("table", material, (x, y, 0.05), (0, 0, height - 0.025))]
        for side in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            centre = (side[0] * (x / 2 - 0.05), side[1] * (y / 2 - 0.05), height / 2 - 0.025)
            parts.append(block("table", material, (0.06, 0.06, height - 0.05), centre))
    for spot in (-0.28, 0.05, 0.3)[: rng.integers(0, 4)]:
        small = (crate, sphere, cone, pillar)[rng.integers(4)](rng, palette, rng.uniform(0.25, 0.4))
        parts += placed(small, spot * x, rng.uniform(-0.2, 0.2) * y, height, rng.uniform(0, math.pi))
    return Thing(parts, math.hypot(x, y) / 2, height)


def chair(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """A dining chair, or an armchair of blocks."""
    material = pick(rng, palette)
    if rng.random() < 0.5:
        seat, back, width = rng.uniform(0.4, 0.5), rng.uniform(0.8, 1.1), rng.uniform(0.38, 0.5)
        parts = [block("chair", material, (width, width, 0.05), (0, 0, seat - 0.025))]
        parts.append(block("chair", material, (width, 0.05, back - seat), (0, width / 2 - 0.025, (back + seat) / 2)))
        edge = width / 2 - 0.03
        for x, y in ((-edge, -edge), (-edge, edge), (edge, -edge), (edge, edge)):
            parts.append(block("chair", material, (0.05, 0.05, seat - 0.05), (x, y, seat / 2 - 0.025)))
        return Thing(parts, 0.72 * width, back)
    width, depth, back = rng.uniform(0.8, 2.0), rng.uniform(0.7, 0.9), rng.uniform(0.7, 0.95)
    parts = [block("chair", material, (width, depth, 0.42), (0, 0, 0.21))]
    parts.append(block("chair", material, (width, 0.2, back), (0, depth / 2 + 0.1, back / 2)))
    for side in (-1, 1):
        parts.append(block("chair", material, (0.16, depth + 0.2, 0.6), (side * (width / 2 + 0.08), 0.1, 0.3)))
    return Thing(parts, math.hypot(width / 2 + 0.16, depth / 2 + 0.2), back)


def shelf(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """A bookcase with a few boxes on its boards; its back is at +y."""
    material, goods = pick(rng, palette), pick(rng, palette)
    width, depth, height, boards = rng.uniform(0.6, 1.6), rng.uniform(0.25, 0.45), rng.uniform(0.9, 2.1), int(rng.integers(3, 6))
    parts = [block("shelf", material, (0.04, depth, height), (side * (width / 2 - 0.02), 0, height / 2)) for side in (-1, 1)]
    parts.append(block("shelf", material, (width - 0.08, 0.02, height), (0, depth / 2 - 0.01, height / 2)))
    gap = (height - 0.04) / (boards - 1)
    for level in range(boards):
        parts.append(block("shelf", material, (width - 0.08, depth - 0.02, 0.04), (0, -0.01, 0.02 + level * gap)))
        if level < boards - 1 and rng.random() < 0.7:
            size = rng.uniform(0.2, 0.6) * width, 0.6 * depth, rng.uniform(0.3, 0.8) * (gap - 0.04)
            shift = rng.uniform(-0.5, 0.5) * (width - 0.12 - size[0])
            parts.append(block("box", goods, size, (shift, 0, 0.04 + level * gap + size[2] / 2)))
    return Thing(parts, math.hypot(width, depth) / 2, height)


def foliage(rng: np.random.Generator) -> Material:
    """Green leaves, light and dark."""
    green = (rng.uniform(0.04, 0.25), rng.uniform(0.14, 0.32), rng.uniform(0.02, 0.08))
    dark = (0.4 * green[0], 0.4 * green[1], 0.4 * green[2])
    return Material("diffuse", green, pixels=mottled(rng, dark, green), metres=rng.uniform(0.8, 2.0))


def tree(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """A trunk with a crown of bumpy balls, or a conifer of stacked cones; its leaves are the palette's last material."""
    height, trunk, leaves = rng.uniform(2.5, 7.0) * scale, rng.uniform(0.08, 0.2) * scale, palette[-1]
    if rng.random() < 0.4:
        parts = [spire("tree", BARK, trunk, 0.25 * height, (0, 0, 0), trunk)]
        for level, width in ((0.15, 0.24), (0.4, 0.18), (0.62, 0.11)):
            parts.append(spire("tree", leaves, width * height, 0.42 * height, (0, 0, level * height)))
        return Thing(parts, 0.24 * height, height)
    parts = [spire("tree", BARK, trunk, 0.65 * height, (0, 0, 0), 0.6 * trunk)]
    crown = rng.uniform(0.18, 0.28) * height
    for _ in range(rng.integers(1, 5)):
        x, y, z = rng.uniform(-0.5, 0.5, 3) * crown
        size, centre = crown * rng.uniform(0.6, 1.0), (x, y, 0.72 * height + z)
        parts.append(cloud("tree", leaves, size, centre, rng.uniform(0.8, 1.1, (9, 14))))
    return Thing(parts, 1.4 * crown, height)


def house(rng: np.random.Generator, palette: Palette, scale: float = 1.0) -> Thing:
    """Walls with windows and a door, and a gable or flat roof."""
    x, y, z = rng.uniform(4, 9), rng.uniform(4, 7), rng.uniform(2.6, 6.5)
    material, roof = pick(rng, palette), Material("diffuse", colour(rng, (0.2, 0.7), (0.2, 0.5)))
    parts = [block("house", material, (x, y, z), (0, 0, z / 2))]
    for level in np.arange(1.5, z - 0.6, 2.4):
        for along in np.arange(-x / 2 + 0.9, x / 2 - 0.6, 1.7):
            parts.append(block("house", GLASS, (0.8, y + 0.06, 1.0), (along, 0, level)))
        parts.append(block("house", GLASS, (x + 0.06, 0.8, 1.0), (0, 0, level)))
    parts.append(block("door", pick(rng, palette), (0.9, y + 0.1, 2.0), (x / 2 - 0.7, 0, 1.0)))
    if rng.random() < 0.7:
        ridge, a, b = z + rng.uniform(0.25, 0.5) * y, x / 2 + 0.3, y / 2 + 0.3
        vertices = np.array([[-a, -b, z], [a, -b, z], [a, b, z], [-a, b, z], [-a, 0, ridge], [a, 0, ridge]])
        faces = np.array([[0, 1, 5], [0, 5, 4], [2, 3, 4], [2, 4, 5], [1, 2, 5], [3, 0, 4], [0, 2, 1], [0, 3, 2]])
        parts.append(mesh("house", roof, (vertices, faces, vertices[:, :2])))
    return Thing(parts, math.hypot(x, y) / 2 + 0.3, z + 3)


class Layout(NamedTuple):
    """Where things stand: circles (x, y, radius) that nothing else may enter, the camera's own among them."""

    camera: Camera
    circles: list[tuple[float, float, float]]

    def free(self, x: float, y: float, radius: float) -> bool:
        """Whether a circle at (x, y) touches nothing that is there already."""
        return all(math.hypot(x - cx, y - cy) > radius + r for cx, cy, r in self.circles)

    def in_view(self, rng: np.random.Generator, near: float, far: float) -> tuple[float, float]:
        """A point on the ground within the camera's horizontal field, its distance log-uniform."""
        bearing = self.camera.yaw + rng.uniform(-0.5, 0.5) * self.camera.fov
        distance = math.exp(rng.uniform(math.log(near), math.log(far)))
        x, y, _ = self.camera.position
        return x - distance * math.sin(bearing), y + distance * math.cos(bearing)
