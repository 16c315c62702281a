"""The kinds of files that a prediction can become, and how each is written.

| kind | of depth | of classes |
|---|---|---|
| png | 16 bits: inverse depth from the picture's minimum to its maximum; metres times metric_png_scale, cut off at 65535 | ids |
| pfm | the values as they are, float32 | |
| npy | the values as they are | ids |
| color | inferno, near is bright | a colour for each class |
| overlay | | the colours over the picture, and a legend |
| side | the picture beside "color" | the same |
| ply | a cloud of points in the picture's colours; of relative models with depths from 1 to 10, a choice | |
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from accelerated import drawing, images, pointcloud
from accelerated.predictor import Predictor

KINDS = {
    "depth": ("png", "pfm", "npy", "color", "side", "ply"),
    "segmentation": ("png", "color", "overlay", "side", "npy"),
}
DEFAULT_KINDS = {"depth": ("png", "pfm", "color"), "segmentation": ("png", "color", "overlay")}
DEFAULT_VIDEO_KINDS = ("color",)
PAINTED = ("color", "side", "overlay")  # the kinds that are pictures to look at: of a video, they are videos
DEFAULT_FOV = 55.0  # degrees, horizontal

Limits = tuple[float, float]


class Products:
    """What is written of each prediction of a model: `kinds` (None: those of DEFAULT_KINDS), and attention maps.

    `attention`: blocks of the transformer, `head` and `point` as in `Predictor.attention`. `fov`: the horizontal field of view
    of point clouds, in degrees. Raises ValueError for a kind, a block or a head that the model has not.
    """

    def __init__(
        self,
        predictor: Predictor,
        kinds: Sequence[str] | None = None,
        fov: float = DEFAULT_FOV,
        attention: Sequence[int] = (),
        head: int | None = None,
        point: tuple[int, int] | None = None,
    ) -> None:
        there = KINDS[predictor.task]
        lacking = [kind for kind in kinds or () if kind not in there]
        if lacking:
            raise ValueError(f"a {predictor.task} model has no {', '.join(lacking)} to save: expected {', '.join(there)}")
        for block in attention:
            predictor.check_attention(block, head)
        self.predictor, self.fov = predictor, fov
        self.picture_kinds = DEFAULT_KINDS[predictor.task] if kinds is None else tuple(kinds)
        self.video_kinds = DEFAULT_VIDEO_KINDS if kinds is None else tuple(kinds)
        self.attention, self.head, self.point = tuple(attention), head, point
        if predictor.task == "segmentation":
            self._colors, self._names = drawing.class_palette(predictor.config["num_classes"])

    def picture_suffixes(self) -> list[str]:
        """What follows the NAME of a picture in the names of its files, in the order of `write`."""
        kinds = [f"-{kind}.png" if kind in PAINTED else f".{kind}" for kind in self.picture_kinds]
        return kinds + [f"{suffix}.png" for suffix in self._attention_suffixes()]

    def video_suffixes(self) -> list[str]:
        """The same of a video's files, in the same order; last "", a folder for the kinds that are one file per frame."""
        painted = [f"-{kind}.mp4" for kind in self.video_kinds if kind in PAINTED]
        attention = [f"{suffix}.mp4" for suffix in self._attention_suffixes()]
        return painted + attention + ([""] if self.frame_kinds() else [])

    def frame_kinds(self) -> list[str]:
        """The kinds of which every frame of a video has a file of its own."""
        return [kind for kind in self.video_kinds if kind not in PAINTED]

    def write(self, image: np.ndarray, values: np.ndarray, stem: Path) -> list[Path]:
        """Write every file of one picture as `stem` + suffix, and return the paths. Raises OSError, and ValueError (`attention`).

        `image` is the picture as the predictor was given it, `values` its prediction.
        """
        view = self.predictor.view(image)
        looks = self.paint_attention(image)  # first: where the point lies beside the picture, nothing is written
        paths = [stem.with_name(stem.name + suffix) for suffix in self.picture_suffixes()]
        for path, kind in zip(paths, self.picture_kinds, strict=False):
            if kind in PAINTED:
                images.write_png(path, self.paint(kind, view, values))
            else:
                self.write_data(kind, view, values, path)
        for path, look in zip(paths[len(self.picture_kinds) :], looks, strict=True):
            images.write_png(path, look)
        return paths

    def write_data(self, kind: str, view: np.ndarray, values: np.ndarray, path: Path) -> None:
        """Write one of the kinds that are not PAINTED, of a picture as `Predictor.view` gives it. Raises OSError."""
        if kind == "pfm":
            images.write_pfm(path, values)
        elif kind == "npy":
            images.write_npy(path, values)
        elif kind == "ply":
            depth = values if self.predictor.metric else pointcloud.relative_depth(values)
            pointcloud.write_ply(path, pointcloud.point_cloud(depth, self.fov), images.to_uint8(view))
        elif self.predictor.metric:
            units = np.rint(values.astype(np.float64) * self.predictor.config["metric_png_scale"])
            images.write_png(path, np.clip(units, 0, 65535).astype(np.uint16))
        else:
            images.write_png(path, values if self.predictor.task == "segmentation" else images.depth_to_uint16(values))

    def paint(
        self, kind: str, view: np.ndarray, values: np.ndarray, limits: Limits | None = None, legend: bool = True
    ) -> np.ndarray:
        """Draw one of the PAINTED kinds, (H', W', 3) uint8; `limits` as in `color`."""
        if kind == "overlay":
            picture = drawing.overlay(view, values, self._colors)
            return drawing.with_legend(picture, values, self._colors, self._names) if legend else picture
        color = self.color(values, limits)
        return drawing.side_by_side(view, color) if kind == "side" else color

    def color(self, values: np.ndarray, limits: Limits | None = None) -> np.ndarray:
        """Draw a prediction in colours, (H, W, 3) uint8; `limits`: the `nearness` of the darkest and of the brightest colour."""
        if self.predictor.task == "segmentation":
            return self._colors[values]
        near = self.nearness(values)
        if limits is None:
            return images.depth_to_color(near)
        low, high = limits
        share = np.clip((near - low) / (high - low), 0, 1) if high > low else np.zeros(near.shape)
        return _inferno()[np.rint(share * 255).astype(np.uint8)]

    def nearness(self, values: np.ndarray) -> np.ndarray:
        """Return inverse depth: of a metric model, one over its metres, and 0 where the cubic's overshoot left none."""
        if not self.predictor.metric:
            return values
        return np.divide(1, values, out=np.zeros_like(values), where=values > 0)

    def paint_attention(self, image: np.ndarray) -> list[np.ndarray]:
        """Draw where each block of `attention` looks in a picture, given as to the predictor. Raises ValueError as it does."""
        view = self.predictor.view(image)
        return [drawing.heat(view, self.predictor.attention(image, block, self.head, self.point)) for block in self.attention]

    def _attention_suffixes(self) -> list[str]:
        head = "" if self.head is None else f"-head{self.head}"
        return [f"-attention-{block}{head}" for block in self.attention]


