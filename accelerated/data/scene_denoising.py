"""Removes the grain of a path-traced picture of few samples, guided by what the renderer knows of the surfaces.

The light that falls on a surface varies slowly along it, its texture does not. So the picture is divided by the surfaces'
reflectance, smoothed along each surface (an edge-avoiding a-trous wavelet: Dammertz et al., High Performance Graphics 2010),
and multiplied by the reflectance again. All arrays are (S, S, 3) float, filtered like the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SPLINE = np.array([1, 4, 6, 4, 1], np.float32) / 16
FLOOR = 0.02  # reflectance below which a pixel's light is not told from its noise


def neighbours(image: np.ndarray, reach: int) -> Callable[[int, int], np.ndarray]:
    """f(dy, dx): a view of the image (S, S, ...) moved dy rows and dx columns, up to `reach`; borders repeat."""
    height, width = image.shape[:2]
    padded = np.pad(image, [(reach, reach), (reach, reach)] + [(0, 0)] * (image.ndim - 2), mode="edge")
    return lambda dy, dx: padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def without_sparks(light: np.ndarray) -> np.ndarray:
    """Single pixels that outshine all but two of their eight neighbours are brought down to them."""
    brightness = light.sum(-1)
    near = neighbours(brightness, 1)
    limit = np.partition(np.stack([near(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]), 5, axis=0)[5]
    return light * np.minimum(1.0, limit / np.maximum(brightness, 1e-6))[..., None]


def smoothed(
    light: np.ndarray, normal: np.ndarray, point: np.ndarray, distance: np.ndarray, step: int, tolerance: float
) -> np.ndarray:
    """The mean over the 5 x 5 pixels `step` apart that lie in a pixel's plane, face its way and are about as bright."""
    near = neighbours(light.sum(-1), 1)
    brightness = np.log(sum(near(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)) + 1e-3) / tolerance
    plane = (point * normal).sum(-1)
    scale = 1.0 / (0.02 * distance + 1e-3)  # how far from the plane a neighbour may lie grows with distance
    others = [neighbours(each, 2 * step) for each in (light, normal, point, brightness, (distance > 0).astype(np.float32))]
    total, weights = np.zeros_like(light), np.zeros_like(brightness)
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            its_light, its_normal, its_point, its_brightness, hit = (other(dy * step, dx * step) for other in others)
            off_plane = (np.einsum("ijc,ijc->ij", its_point, normal) - plane) * scale
            turned = np.abs(1 - np.einsum("ijc,ijc->ij", its_normal, normal))
            unlike = off_plane**2 + 8 * turned + (its_brightness - brightness) ** 2
            weight = hit * SPLINE[dy + 2] * SPLINE[dx + 2] * np.exp(-unlike)
            total += weight[..., None] * its_light
            weights += weight
    return np.where(weights[..., None] > 1e-6, total / np.maximum(weights, 1e-6)[..., None], light)


def denoised(radiance: np.ndarray, albedo: np.ndarray, normal: np.ndarray, point: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The picture (S, S, 3) with its light smoothed along surfaces; `normal` and `point` (S, S, 3) in world coordinates,
    `distance` (S, S) metres from the camera (0: nothing hit, left alone)."""
    reflectance = albedo + FLOOR
    light = without_sparks(radiance / reflectance)
    for step, tolerance in ((1, 1.2), (2, 0.8), (4, 0.4)):
        light = smoothed(light, normal, point, distance, step, tolerance)
    return np.where(distance[..., None] > 0, light * reflectance, radiance)
