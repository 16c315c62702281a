"""What people look at: classes and attention painted over the picture, with a legend, or pictures side by side.

Every function takes and returns arrays and changes none of its arguments. A picture ("image") is RGB (H, W, 3) as
`images.read_image` gives it, uint8 or floating point in [0, 1]; what comes back is RGB uint8. Depth is coloured by
`images.depth_to_color`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from accelerated import ade20k, images

_WHITE, _INK, _OUTLINE = (255, 255, 255), (25, 25, 25), (150, 150, 150)
_CHUNK = 1 << 20  # pixels blended at a time: in floating point, a whole photograph would take gigabytes
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_DIMMED = np.float32(0.5)  # how bright a picture remains where nobody looks


def class_palette(num_classes: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the colours (K, 3) uint8 and the names of K classes.

    ADE20K's for its 150 classes, otherwise `images.class_colors` and "class 0", "class 1", ... . Raises ValueError for K < 1.
    """
    if num_classes < 1:
        raise ValueError(f"{num_classes} classes, where 1 or more were expected")
    if num_classes == len(ade20k.NAMES):
        return ade20k.COLORS, ade20k.NAMES
    return images.class_colors(num_classes), tuple(f"class {k}" for k in range(num_classes))


def overlay(image: np.ndarray, classes: np.ndarray, colors: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Paint the colour of each pixel's class over a picture, and return (H, W, 3) uint8.

    `classes` are ids (H, W), of any integer type, `colors` (K, 3) uint8. Each value is
    (1 - opacity) * image + opacity * colour, to the nearest; opacity 0 leaves the picture, 1 the colours. Raises ValueError for
    arrays that do not fit, for an id outside 0 to K - 1, and for an opacity outside 0 to 1.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"an opacity of {opacity}, where 0 to 1 was expected")
    _check_picture(image, "image")
    _check_classes(classes, colors)
    _check_map_size(classes, image, "classes")
    painted = np.empty(image.shape, np.uint8)
    for rows in _chunks(image):
        below = images.to_uint8(image[rows]).astype(np.float32)
        painted[rows] = np.rint(below + np.float32(opacity) * (colors[classes[rows]] - below))
    return painted


