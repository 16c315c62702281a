"""What the page shows, from arrays: previews, the legend of classes, the marked point, and the point cloud for `cloud.js`."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from accelerated import images, pointcloud

SHORTEST, LONGEST = 512, 1024  # the range of a preview's longer side, in pixels: about what a page shows of it
CLOUD_POINTS = 80_000  # as many as a telephone turns smoothly


def preview(image: np.ndarray) -> np.ndarray:
    """Return RGB (H, W, 3), uint8 or floating point in [0, 1], as uint8 of `preview_size`."""
    pixels = images.to_uint8(image)
    height, width = preview_size(image.shape[0], image.shape[1])
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))


def preview_size(height: int, width: int) -> tuple[int, int]:
    """Return (height, width) of a picture's preview: its longer side from SHORTEST to LONGEST, no side 0."""
    longest = max(height, width)
    scale = min(max(longest, SHORTEST), LONGEST) / longest
    return max(1, round(height * scale)), max(1, round(width * scale))


def smooth(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map (H, W) to `size` (h, w), float32, averaging where it shrinks."""
    values = values.astype(np.float32, copy=False)
    if values.shape == size:
        return values
    return np.asarray(Image.fromarray(values).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def sampled(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pick from (H, W, ...) the values under the pixel centres of a map of `size` (h, w): for ids and edges, never a mixture."""
    rows, columns = (((np.arange(to) + 0.5) * have / to).astype(int) for to, have in zip(size, values.shape[:2], strict=True))
    return values[np.ix_(rows, columns)]


def pixel_below(point: Sequence[int], shown: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the pixel (x, y) of a picture of `size` (H, W) below the centre of pixel `point` of its preview `shown` (h, w).

    A point outside the preview counts as the nearest one inside.
    """
    (h, w), (height, width) = shown, size
    x, y = (min(max(int(c), 0), most - 1) for c, most in zip(point, (w, h), strict=True))
    return int((x + 0.5) * width / w), int((y + 0.5) * height / h)


def marked(picture: np.ndarray, point: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Draw a ring around pixel `point` (x, y) of the source of `size` (H, W) into its preview (h, w, 3) uint8; return a copy."""
    h, w = picture.shape[:2]
    x, y = (point[0] + 0.5) * w / size[1], (point[1] + 0.5) * h / size[0]
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    radius, line = max(3.0, max(h, w) / 70), max(1, round(max(h, w) / 350))
    for color, r, thick in (("black", radius + line, 3 * line), ("white", radius, line)):
        draw.ellipse((x - r, y - r, x + r, y + r), outline=color, width=thick)
    return np.asarray(canvas)


def legend(classes: np.ndarray, colors: np.ndarray, names: Sequence[str], most: int = 16) -> str:
    """Return HTML that names the classes present in (H, W) ids, largest share first, with their colour and share."""
    counts = np.bincount(classes.ravel(), minlength=len(names))
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    rows = [
        f'<li><i style="background:rgb({",".join(str(int(c)) for c in colors[k])})"></i>{html.escape(names[k])}'
        f"<b>{percent(counts[k] / classes.size)}</b></li>"
        for k in present[:most]
    ]
    more = f"<li>and {len(present) - most} more</li>" if len(present) > most else ""
    return f'<ul class="dpt-legend">{"".join(rows)}{more}</ul>'


def percent(share: float) -> str:
    """Return a share in (0, 1] for reading: "42 %", "0.3 %", "< 0.1 %"."""
    if share < 0.001:
        return "&lt; 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def cloud_depth(depth: np.ndarray) -> np.ndarray:
    """Reduce a depth map (H, W) to at most about CLOUD_POINTS values (h, w), each one of its own: no mixtures across edges."""
    height, width = depth.shape
    scale = min(1.0, math.sqrt(CLOUD_POINTS / (height * width)))
    return sampled(depth, (max(1, round(height * scale)), max(1, round(width * scale))))


def cloud(depth: np.ndarray, image: np.ndarray, fov: float) -> str:
    """Return, as JSON for `cloud.js`, the points of a depth map (h, w) with the colours of its picture (h', w', 3) uint8.

    {"fov": degrees, "aspect": w / h, "step": width of a pixel at depth 1, "pivot": [x, y, z], "points": base64 of little-endian
    float32 x y z, "colors": base64 of uint8 r g b}, in the axes of `pointcloud.point_cloud`. Depth that is not finite or not
    above 0 makes no point. The scene is turned around `pivot`, on the line of sight, at its median depth.
    """
    kept = np.isfinite(depth) & (depth > 0)
    points = pointcloud.point_cloud(depth, fov)[kept].astype("<f4")
    colors = sampled(image, (depth.shape[0], depth.shape[1]))[kept]
    middle = float(np.median(depth[kept])) if kept.any() else 1.0
    return json.dumps({
        "fov": fov,
        "aspect": depth.shape[1] / depth.shape[0],
        "step": 2 * math.tan(math.radians(fov) / 2) / depth.shape[1],
        "pivot": [0.0, 0.0, -middle],
        "points": base64.b64encode(points.tobytes()).decode("ascii"),
        "colors": base64.b64encode(colors.tobytes()).decode("ascii"),
    })  # fmt: skip
