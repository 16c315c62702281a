"""Open stages: ground under a sky, with hills, houses, walls, trees and scattered objects."""

from __future__ import annotations

import math

import numpy as np

from accelerated.data import scene_objects as objects
from accelerated.data.scene_description import Camera, Material, Part, SceneDescription, block, grid_faces, mesh, panel, placed
from accelerated.data.scene_materials import bricks, checker, daylight, mottled, noise, palette, planks, spots, textured, tiles

HALF = 45.0  # the ground is a square of this half-width about the camera: no surface is farther than 64 m
CLEARANCE = 0.5


def hills(rng: np.random.Generator) -> Part:
    """A ring of hills around the stage: a polar grid whose heights are periodic noise times a bump across the ring."""
    around, across = 72, 7
    base, width = rng.uniform(26, 34), rng.uniform(8, 11)
    angle = np.linspace(0, 2 * np.pi, around + 1)
    profile = np.clip(noise(rng, (1, around), 1.0)[0] * 2 - rng.uniform(0.2, 0.9), -0.05, 1) * rng.uniform(3, 14)
    rise = np.sin(np.linspace(0, 0.5 * np.pi, across))
    radius = base + width * np.linspace(0, 1, across)
    heights = np.append(profile, profile[0])[:, None] * rise + 0.4 * rng.random((around + 1, across)) * (rise > 0)
    heights[-1] = heights[0]
    x, y = radius * np.cos(angle)[:, None], radius * np.sin(angle)[:, None]
    vertices = np.stack([x, y, heights - 0.15], -1).reshape(-1, 3)
    green = (rng.uniform(0.08, 0.3), rng.uniform(0.15, 0.3), rng.uniform(0.04, 0.12))
    dark = (0.5 * green[0], 0.55 * green[1], 0.5 * green[2])
    cover = Material("diffuse", green, pixels=mottled(rng, dark, green), metres=rng.uniform(4, 9))
    return mesh("hill", cover, (vertices, grid_faces(around + 1, across), vertices[:, :2]))


def ground(rng: np.random.Generator) -> list[Part]:
    """Grass, sand, paving or earth; sometimes a road across it."""
    kind = rng.integers(3)
    if kind == 0:
        green = (rng.uniform(0.1, 0.25), rng.uniform(0.2, 0.35), rng.uniform(0.04, 0.12))
        dark = (0.5 * green[0], 0.55 * green[1], 0.5 * green[2])
        cover = Material("diffuse", green, pixels=mottled(rng, dark, green), metres=rng.uniform(1.5, 4))
    elif kind == 1:
        sand = (rng.uniform(0.35, 0.6), rng.uniform(0.28, 0.45), rng.uniform(0.15, 0.35))
        dark = (0.6 * sand[0], 0.6 * sand[1], 0.6 * sand[2])
        cover = Material("diffuse", sand, pixels=mottled(rng, dark, sand), metres=rng.uniform(1.5, 4))
    else:
        cover = textured(rng, (checker, tiles, bricks, planks, spots), (1.5, 4.0), (0.3, 0.7))
    side = 2 * HALF
    parts = [panel("ground", cover, np.array([-HALF, -HALF, 0.0]), np.array([side, 0, 0]), np.array([0, side, 0]))]
    if rng.random() < 0.35:
        angle, half, offset = rng.uniform(0, math.pi), rng.uniform(1.2, 3.0), rng.uniform(-6, 6)
        along, aside = np.array([math.cos(angle), math.sin(angle), 0.0]), np.array([-math.sin(angle), math.cos(angle), 0.0])
        for shift, breadth, lift, shade in ((offset, half, 0.01, rng.uniform(0.08, 0.3)), (offset, 0.1, 0.02, 0.8)):
            corner = -0.98 * HALF * along + (shift - breadth) * aside + np.array([0, 0, lift])
            parts.append(panel("ground", Material("diffuse", (shade,) * 3), corner, 1.96 * HALF * along, 2 * breadth * aside))
    return parts


def fences(rng: np.random.Generator, layout: objects.Layout) -> list[Part]:
    """Long walls, often close by on the left or on the right."""
    parts: list[Part] = []
    cx, cy, _ = layout.camera.position
    for _ in range(rng.integers(0, 4)):
        tall, long = rng.uniform(0.8, 3.2), rng.uniform(3, 14)
        material = textured(rng, (bricks, tiles, mottled, planks), (0.8, 2.0), (0.35, 0.85))
        distance = math.exp(rng.uniform(math.log(1.0), math.log(18)))
        bearing = layout.camera.yaw + rng.uniform(-0.9, 0.9) * layout.camera.fov
        x, y = cx - distance * math.sin(bearing), cy + distance * math.cos(bearing)
        heading = bearing + rng.choice([0.5 * math.pi, 0.0], p=[0.7, 0.3]) + rng.normal(0, 0.3)
        steps = [(x + s * math.cos(heading), y + s * math.sin(heading)) for s in np.arange(-long / 2, long / 2 + 0.3, 0.3)]
        if all(layout.free(a, b, 0.2) for a, b in steps):
            layout.circles.extend((a, b, 0.2) for a, b in steps)
            fence = objects.Thing([block("wall", material, (long, 0.25, tall), (0, 0, tall / 2))], long / 2, tall)
            parts += placed(fence, x, y, 0.0, heading)
    return parts


def scatter(rng: np.random.Generator, layout: objects.Layout, materials: list[Material]) -> list[Part]:
    """Things at random places in front of the camera, a few of them near, none in another."""
    small = (objects.crate, objects.sphere, objects.pillar, objects.cone)
    kinds = (*small, objects.tree, objects.house, objects.table, objects.chair)
    odds = np.array([0.2, 0.12, 0.12, 0.1, 0.26, 0.1, 0.05, 0.05])
    wanted, near = int(rng.integers(4, 22)), int(rng.integers(0, 4))
    parts: list[Part] = []
    for i in range(wanted):
        kind = kinds[rng.choice(len(kinds), p=odds)]
        thing = kind(rng, materials, rng.uniform(0.8, 2.2) if kind is not objects.tree else rng.uniform(0.7, 1.2))
        for _ in range(8):
            reach = (thing.radius + CLEARANCE, thing.radius + 3.0) if i < near else (thing.radius + 2.0, 26.0)
            x, y = layout.in_view(rng, *reach)
            if layout.free(x, y, thing.radius):
                layout.circles.append((x, y, thing.radius))
                parts += placed(thing, x, y, 0.0, rng.uniform(0, 2 * math.pi))
                break
    return parts


def draw_stage(rng: np.random.Generator) -> SceneDescription:
    """One open-air scene; its nearest surfaces are decimetres away, its farthest some 60 m."""
    height = math.exp(rng.uniform(math.log(0.4), math.log(6.0)))
    pitch = float(np.clip(rng.normal(-0.1 - 0.06 * height, 0.16), -0.8, 0.3))
    yaw, roll, fov = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.05), math.radians(rng.uniform(45, 80))
    camera = Camera((0.0, 0.0, height), yaw, pitch, roll, fov)
    layout = objects.Layout(camera, [(0.0, 0.0, CLEARANCE)])
    materials = [*palette(rng), objects.foliage(rng)]
    parts = ground(rng)
    if rng.random() < 0.7:
        parts.append(hills(rng))
    parts += fences(rng, layout) + scatter(rng, layout, materials)
    sky, sun = daylight(rng)
    return SceneDescription(camera, parts, sky, sun, (), rng.uniform(0.15, 0.28))