def heat(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Paint where a model looks over the dimmed, grey picture, and return (H, W, 3) uint8.

    `weights` (H, W), finite and >= 0, are divided by their maximum. A pixel of weight w shows (1 - w) of the grey picture at half
    its brightness, and w of matplotlib's `inferno` at w: the grey alone at 0, a light yellow at 1. Weights that are all zero
    leave the grey picture. Raises ValueError for arrays that do not fit, and for weights below 0 or not finite.
    """
    import matplotlib

    _check_picture(image, "image")
    _check_map_size(weights, image, "weights")
    if weights.dtype.kind not in "fiu" or not (np.isfinite(weights).all() and weights.min() >= 0):
        raise ValueError(f"weights of {weights.dtype} that are not all finite and at least 0, as was expected")
    glow = (matplotlib.colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.float32)
    largest = float(weights.max()) or 1.0
    painted = np.empty(image.shape, np.uint8)
    for rows in _chunks(image):
        share = (weights[rows].astype(np.float64) / largest).astype(np.float32)[..., None]
        grey = images.to_uint8(image[rows]) @ _LUMA * _DIMMED
        painted[rows] = np.rint((1 - share) * grey[..., None] + share * glow[np.rint(share[..., 0] * 255).astype(np.uint8)])
    return painted


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Put two pictures of one size beside each other, with a white gap between them: (H, 2 W + gap, 3) uint8.

    The gap is a fiftieth of the shorter side, at least 1 pixel. Raises ValueError for arrays that are no pictures of one size.
    """
    _check_picture(left, "left picture")
    _check_picture(right, "right picture")
    if left.shape != right.shape:
        raise ValueError(f"pictures of shape {left.shape} and {right.shape}, where one shape was expected")
    height, width = left.shape[:2]
    gap = max(1, round(min(height, width) / 50))
    pair = np.full((height, 2 * width + gap, 3), 255, np.uint8)
    pair[:, :width] = images.to_uint8(left)
    pair[:, width + gap :] = images.to_uint8(right)
    return pair


def with_legend(picture: np.ndarray, classes: np.ndarray, colors: np.ndarray, names: Sequence[str], most: int = 16) -> np.ndarray:
    """Add to a picture a legend of the classes that are in it: (H', W', 3) uint8, the picture itself in the upper left.

    `classes` (H, W) are the ids that the picture shows, `colors` (K, 3) uint8 and `names` those of all K classes. The
    legend has a line for each class that is there, with its share of the pixels, the largest first, and the lowest id first
    among equals; beyond `most` classes it ends in "and N more". It stands to the right of the picture in one column, or below
    it in as many as fit: where the longer side of the result is the shorter one. The letters grow with the picture, from 12
    pixels on. Raises ValueError for arrays that do not fit, for an id outside 0 to K - 1, and for `most` < 1.
    """
    _check_picture(picture, "picture")
    _check_classes(classes, colors)
    if classes.size == 0:
        raise ValueError(f"classes of shape {classes.shape}, where one pixel or more was expected")
    if len(names) != len(colors):
        raise ValueError(f"{len(names)} names of {len(colors)} colours, where one for each was expected")
    if most < 1:
        raise ValueError(f"a legend of {most} classes, where 1 or more were expected")
    height, width = picture.shape[:2]
    legend = _Legend(_entries(classes, colors, names, most), max(12, round(math.sqrt(height * width) / 40)))
    columns = legend.columns(width)
    (beside_width, beside_height), (below_width, below_height) = legend.size(1), legend.size(columns)
    beside = (width + beside_width, max(height, beside_height))
    below = (max(width, below_width), height + below_height)
    page = Image.new("RGB", min(beside, below, key=max), _WHITE)
    page.paste(Image.fromarray(np.ascontiguousarray(images.to_uint8(picture))), (0, 0))
    if page.size == beside:
        page.paste(legend.panel(1), (width, 0))
    else:
        page.paste(legend.panel(columns), (0, height))
    return np.array(page)


_Entry = tuple[tuple[int, ...] | None, str, str]  # a colour, a name, a share


def _entries(classes: np.ndarray, colors: np.ndarray, names: Sequence[str], most: int) -> list[_Entry]:
    """Return the lines of the legend, largest share first."""
    counts = np.zeros(len(colors), np.int64)
    for rows in _chunks(classes):
        counts += np.bincount(classes[rows].ravel().astype(np.int64), minlength=len(colors))
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    entries: list[_Entry] = [
        (tuple(colors[k].tolist()), " ".join(str(names[k]).split()), _percent(counts[k] / classes.size)) for k in present[:most]
    ]
    if len(present) > most:
        entries.append((None, f"and {len(present) - most} more", ""))
    return entries


def _percent(share: float) -> str:
    return "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


class _Legend:
    """The lines of a legend, and the panels that they can be drawn on. All measures are in pixels."""

    def __init__(self, entries: list[_Entry], letters: int) -> None:
        self.entries = entries
        self.font = ImageFont.load_default(letters)
        self.swatch = letters
        self.line = math.ceil(1.5 * letters)
        self.margin = math.ceil(0.75 * letters)
        self.names = max(self._length(name) for _, name, _ in entries)
        self.shares = max(self._length(share) for *_, share in entries)
        self.column = self.swatch + self.names + self.shares + 4 * self.margin  # two within, one on either side

    def columns(self, width: int) -> int:
        """Return how many columns fit into `width`, at least one."""
        return max(1, width // self.column)

    def size(self, columns: int) -> tuple[int, int]:
        """Return the width and height of a panel."""
        return columns * self.column, self._rows(columns) * self.line + 2 * self.margin

    def panel(self, columns: int) -> Image.Image:
        """Draw the lines, down the first column, then down the next."""
        rows = self._rows(columns)
        panel = Image.new("RGB", self.size(columns), _WHITE)
        draw = ImageDraw.Draw(panel)
        for index, (color, name, share) in enumerate(self.entries):
            left = index // rows * self.column + self.margin
            middle = index % rows * self.line + self.margin + self.line // 2
            text = left + self.swatch + self.margin
            if color is not None:
                top = middle - self.swatch // 2
                square = (left, top, left + self.swatch - 1, top + self.swatch - 1)
                draw.rectangle(square, fill=color, outline=_OUTLINE)
            draw.text((text, middle), name, _INK, self.font, anchor="lm")
            draw.text((text + self.names + self.margin + self.shares, middle), share, _INK, self.font, anchor="rm")
        return panel

    def _rows(self, columns: int) -> int:
        return math.ceil(len(self.entries) / columns)

    def _length(self, text: str) -> int:
        return math.ceil(self.font.getlength(text))


def _chunks(array: np.ndarray) -> Iterator[slice]:
    """Yield slices of rows that hold some `_CHUNK` pixels each."""
    rows = max(1, _CHUNK // max(1, array.shape[1]))
    for start in range(0, array.shape[0], rows):
        yield slice(start, start + rows)


def _check_picture(picture: np.ndarray, name: str) -> None:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(f"{name} of shape {picture.shape}, where (H, W, 3) was expected")


def _check_map_size(values: np.ndarray, picture: np.ndarray, name: str) -> None:
    if values.shape != picture.shape[:2]:
        raise ValueError(f"{name} of shape {values.shape}, where that of the picture, {picture.shape[:2]}, was expected")


def _check_classes(classes: np.ndarray, colors: np.ndarray) -> None:
    if colors.ndim != 2 or colors.shape[1] != 3 or colors.dtype != np.uint8 or len(colors) == 0:
        raise ValueError(f"colors of shape {colors.shape} and {colors.dtype}, where (K, 3) and uint8 were expected")
    if classes.ndim != 2 or classes.dtype.kind not in "iu":
        raise ValueError(f"classes of shape {classes.shape} and {classes.dtype}, where integers (H, W) were expected")
    if classes.size and not (classes.min() >= 0 and classes.max() < len(colors)):
        raise ValueError(f"class ids from {classes.min()} to {classes.max()}, where 0 to {len(colors) - 1} were expected")
