"""Predict pictures and videos: `python -m accelerated.predict INPUT... --weights FILE --output DIR`.

An INPUT is a picture, a video, a folder of them, or a pattern such as "photos/**/*.jpg". For every picture, under its name
without extension:
- a depth model writes NAME.png (inverse depth, 16 bits, scaled from the picture's minimum to its maximum), NAME.pfm (the values
  as the model gives them, float32) and NAME-color.png (to look at: near is bright); of a model that knows metres, NAME.png has
  the factor of its benchmark (256 for KITTI, 1000 for NYU) and NAME.pfm metres;
- a segmentation model writes NAME.png (class ids), NAME-color.png (one colour per class) and NAME-overlay.png (the colours over
  the picture, and what they mean).
`--save` chooses others, or more (`accelerated.outputs`). A video becomes NAME-color.mp4 (`accelerated.predict_video`). Where a
name is taken, by an earlier input of the same call or because its file is itself one of the inputs to read, NAME-2, NAME-3, ...
is used instead, and every "input -> files" is printed. Files of earlier calls are replaced.

An input that cannot be predicted costs one sentence on stderr and does not stop the others. Exit status: 0 when all were
predicted, 1 when any was not, or in part, or nothing could begin, 2 for a command line that makes no sense, 130 after Ctrl-C,
which leaves complete files only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import accelerated
from accelerated import images
from accelerated.command_line import sentence
from accelerated.inputs import expand
from accelerated.outputs import Products, output_names
from accelerated.placement import CompilerError
from accelerated.predict_options import TAPS, parse
from accelerated.predict_video import predict_video
from accelerated.predictor import Predictor
from accelerated.video import is_video

if TYPE_CHECKING:
    from tqdm import tqdm


def _products(options: argparse.Namespace) -> Products:
    """Load the model, and create the folder. Raises OSError, ValueError or MemoryError, in one sentence."""
    weights = accelerated.published_file(options.model) if options.weights is None else options.weights
    try:
        predictor = Predictor(
            weights,
            name=options.model,
            device=options.device,
            dtype=options.dtype,
            compile=options.compile,
            size=options.size,
            batch_size=options.batch_size,
            multi_scale=options.multi_scale,
            kitti_crop=options.kitti_crop,
        )
    except MemoryError as error:
        raise MemoryError(f"{weights}: {error}") from None
    blocks: list[int] = []
    for block in options.attention or ():
        taps = predictor.config.get("taps", [0])  # a MiDaS has none, and says so of any block
        blocks += [tap for tap in taps if isinstance(tap, int)] if block == TAPS else [block]
    head = None if options.head == "mean" else options.head
    products = Products(predictor, options.save, options.fov, list(dict.fromkeys(blocks)), head, options.point)
    _make_folder(options.output)
    return products


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: cannot be created as output folder ({error.strerror})") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: no permission to write into this output folder")


@contextlib.contextmanager
def _silent_decoders() -> Iterator[None]:
    """Keep what libtiff and the like write straight to file descriptor 2 from stderr, which says one sentence per picture."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _failure(source: Path, error: Exception) -> str:
    """Say in one sentence why an input could not be predicted; raise a CompilerError again, which is no fault of the input."""
    if isinstance(error, CompilerError):
        raise error
    if isinstance(error, images.ImageError):
        return str(error)
    if isinstance(error, ValueError | MemoryError | ImportError):
        return f"{source}: {error}"
    if isinstance(error, OSError):
        return f"{source}: its results cannot be written ({error.strerror or error})"
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"{source}: cannot be predicted, for a reason that nobody foresaw ({type(error).__name__}: {reason})"


class _Run:
    """One call of the command: what there is to do, and how many inputs failed."""

    def __init__(self, inputs: Sequence[Path], products: Products, folder: Path, bar: tqdm) -> None:
        self.products, self.bar, self.failed = products, bar, 0
        suffixes = [products.video_suffixes() if is_video(path) else products.picture_suffixes() for path in inputs]
        names = output_names(inputs, folder, suffixes)
        self.jobs = [(source, folder / name) for source, name in zip(inputs, names, strict=True)]

    def predict_all(self) -> None:
        """Predict every input in order, pictures that follow each other in batches."""
        batch: list[tuple[Path, Path, np.ndarray]] = []
        for source, stem in self.jobs:
            if is_video(source):
                self.predict_batch(batch)
                batch = []
                self.predict_video(source, stem)
                continue
            try:
                with _silent_decoders():
                    batch.append((source, stem, images.read_image(source)))
            except Exception as error:
                self.fail(source, error)
            if len(batch) == self.products.predictor.batch_size:
                self.predict_batch(batch)
                batch = []
        self.predict_batch(batch)

    def predict_batch(self, batch: Sequence[tuple[Path, Path, np.ndarray]]) -> None:
        """Predict pictures together; where that fails, one by one, so that each that fails has its own sentence."""
        if not batch:
            return
        try:
            predictions = self.products.predictor([image for *_, image in batch])
        except Exception as error:
            if len(batch) == 1:
                self.fail(batch[0][0], error)
                return
            for one in batch:
                self.predict_batch([one])
            return
        for (source, stem, image), prediction in zip(batch, predictions, strict=True):
            try:
                self.done(source, ", ".join(map(str, self.products.write(image, prediction, stem))))
            except Exception as error:
                self.fail(source, error)

    def predict_video(self, source: Path, stem: Path) -> None:
        """Predict one video; frames that cannot be decoded make it a failure, but do not stop the others."""
        try:
            filmed = predict_video(source, self.products, stem)
        except Exception as error:
            self.fail(source, error)
            return
        files = [f"{path}{os.sep} ({filmed.frames} frames)" if path == stem else str(path) for path in filmed.paths]
        self.done(source, ", ".join(files))
        if filmed.damaged:
            frames = "1 frame" if filmed.damaged == 1 else f"{filmed.damaged} frames"
            self.complain(f"{source}: {frames} could not be decoded and left out")

    def done(self, source: Path, files: str) -> None:
        """Say what was written."""
        self.bar.write(f"{source} -> {files}")
        self.bar.update()

    def fail(self, source: Path, error: Exception) -> None:
        """Say why nothing more was written."""
        self.complain(_failure(source, error))
        self.bar.update()

    def complain(self, sentence: str) -> None:
        """Count an input that failed, and say why."""
        self.failed += 1
        self.bar.write(f"error: {sentence}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    from tqdm import tqdm

    options = parse(argv)
    inputs, failures = _expanded(options.inputs)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if not inputs:
        return 1
    try:
        products = _products(options)
    except (OSError, ValueError, MemoryError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 1
    # disable=None: no progress bar unless stderr is a terminal
    with tqdm(total=len(inputs), unit="image", disable=None if len(inputs) > 1 else True) as bar:
        run = _Run(inputs, products, options.output, bar)
        try:
            run.predict_all()
        except CompilerError as error:
            bar.write(f"error: {error}", file=sys.stderr)
            return 1
    failed, total = run.failed + len(failures), len(inputs) + len(failures)
    if failed and total > 1:
        pictures = not failures and not any(map(is_video, inputs))
        what = "pictures could not be predicted" if pictures else "inputs could not be predicted, or not in full"
        print(f"error: {failed} of {total} {what}", file=sys.stderr)
    return 1 if failed else 0


def _expanded(names: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The files that the inputs stand for, each once, and why others stand for none."""
    found, failures = [], []
    for name in names:
        try:
            found += expand(name)
        except images.ImageError as error:
            failures.append(str(error))
    return list(dict.fromkeys(found)), failures


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # a name that the terminal's encoding lacks is escaped, not an error
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
