"""Rooms: four walls, floor, ceiling, windows to the sky, furniture and clutter, a camera somewhere inside."""

from __future__ import annotations

import math

import numpy as np

from accelerated.data import scene_objects as objects
from accelerated.data.scene_description import Bulb, Camera, Material, Part, SceneDescription, block, column, panel, placed
from accelerated.data.scene_materials import (
    bricks,
    checker,
    colour,
    daylight,
    mottled,
    palette,
    planks,
    spots,
    stripes,
    textured,
    tiles,
)

CLEARANCE = 0.3  # no object comes closer to the camera than this


Size = tuple[float, float, float]  # width along x, length along y, height


def wall_with_window(
    material: Material, corner: np.ndarray, along: np.ndarray, height: float, hole: tuple[float, float, float, float]
) -> list[Part]:
    """The wall corner + a along, 0..height, without the rectangle hole = (left, right, bottom, top) in metres: four panels."""
    length, up = float(np.linalg.norm(along)), np.array([0.0, 0.0, 1.0])
    unit, (left, right, bottom, top) = along / length, hole
    pieces = ((0, left, 0, height), (right, length, 0, height), (left, right, 0, bottom), (left, right, top, height))
    return [panel("wall", material, corner + a * unit + c * up, (b - a) * unit, (d - c) * up) for a, b, c, d in pieces]


def walls(rng: np.random.Generator, size: Size, materials: list[Material]) -> list[Part]:
    """Each wall is whole, or has a window; whole ones may carry a door and pictures."""
    width, length, height = size
    main = textured(rng, (bricks, stripes, mottled, spots), (0.8, 2.0), (0.5, 0.9)) if rng.random() < 0.5 else None
    main = main or Material("diffuse", colour(rng, (0.0, 0.4), (0.5, 0.9)))
    accent = Material("diffuse", colour(rng, (0.1, 0.6), (0.35, 0.9)))
    art = [textured(rng, (mottled, spots, checker, stripes), (0.6, 1.5)) for _ in range(2)]
    up = np.array([0.0, 0.0, height])
    corners = [np.array(c) for c in ((0.0, 0.0, 0.0), (width, 0.0, 0.0), (width, length, 0.0), (0.0, length, 0.0))]
    parts: list[Part] = []
    for side in range(4):
        corner, along = corners[side], corners[(side + 1) % 4] - corners[side]
        span, unit = float(np.linalg.norm(along)), along / np.linalg.norm(along)
        material = accent if rng.random() < 0.3 else main
        if rng.random() < 0.3:
            breadth = rng.uniform(0.8, min(2.2, span - 1.0))
            left, bottom = rng.uniform(0.4, span - breadth - 0.4), rng.uniform(0.6, 1.0)
            hole = (left, left + breadth, bottom, min(height - 0.2, bottom + 1.3))
            parts += wall_with_window(material, corner, along, height, hole)
            continue
        inward = np.array([-unit[1], unit[0], 0.0])
        parts.append(panel("wall", material, corner, along, up))
        slots = np.arange(0.3, span - 1.3, 1.4)
        rng.shuffle(slots)
        for i, slot in enumerate(slots[: rng.integers(0, 4)]):
            if i == 0 and rng.random() < 0.4:
                at = corner + slot * unit + 0.02 * inward
                parts.append(panel("door", materials[rng.integers(len(materials))], at, 0.9 * unit, np.array([0, 0, 2.0])))
                continue
            breadth, tall = rng.uniform(0.4, 1.1), rng.uniform(0.4, 0.9)
            right, lift = slot + rng.uniform(0, 1.2 - breadth), rng.uniform(1.1, height - tall - 0.2)
            at = corner + right * unit + 0.02 * inward + np.array([0, 0, lift])
            parts.append(panel("picture", art[rng.integers(2)], at, breadth * unit, np.array([0, 0, tall])))
    return parts


def lights(rng: np.random.Generator, size: Size, layout: objects.Layout) -> tuple[list[Part], tuple[Bulb, ...]]:
    """One lamp, for every further one adds noise: a ceiling panel, a bare bulb hanging down, or a light carried with the camera;
    beside the first two a faint one at the camera, so that shadows are not black."""
    width, length, height = size
    area, tint = width * length, np.array([1.0, rng.uniform(0.8, 1.0), rng.uniform(0.6, 1.0)])
    x, y, z = layout.camera.position
    aside = layout.camera.axes()[0] * rng.uniform(-0.25, 0.25)
    kind = rng.choice(["panel", "bulb", "carried"], p=[0.45, 0.3, 0.25])
    carried = Bulb((x + aside[0], y + aside[1], z + 0.15), objects.rgb(tint * (0.12 if kind == "carried" else 0.02) * area))
    if kind == "panel":
        a, b = rng.uniform(0.4, 1.2, 2)
        corner = np.array([rng.uniform(0.3, width - a - 0.3), rng.uniform(0.3, length - b - 0.3), height - 0.02])
        lamp = panel("lamp", Material("diffuse", (0.8, 0.8, 0.8)), corner, np.array([0.0, b, 0.0]), np.array([a, 0.0, 0.0]))
        return [lamp._replace(emission=objects.rgb(tint * 0.6 * area / (a * b)))], (carried,)
    if kind == "bulb":
        x, y = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * length
        layout.circles.append((x, y, 0.3))
        return [], (Bulb((x, y, height - rng.uniform(0.5, 0.9)), objects.rgb(tint * 0.25 * area)), carried)
    return [], (carried,)


