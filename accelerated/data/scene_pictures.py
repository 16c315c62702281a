"""Contact sheets of rendered scenes, for a person to judge: image (N, S, S, 3), depth (N, S, S) and class (N, S, S)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from accelerated.data.scene_description import CLASSES, SceneArrays
from accelerated.images import class_colors, depth_to_color, write_png

GAP = 4  # pixels between scenes


def colour_depth(depth: np.ndarray) -> np.ndarray:
    """(S, S) metres -> (S, S, 3) uint8: inverse depth, near is bright; black where there is none."""
    valid = depth > 0
    if not valid.any():
        return np.zeros((*depth.shape, 3), np.uint8)
    inverse = 1 / np.where(valid, depth, 1)
    low, high = np.percentile(inverse[valid], (1, 99))
    inverse = np.where(valid, np.clip(inverse, low, high), low)
    return np.where(valid[..., None], depth_to_color(inverse.astype(np.float32)), 0).astype(np.uint8)


def contact_sheet(scenes: SceneArrays, path: Path | str, columns: int = 4) -> None:
    """Write a PNG of cells image | inverse depth | class, `columns` cells to a row, on white.

    ValueError for no scenes or no columns; OSError where the file cannot be written.
    """
    count, size = scenes.image.shape[:2]
    if count < 1 or columns < 1:
        raise ValueError(f"{count} scenes in {columns} columns: expected at least 1 of each")
    colors = class_colors(len(CLASSES))
    rows = -(-count // columns)
    pixels = np.full((rows * (size + GAP) - GAP, columns * (3 * size + GAP) - GAP, 3), 255, np.uint8)
    for i in range(count):
        top, left = (i // columns) * (size + GAP), (i % columns) * (3 * size + GAP)
        cell = np.concatenate([scenes.image[i], colour_depth(scenes.depth[i]), colors[scenes.label[i]]], axis=1)
        pixels[top : top + size, left : left + 3 * size] = cell
    write_png(path, pixels)
