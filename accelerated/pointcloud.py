"""From a depth map to a cloud of points: back-projection through a pinhole camera, and PLY files.

A pixel at column u and row v of a picture of H rows and W columns sees along the ray through its centre. With square pixels,
the principal point in the middle of the picture and the focal length f = (W / 2) / tan(fov / 2) in pixels, a depth z (measured
along the viewing direction, not along the ray) puts it at

    x = (u + 1/2 - W/2) z / f,    y = -(v + 1/2 - H/2) z / f,    and -z:

OpenGL's axes, x to the right, y up, the camera in the origin and looking along -z, in the unit of the depth (metres for a
model of absolute depth).
"""

from __future__ import annotations

import math
import os

import numpy as np

from accelerated import images

_VERTEX = np.dtype([("position", "<f4", 3), ("color", "u1", 3)])  # 15 bytes, as the header says
_CHUNK = 1 << 20  # points converted at a time, so that a large cloud is not held twice


def relative_depth(inverse: np.ndarray, farthest: float = 10.0) -> np.ndarray:
    """Turn inverse depth (H, W), known only up to a scale and a shift, into a depth (H, W) float32 that can be drawn.

    The inverse depth is mapped linearly so that its largest value gets depth 1 and its smallest the depth `farthest`, a number
    above 1 without a unit. Both ends are a choice: nothing in one picture determines them, and another `farthest` gives a cloud
    that is deeper or flatter. A constant map gets depth 1. Raises ValueError for values that are not finite, for another
    shape, and for a `farthest` that is no finite number above 1.
    """
    if not (math.isfinite(farthest) and farthest > 1):
        raise ValueError(f"farthest is {farthest}, where a finite number above 1 was expected")
    inverse = _float_map(inverse, "inverse depth")
    if not np.isfinite(inverse).all():
        raise ValueError("inverse depth has values that are NaN or infinite, where finite ones were expected")
    if inverse.min() == inverse.max():
        return np.ones(inverse.shape, np.float32)
    return (1 / (1 / farthest + images.unit_range(inverse) * (1 - 1 / farthest))).astype(np.float32)


def point_cloud(depth: np.ndarray, fov: float) -> np.ndarray:
    """Back-project a depth map (H, W) into points (H, W, 3) float32, as the head of this module says.

    `fov` is the horizontal field of view in degrees, between 0 and 180. A depth that is not finite or not above 0 gives a point
    that is not finite or not in front of the camera, which `write_ply` leaves out. Raises ValueError for another shape or field
    of view.
    """
    if not 0 < fov < 180:
        raise ValueError(f"a field of view of {fov} degrees, where one between 0 and 180 was expected")
    depth = _float_map(depth, "depth")
    height, width = depth.shape
    tangent = math.tan(math.radians(fov) / 2)  # of half the field of view: half the width, seen at depth 1
    right = (np.arange(width) + 0.5 - width / 2) / (width / 2) * tangent
    up = (height / 2 - np.arange(height) - 0.5) / (width / 2) * tangent
    points = np.empty((height, width, 3), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # an infinite depth has no place, and is left as it comes
        points[..., 0] = depth * right.astype(np.float32)
        points[..., 1] = depth * up.astype(np.float32)[:, None]
        points[..., 2] = -depth
    return points


def write_ply(path: str | os.PathLike[str], points: np.ndarray, colors: np.ndarray) -> int:
    """Write points (..., 3) with their colours (..., 3) uint8 as a binary little-endian PLY file, and return how many.

    Each vertex has float32 x, y, z and uchar red, green, blue, in the order of the arrays. Only points in front of the camera are
    written: those with three finite coordinates and z < 0, which are the pixels of finite depth above 0. The file appears
    complete or not at all. Raises ValueError for arrays that do not fit and where no point is in front of the camera, OSError
    where the file cannot be written.
    """
    if points.shape[-1:] != (3,) or points.dtype.kind != "f":
        raise ValueError(
            f"points of shape {points.shape} and {points.dtype}, where (..., 3) of a floating-point type was expected"
        )
    if colors.shape != points.shape or colors.dtype != np.uint8:
        raise ValueError(f"colors of shape {colors.shape} and {colors.dtype}, where {points.shape} and uint8 were expected")
    points, colors = _float32(points).reshape(-1, 3), colors.reshape(-1, 3)
    kept = np.isfinite(points).all(axis=1) & (points[:, 2] < 0)
    count = int(kept.sum())
    if count == 0:
        raise ValueError(f"none of {len(points)} points is in front of the camera (finite, with z < 0)")
    with images.complete_file(path) as file:
        file.write(_header(count).encode("ascii"))
        for start in range(0, len(points), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            vertices = np.empty(int(kept[chunk].sum()), _VERTEX)
            vertices["position"] = points[chunk][kept[chunk]]
            vertices["color"] = colors[chunk][kept[chunk]]
            file.write(vertices.data)
    return count


def _header(count: int) -> str:
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    lines += [f"property float {name}" for name in "xyz"]
    lines += [f"property uchar {name}" for name in ("red", "green", "blue")]
    return "\n".join([*lines, "end_header", ""])


def _float_map(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "fiu":
        raise ValueError(f"{name} of shape {values.shape} and {values.dtype}, where numbers of shape (H, W) were expected")
    return _float32(values)


def _float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is treated as that
        return values.astype(np.float32, copy=False)