def furnish(rng: np.random.Generator, size: Size, layout: objects.Layout, materials: list[Material]) -> list[Part]:
    """Furniture and clutter, most of it where the camera looks and some of it close."""
    width, length, height = size
    kinds = (objects.crate, objects.sphere, objects.pillar, objects.cone, objects.table, objects.chair, objects.shelf)
    odds = np.array([0.18, 0.1, 0.08, 0.07, 0.21, 0.21, 0.15])
    wanted, near = int(rng.integers(3, 13)), int(rng.integers(0, 3))
    parts: list[Part] = []
    for i in range(wanted):
        thing = kinds[rng.choice(len(kinds), p=odds)](rng, materials, rng.uniform(0.7, 1.5))
        for _ in range(12):
            reach = (thing.radius + CLEARANCE, thing.radius + 1.5) if i < near else (thing.radius + 0.8, 9.0)
            x, y = layout.in_view(rng, *reach)
            inside = thing.radius < x < width - thing.radius and thing.radius < y < length - thing.radius
            if inside and thing.height < height and layout.free(x, y, thing.radius):
                layout.circles.append((x, y, thing.radius))
                parts += placed(thing, x, y, 0.0, rng.uniform(0, 2 * math.pi))
                break
    return parts


def partition(rng: np.random.Generator, size: Size, layout: objects.Layout) -> list[Part]:
    """A wall that juts into the room from one side, or two columns that carry the ceiling."""
    width, length, height = size
    material = Material("diffuse", colour(rng, (0.0, 0.5), (0.4, 0.9)))
    if rng.random() < 0.5:
        reach, at = rng.uniform(0.25, 0.6) * width, rng.uniform(0.2, 0.8) * length
        left = rng.random() < 0.5
        x, y, _ = layout.camera.position
        ends = (0.0, reach) if left else (width - reach, width)
        if abs(y - at) < 0.6 and ends[0] - 0.5 < x < ends[1] + 0.5:
            return []
        layout.circles.extend((cx, at, 0.15) for cx in np.arange(ends[0], ends[1], 0.2))
        return [block("wall", material, (reach, 0.15, height), (sum(ends) / 2, at, height / 2))]
    parts: list[Part] = []
    for _ in range(2):
        x, y, radius = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * length, rng.uniform(0.12, 0.25)
        if layout.free(x, y, radius + 0.1):
            layout.circles.append((x, y, radius))
            parts += column("pillar", material, radius, height, (x, y, 0.0))
    return parts


def draw_room(rng: np.random.Generator) -> SceneDescription:
    """One furnished room; its nearest surfaces are decimetres away, its farthest some 12 m."""
    size = width, length, height = rng.uniform(2.8, 7.5), rng.uniform(3.0, 10.5), rng.uniform(2.3, 3.6)
    edge = 0.45
    position = (rng.uniform(edge, width - edge), rng.uniform(edge, length - edge), rng.uniform(0.35, min(2.4, height - 0.3)))
    # Looking roughly towards the room's middle, so that a picture is seldom one wall from close by.
    towards = math.atan2(position[0] - width / 2, length / 2 - position[1])
    camera = Camera(
        position,
        towards + rng.normal(0, 0.7),
        float(np.clip(rng.normal(-0.12, 0.24), -0.75, 0.5)),
        rng.normal(0, 0.05),
        math.radians(rng.uniform(50, 85)),
    )
    layout = objects.Layout(camera, [(position[0], position[1], CLEARANCE)])
    materials = palette(rng)
    floor = textured(rng, (checker, planks, tiles, mottled, stripes), (0.6, 1.6))
    ceiling = Material("diffuse", colour(rng, (0.0, 0.15), (0.6, 0.95)))
    across, along = np.array([width, 0.0, 0.0]), np.array([0.0, length, 0.0])
    parts = [panel("floor", floor, np.zeros(3), across, along)]
    parts.append(panel("ceiling", ceiling, np.array([0, 0, height]), along, across))
    around = walls(rng, size, materials)
    windows = sum(part.label == "wall" for part in around) > 4  # a wall with a window consists of four panels
    parts += around
    if rng.random() < 0.35:
        parts += partition(rng, size, layout)
    lamps, bulbs = lights(rng, size, layout)
    parts += lamps + furnish(rng, size, layout, materials)
    sky, sun = daylight(rng)
    # Light that no window lets in would only add noise: the renderer aims rays at every light.
    sun = sun if windows and rng.random() < 0.5 else None
    return SceneDescription(camera, parts, 1.5 * sky if windows else None, sun, bulbs, rng.uniform(0.14, 0.28))
