"""Predict pictures: `python -m accelerated.predict IMAGE... --weights FILE --output DIR`.

For every picture, under its name without extension:
- a depth model writes NAME.png (inverse depth, 16 bits, scaled from the picture's minimum to its maximum), NAME.pfm (the values
  as the model gives them, float32) and NAME-color.png (to look at: near is bright);
- a segmentation model writes NAME.png (class ids) and NAME-color.png (one colour per class).
Where a name is taken, by an earlier picture of the same call or because its file is itself one of the pictures to read, NAME-2,
NAME-3, ... is used instead, and every "picture -> files" is printed. Files of earlier calls are replaced.

A picture that cannot be predicted costs one sentence on stderr and does not stop the others. Exit status: 0 when all were
predicted, 1 when any was not or nothing could begin, 2 for a command line that makes no sense.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from torch.nn.functional import interpolate

import accelerated
from accelerated import images
from accelerated.preprocess import preprocess

if TYPE_CHECKING:
    from accelerated import DPT

SUFFIXES = {"depth": (".png", ".pfm", "-color.png"), "segmentation": (".png", "-color.png")}


def predict(model: DPT, image: np.ndarray) -> np.ndarray:
    """Predict one picture, at its own size, on the device and in the precision of the model's parameters.

    `image`: RGB (H, W, 3), uint8, or floating point in [0, 1]; any size. Returns, for a depth model, inverse depth (H, W), up to
    an unknown scale and shift: the network's output resized with the bicubic filter, whose overshoot may go below 0. For a
    segmentation model, the class of the largest logit, (H, W) uint8 (uint16 beyond 256 classes). The model computes in
    evaluation mode and is left as it was.

    Raises ValueError for an image of another kind (`preprocess`), and for a prediction that is not finite.
    """
    weight = next(model.parameters())
    with _evaluation(model), torch.inference_mode():
        output = model(preprocess(image, model.config).to(weight))
        scores = output.logits[0] if model.config["task"] == "segmentation" else output
        if not torch.isfinite(scores).all():
            raise ValueError("the model's prediction is not finite: its weights are damaged, or too large for their precision")
        if model.config["task"] == "segmentation":
            return _classes(scores, image.shape[:2]).cpu().numpy()
        return _at_size(scores, image.shape[:2]).cpu().numpy()


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _at_size(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize one map (1, h, w) to (H, W), bicubic as the authors do."""
    return interpolate(maps[None], (size[0], size[1]), mode="bicubic", align_corners=False)[0, 0]


def _classes(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the class ids (H, W) of the largest resized logit of (K, h, w), the lowest id on a tie.

    Class by class: 150 maps at the size of a photograph would take gigabytes.
    """
    best = _at_size(logits[:1], size)
    ids = torch.zeros_like(best, dtype=torch.uint8 if len(logits) <= 256 else torch.int32)
    for k in range(1, len(logits)):
        scores = _at_size(logits[k : k + 1], size)
        ids[scores > best] = k
        torch.maximum(best, scores, out=best)
    return ids if len(logits) <= 256 else ids.to(torch.uint16)


def output_names(pictures: Sequence[Path], folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Choose for each picture the NAME under which its files `folder/NAME + suffix` neither meet another's nor replace a picture.

    The name of the file without extension; where that is taken, with -2, -3, ... . Names that differ only in case count as
    the same, since on some file systems they are.
    """

    def key(path: Path) -> str:
        return os.path.realpath(path).casefold()

    taken = {key(picture) for picture in pictures}
    names = []
    for picture in pictures:
        name, attempt = picture.stem, 1
        while any(key(folder / f"{name}{suffix}") in taken for suffix in suffixes):
            attempt += 1
            name = f"{picture.stem}-{attempt}"
        taken.update(key(folder / f"{name}{suffix}") for suffix in suffixes)
        names.append(name)
    return names


def write_prediction(prediction: np.ndarray, model: DPT, stem: Path) -> list[Path]:
    """Write what `predict` returned as `stem` + each of SUFFIXES[task], and return the paths. Raises OSError."""
    paths = [stem.with_name(stem.name + suffix) for suffix in SUFFIXES[model.config["task"]]]
    if model.config["task"] == "segmentation":
        images.write_png(paths[0], prediction)
        images.write_png(paths[1], images.class_colors(model.config["num_classes"])[prediction])
    else:
        images.write_png(paths[0], images.depth_to_uint16(prediction))
        images.write_pfm(paths[1], prediction)
        images.write_png(paths[2], images.depth_to_color(prediction))
    return paths


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help explains the options)\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m accelerated.predict", description="Predict depth or classes for pictures.", allow_abbrev=False
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="pictures to predict")
    parser.add_argument("--weights", metavar="FILE", required=True, type=Path, help="weights, as training writes them")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="folder for the results, created where missing")
    return parser.parse_intermixed_args(argv)


def _load(weights: Path, output: Path) -> DPT:
    """Load the model onto the best device, and create the folder. Raises OSError or ValueError, in one sentence."""
    model = accelerated.load_checkpoint(weights)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{output}: cannot be created as output folder ({error.strerror})") from None
    if not os.access(output, os.W_OK | os.X_OK):
        raise OSError(f"{output}: no permission to write into this output folder")
    try:
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    except torch.OutOfMemoryError:
        raise OSError(f"{weights}: the GPU has not enough free memory for this model") from None


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


def _failure(picture: Path, error: Exception) -> str:
    """Say in one sentence why a picture could not be predicted; raise `error` again where it is no fault of the picture."""
    if isinstance(error, images.ImageError):
        return str(error)
    if isinstance(error, ValueError):
        return f"{picture}: {error}"
    if isinstance(error, OSError):
        return f"{picture}: its results cannot be written ({error.strerror or error})"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"{picture}: not enough memory for a picture of this size"
    raise error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit status."""
    from tqdm import tqdm

    arguments = _arguments(argv)
    try:
        model = _load(arguments.weights, arguments.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    pictures = list(dict.fromkeys(arguments.images))
    names = output_names(pictures, arguments.output, SUFFIXES[model.config["task"]])
    failed = 0
    # disable=None: no progress bar unless stderr is a terminal
    for picture, name in zip(tqdm(pictures, unit="image", disable=None if len(pictures) > 1 else True), names, strict=True):
        try:
            with _silent_decoders():
                image = images.read_image(picture)
            paths = write_prediction(predict(model, image), model, arguments.output / name)
        except Exception as error:
            failed += 1
            tqdm.write(f"error: {_failure(picture, error)}", file=sys.stderr)
        else:
            tqdm.write(f"{picture} -> {', '.join(map(str, paths))}")
    if failed and len(pictures) > 1:
        print(f"error: {failed} of {len(pictures)} pictures could not be predicted", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):  # a name that the terminal's encoding lacks is escaped, not an error
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
