"""A video, frame by frame: what `accelerated.predict` writes of it.

The kinds to look at become videos of the same rate (NAME-color.mp4, NAME-side.mp4, NAME-overlay.mp4, the last without a legend,
whose size would change with the classes, and NAME-attention-BLOCK.mp4); of the others every frame has a file in the folder NAME,
numbered from 000001. The colours of depth follow the frames slowly (`outputs.SlowLimits`).
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from accelerated.outputs import PAINTED, Products, SlowLimits
from accelerated.video import Video, VideoWriter


class Filmed(NamedTuple):
    """The files of one video, how many frames they hold, and how many could not be decoded and are not in them."""

    paths: list[Path]
    frames: int
    damaged: int


def predict_video(source: Path, products: Products, stem: Path) -> Filmed:
    """Predict every frame of the video `source`, and write its files, whose names begin with `stem`.

    Frames that cannot be decoded are left out. The MP4 files take their names together at the end, or, on an error or an
    interruption, none does; files of single frames are written as they come. Frames of an earlier call that the folder holds
    beyond the last one are removed. Raises ImageError for what is no video, OSError, and as the predictor does.
    """
    with contextlib.ExitStack() as stack:
        video = stack.enter_context(Video(source))
        film = _Film(products, stem, video, stack)
        waiting: deque[np.ndarray] = deque()
        for values in products.predictor.stream(_remembered(_counted(video), waiting)):
            film.add(waiting.popleft(), values)
    if products.frame_kinds():
        _remove_beyond(stem, film.count, products.frame_kinds())
    return Filmed(film.paths, film.count, video.damaged)


class _Film:
    """The open files of one video."""

    def __init__(self, products: Products, stem: Path, video: Video, stack: contextlib.ExitStack) -> None:
        self.products, self.stem, self.count = products, stem, 0
        self.paths = [stem.with_name(stem.name + suffix) for suffix in products.video_suffixes()]
        self.writers = [stack.enter_context(VideoWriter(path, video.rate)) for path in self.paths if path != stem]
        self.limits = SlowLimits(float(video.rate))

    def add(self, frame: np.ndarray, values: np.ndarray) -> None:
        """Write everything of the next frame."""
        products, view = self.products, self.products.predictor.view(frame)
        limits = self.limits.follow(products.nearness(values)) if products.predictor.task == "depth" else None
        painted = [products.paint(kind, view, values, limits, legend=False) for kind in products.video_kinds if kind in PAINTED]
        for writer, picture in zip(self.writers, painted + products.paint_attention(frame), strict=True):
            writer.write(picture)
        self.count += 1
        if products.frame_kinds():
            self.stem.mkdir(exist_ok=True)
        for kind in products.frame_kinds():
            products.write_data(kind, view, values, self.stem / f"{self.count:06}.{kind}")


def _counted(video: Video) -> Iterator[np.ndarray]:
    """The frames of a video, with a bar on a terminal."""
    from tqdm import tqdm

    yield from tqdm(video, total=video.frames, unit="frame", leave=False, disable=None)


def _remembered(frames: Iterator[np.ndarray], waiting: deque[np.ndarray]) -> Iterator[np.ndarray]:
    """The same frames, each also put at the end of `waiting`."""
    for frame in frames:
        waiting.append(frame)
        yield frame


def _remove_beyond(folder: Path, count: int, kinds: list[str]) -> None:
    """Remove the frames of those kinds whose number is larger than `count`: an earlier, longer video's."""
    for path in folder.iterdir():
        match = re.fullmatch(r"([0-9]{6,})\.([a-z]+)", path.name)
        if match and int(match[1]) > count and match[2] in kinds:
            path.unlink()