def output_names(inputs: Sequence[Path], folder: Path, suffixes: Sequence[Sequence[str]]) -> list[str]:
    """Choose for each input the NAME under which its files `folder/NAME + suffix` neither meet another's nor replace an input.

    The name of the file without extension; where that is taken, with -2, -3, ... . Names that differ only in case count as
    the same, since on some file systems they are. A folder that an input lies in is taken, too. `suffixes`: those of each input.
    """

    def key(path: Path) -> str:
        return os.path.realpath(path).casefold()

    taken = {key(path) for source in inputs for path in (source, *source.absolute().parents)}
    names = []
    for source, endings in zip(inputs, suffixes, strict=True):
        name, attempt = source.stem, 1
        while any(key(folder / f"{name}{suffix}") in taken for suffix in endings):
            attempt += 1
            name = f"{source.stem}-{attempt}"
        taken.update(key(folder / f"{name}{suffix}") for suffix in endings)
        names.append(name)
    return names


class SlowLimits:
    """The range of a video's colours, which follows the frames slowly, so that it does not flicker.

    It begins as the first frame's, minimum to maximum, and then goes, with every frame, 1 - exp(-1 / (rate * SECONDS)) of the
    way to that frame's: after a cut, two thirds of it in SECONDS. What lies outside gets the colour of the nearer end.
    """

    SECONDS = 1.0

    def __init__(self, rate: float) -> None:
        self._share = 1 - math.exp(-1 / (rate * self.SECONDS))
        self._limits: np.ndarray | None = None

    def follow(self, near: np.ndarray) -> Limits:
        """Take the next frame's inverse depth (H, W), and return the (low, high) with which to draw it."""
        own = np.array([near.min(), near.max()], dtype=np.float64)
        self._limits = own if self._limits is None else self._limits + self._share * (own - self._limits)
        return float(self._limits[0]), float(self._limits[1])


def _inferno() -> np.ndarray:
    """The 256 colours of `images.depth_to_color`, (256, 3) uint8."""
    return images.depth_to_color(np.arange(256, dtype=np.float32)[None])[0]
