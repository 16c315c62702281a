"""Colours, procedural textures and skies of the rendered scenes, all drawn from a NumPy generator.

A texture is (64, 64, 3) float32 linear reflectance in 0..1 and tiles; a sky is (32, 64, 3) float32 radiance, latitude by
longitude, zenith first.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np

from accelerated.data.scene_description import Colour, Material, Sun

SIDE = 64


Range = tuple[float, float]


def colour(rng: np.random.Generator, saturation: Range = (0.1, 0.8), value: Range = (0.25, 0.85)) -> Colour:
    """A random colour, linear RGB, between the given bounds of saturation and value."""
    red, green, blue = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return red**1.6, green**1.6, blue**1.6


def noise(rng: np.random.Generator, shape: tuple[int, int] = (SIDE, SIDE), slope: float = 1.0) -> np.ndarray:
    """(h, w) in 0..1, periodic: white noise whose spectrum is made to fall with frequency to the power `slope`."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None] * shape[0], np.fft.rfftfreq(shape[1])[None] * shape[1]
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) / np.maximum(np.hypot(fy, fx), 1.0) ** slope
    spectrum[0, 0] = 0.0
    field = np.fft.irfft2(spectrum, shape)
    return np.clip(0.5 + field / (4 * field.std() + 1e-12), 0.0, 1.0)


def mixed(weight: np.ndarray, low: Colour, high: Colour) -> np.ndarray:
    """(h, w, 3) float32: from `low` where the weight (h, w) is 0 to `high` where it is 1."""
    return (np.asarray(low) + weight[..., None] * (np.asarray(high) - np.asarray(low))).astype(np.float32)


def checker(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """A checkerboard of two by two fields."""
    half = np.arange(SIDE) < SIDE // 2
    return mixed((half[:, None] ^ half[None]) * 1.0, a, b)


def stripes(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """Stripes of two colours, of a random width."""
    wave = (np.arange(SIDE) * int(rng.integers(1, 4)) // (SIDE // 4)) % 2 * 1.0
    return mixed(np.tile(wave, (SIDE, 1)), a, b)


def bricks(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """Four courses of bricks, each of its own shade, with mortar between."""
    row, column = np.mgrid[:SIDE, :SIDE]
    course = row // 16
    shifted = (column + 16 * (course % 2)) % SIDE
    mortar = (row % 16 < 2) | (shifted % 32 < 2)
    shade = rng.uniform(0.75, 1.1, (4, 2))[course, shifted // 32]
    clay = mixed(np.full((SIDE, SIDE), 0.15), a, b) * shade[..., None]
    return np.where(mortar[..., None], np.float32(0.55), clay).astype(np.float32)


def planks(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """Four brown planks with a wavy grain; the given colours do not matter."""
    row = np.arange(SIDE)
    grain = np.abs(np.sin(2 * np.pi * (3 * noise(rng, slope=1.4) + 0.5 * noise(rng, (SIDE, 1), 0.5))))
    shade = rng.uniform(0.7, 1.1, 4)[row // 16][:, None, None]
    joint = (row % 16 == 0)[:, None, None]
    brown = (0.38, 0.2, 0.09)
    dark = (0.55 * 0.38, 0.55 * 0.2, 0.55 * 0.09)
    return np.where(joint, np.float32(0.06), mixed(grain, brown, dark) * shade).astype(np.float32)


def tiles(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """Four tiles of the first colour, each of its own shade, with grout between."""
    row, column = np.mgrid[:SIDE, :SIDE]
    grout = (row % 32 < 2) | (column % 32 < 2)
    shade = rng.uniform(0.85, 1.1, (2, 2))[row // 32, column // 32]
    return np.where(grout[..., None], np.float32(0.2), np.asarray(a) * shade[..., None]).astype(np.float32)


def spots(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """Blots of the second colour on the first."""
    return mixed((noise(rng, slope=1.2) > 0.55) * 1.0, a, b)


def mottled(rng: np.random.Generator, a: Colour, b: Colour) -> np.ndarray:
    """A soft random mixture of two colours."""
    return mixed(noise(rng, slope=rng.uniform(0.3, 1.2)), a, b)


Pattern = Callable[[np.random.Generator, Colour, Colour], np.ndarray]
PATTERNS: tuple[Pattern, ...] = (checker, stripes, bricks, planks, tiles, spots, mottled)


def textured(
    rng: np.random.Generator, patterns: Sequence[Pattern] = PATTERNS, metres: Range = (0.4, 1.2), value: Range = (0.25, 0.85)
) -> Material:
    """A diffuse surface with one of the patterns in two colours, often two shades of one."""
    pattern = patterns[int(rng.integers(len(patterns)))]
    first = colour(rng, value=value)
    factor = rng.uniform(0.35, 0.7)
    shade = (factor * first[0], factor * first[1], factor * first[2])
    second = shade if rng.random() < 0.6 else colour(rng, value=value)
    return Material("diffuse", first, pixels=pattern(rng, first, second), metres=rng.uniform(*metres))


def palette(rng: np.random.Generator, count: int = 7) -> list[Material]:
    """The materials that one scene's objects share: plain, textured, one rough plastic (slow to set up), one metal."""
    materials = [Material("diffuse", colour(rng)) if rng.random() < 0.55 else textured(rng) for _ in range(count)]
    if rng.random() < 0.4:
        materials.append(Material("plastic", colour(rng, (0.4, 0.9)), rng.uniform(0.08, 0.3)))
    if rng.random() < 0.4:
        materials.append(Material("metal", colour(rng, (0.0, 0.35), (0.7, 0.95)), rng.uniform(0.15, 0.4)))
    return materials


def daylight(rng: np.random.Generator) -> tuple[np.ndarray, Sun | None]:
    """A sky with clouds, and the sun: high, low and warm, or hidden behind an overcast sky (None)."""
    kind = rng.choice(["clear", "low", "overcast"], p=[0.55, 0.2, 0.25])
    zenith, horizon = np.array([0.18, 0.35, 0.75]), np.array([0.65, 0.78, 0.9])
    if kind == "low":
        zenith, horizon = np.array([0.25, 0.3, 0.55]), np.array([0.95, 0.65, 0.4])
    if kind == "overcast":
        zenith, horizon = np.array([0.6, 0.63, 0.68]), np.array([0.8, 0.8, 0.8])
    latitude = np.linspace(1.0, -1.0, 32)[:, None, None]
    sky = horizon + np.clip(latitude, 0, 1) ** 0.6 * (zenith - horizon)
    sky = np.where(latitude < 0, 0.45 * horizon, sky) * np.ones((32, 64, 1))
    clouds = np.clip(noise(rng, (32, 64), 1.3) * 2.2 - rng.uniform(0.9, 1.6), 0.0, 1.0)[..., None] * (latitude > 0)
    sky = (sky + clouds * (0.95 - sky)) * rng.uniform(0.8, 1.2)
    if kind == "overcast":
        return sky.astype(np.float32), None
    elevation = rng.uniform(0.15, 0.4) if kind == "low" else rng.uniform(0.5, 1.2)
    azimuth = rng.uniform(0, 2 * np.pi)
    warmth = np.array([1.0, 0.75, 0.5]) if kind == "low" else np.array([1.0, 0.95, 0.85])
    strength = warmth * rng.uniform(2.0, 4.5)
    travel = (-math.cos(elevation) * math.cos(azimuth), -math.cos(elevation) * math.sin(azimuth), -math.sin(elevation))
    return sky.astype(np.float32), Sun(travel, (float(strength[0]), float(strength[1]), float(strength[2])))
