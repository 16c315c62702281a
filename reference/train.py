"""Train dpt_tiny in NumPy on rendered scenes: `python -m reference.train [--task segmentation] [--option value ...]`.

    depth         section 4:    the scale-and-shift-invariant loss, Adam with one rate for the backbone and one for the rest
    segmentation  section 5.2:  cross-entropy and 0.2 of the auxiliary head's, dropout, batch norm, SGD, polynomial decay

Not a recipe of the paper, whose encoders are pretrained: the same steps, small enough to watch. By default eight scenes are
learnt by heart, which takes minutes; what carries over to other scenes takes thousands of them and of steps. A step is a pure
function of the parameters, the optimiser's state and a batch. Scenes are read from the cache in which `accelerated.data.scenes`
keeps what it renders: plain .npy files, and a manifest with a checksum for each scene. The run's folder gets metrics.csv, a row
per step, and weights.safetensors.

Exit status: 0 when the run is finished, 2 for options or scenes that cannot be used, 1 where it could not go on, 130 where it was
interrupted.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from . import nn, optim
from .alignment import is_constant
from .configs import TASKS, Config, configuration
from .dpt import Segmentation, apply
from .initialize import initialize
from .losses import correlation_loss, depth_loss, segmentation_loss
from .parameters import Params
from .scenes import CLASSES, SIZE, Scenes, UsageError, batches, load_scenes, normalized, random_crops
from .weights import save

RATES = {"depth": (3e-4, 3e-4), "segmentation": (2e-2, 2e-2)}  # backbone, decoder; from random weights, so above the paper's
# The loss of depth changes its meaning during a run; these do not.
SCORES = {"depth": "correlation", "segmentation": "accuracy"}
COLUMNS = ("step", "seconds", "loss", "score", "images_per_second", "backbone_rate", "decoder_rate")
LINES = 20  # printed where the output is no terminal


class RunError(RuntimeError):
    """A run that cannot go on; the message is one sentence."""


class Outcome(NamedTuple):
    """Of one step: the new parameters and state, and the loss and score of the batch before it.

    The score is `correlation` for depth, for segmentation the share of pixels that were given their class.
    """

    params: Params
    state: Any
    loss: float
    score: float


# ---- one step ------------------------------------------------------------------------------------------------------------------


def depth_objective(
    prediction: np.ndarray, depth: np.ndarray, progress: float, begin: float = 0.3, untrimmed: float = 0.8
) -> tuple[Any, Callable]:
    """The correlation's loss, which blends into the paper's, at first untrimmed: the loss, and `vjp(dloss) -> dprediction`.

    prediction: inverse depth (B, H, W). depth (B, H, W): metres, 0 where unknown. `progress` is the share of the steps already
    made: up to `begin` the correlation alone, then as long a blend; from `untrimmed` on, the largest fifth of the residuals
    is trimmed. From random weights the paper's loss alone may never leave the image-independent solution.
    """
    inverse, known = inverse_depth(depth)
    paper = min(max((progress - begin) / begin, 0.0), 1.0)
    parts = []
    if paper < 1:
        parts.append((1 - paper, *correlation_loss(prediction, inverse, known)))
    if paper > 0:
        parts.append((paper, *depth_loss(prediction, inverse, known, kept=1.0 if progress < untrimmed else 0.8)))

    def vjp(dloss: Any) -> np.ndarray:
        return sum((loss_vjp(weight * dloss) for weight, _, loss_vjp in parts), np.zeros_like(prediction))

    return sum((weight * loss for weight, loss, _ in parts), prediction.dtype.type(0)), vjp


def inverse_depth(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 / depth, 0 where it is unknown, and where it is known, bool; all (B, H, W)."""
    known = depth > 0
    return np.where(known, 1 / np.where(known, depth, 1), 0), known


def correlation(prediction: np.ndarray, depth: np.ndarray) -> float:
    """The correlation of predicted with true inverse depth (B, H, W), in the mean over images; 0 where either is constant."""
    inverse, known = inverse_depth(depth)
    pairs = [(p[m], t[m]) for p, t, m in zip(prediction, inverse, known, strict=True)]
    varied = [len(p) > 0 and not is_constant(p) and not is_constant(t) for p, t in pairs]
    return float(np.mean([np.corrcoef(*pair)[0, 1] if varies else 0 for pair, varies in zip(pairs, varied, strict=True)]))


def depth_step(
    params: Params,
    state: optim.AdamState,
    image: np.ndarray,
    depth: np.ndarray,
    config: Config,
    rates: optim.Rates,
    progress: float,
    **schedule: float,
) -> Outcome:
    """One step of Adam on image (B, 3, H, W) and depth (B, H, W).

    `schedule`: as `depth_objective` takes it. Raises RunError where the prediction is not finite.
    """
    prediction, vjp = apply(params, image, config)
    _check_finite(prediction)
    loss, loss_vjp = depth_objective(prediction, depth, progress, **schedule)
    _, grads = vjp(loss_vjp(1.0))
    return Outcome(*optim.adam(params, grads, state, rates), float(loss), correlation(prediction, depth))


def segmentation_step(
    params: Params,
    state: optim.SGDState,
    image: np.ndarray,
    labels: np.ndarray,
    config: Config,
    rates: optim.Rates,
    masks: Mapping[str, np.ndarray],
) -> Outcome:
    """One step of SGD on image (B, 3, H, W) and labels (B, H, W), 255 where ignored; batch norm's running statistics move too.

    `masks`: what dropout keeps, as `dropout_masks` draws it. Raises RunError where the prediction is not finite.
    """
    statistics: dict[str, np.ndarray] = {}
    output, vjp = apply(params, image, config, training=True, statistics=statistics, dropout_masks=masks)
    _check_finite(output.logits)
    loss, loss_vjp = segmentation_loss(output.logits, output.auxiliary, labels)
    _, grads = vjp(Segmentation(*loss_vjp(1.0)))
    updated, state = optim.sgd(params, grads, state, rates)
    classes = nn.resize_bilinear(output.logits, labels.shape[1:], align_corners=True)[0].argmax(axis=1)
    counted = labels != 255
    accuracy = ((classes == labels) & counted).sum() / max(int(counted.sum()), 1)
    return Outcome(updated | statistics, state, float(loss), float(accuracy))


def dropout_masks(image: np.ndarray, config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw what the two heads' dropout keeps for images (B, 3, H, W): True with probability 1 - config["dropout"]."""
    batch, _, height, width = image.shape
    sizes = {"head": (height // 2, width // 2), "auxiliary": (height // 4, width // 4)}
    return {head: rng.random((batch, config["fusion_width"], *size)) >= config["dropout"] for head, size in sizes.items()}


def _check_finite(output: np.ndarray) -> None:
    if not np.isfinite(output).all():
        raise RunError("the model's output is no longer finite: lower the learning rates")


# ---- a run ---------------------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, scenes: Scenes) -> list[float]:
    """Train as `options` say and return every step's score. The weights are written at the end, and where the run ends early."""
    rng = np.random.default_rng(options.seed)
    segments = options.task == "segmentation"
    config = configuration("dpt_tiny", options.task, num_classes=CLASSES if segments else None)
    params: Params = initialize(config, rng)
    rates = optim.group_rates(params, options.backbone_rate, options.decoder_rate)
    state: Any = optim.sgd_state(params) if segments else optim.adam_state(params)
    schedule = optim.polynomial_factor if segments else optim.constant_factor
    size = sum(value.size for value in params.values())
    print(f"{options.task}: dpt_tiny, {size / 1e6:.1f} M parameters, {options.scenes} scenes; into {options.folder}", flush=True)
    scores: list[float] = []
    started = time.monotonic()
    try:
        with (options.folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file, np.errstate(all="ignore"):
            log = csv.writer(file)
            log.writerow(COLUMNS)
            for step, indices in enumerate(batches(options.scenes, options.batch, options.steps, rng)):
                crops = random_crops(scenes, indices, options.crop, rng)
                image, factor = normalized(crops.image, config), schedule(step, options.steps)
                now = optim.scaled(rates, factor)
                if segments:
                    masks = dropout_masks(image, config, rng)
                    outcome = segmentation_step(params, state, image, crops.label, config, now, masks)
                else:
                    outcome = depth_step(params, state, image, crops.depth, config, now, step / options.steps)
                params, state, loss, score = outcome
                scores.append(score)
                seconds = time.monotonic() - started
                speed = len(scores) * options.batch / seconds
                row = (seconds, loss, score, speed, options.backbone_rate * factor, options.decoder_rate * factor)
                log.writerow([len(scores), *(f"{value:.6g}" for value in row)])
                file.flush()
                recent = sum(scores[-10:]) / len(scores[-10:])
                report(len(scores), options.steps, f"loss {loss:.4f}  {SCORES[options.task]} {recent:.3f}", speed, seconds)
    except RunError as error:
        raise RunError(f"stopped at step {len(scores) + 1}: {error}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted after step {len(scores)}: {options.folder} holds the weights so far") from None
    finally:
        if scores:
            save(options.folder / "weights.safetensors", params, config)
    return scores


def report(step: int, steps: int, measures: str, speed: float, seconds: float) -> None:
    """Show how far the run is: on a terminal in one line that is rewritten, elsewhere in some twenty lines."""
    minutes, left = divmod(round(seconds / step * (steps - step)), 60)
    text = f"step {step}/{steps}  {measures}  {speed:.1f} images/s  {minutes}:{left:02d} left"
    if sys.stdout.isatty():
        print(f"\r{text:80}", end="\n" if step == steps else "", flush=True)
    elif step * LINES // steps > (step - 1) * LINES // steps:
        print(text, flush=True)


# ---- the command line ----------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help lists the options)")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line. Raises UsageError for those that do not exist, do not fit, or do not go together."""
    parser = _Parser(prog="python -m reference.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="depth", help="what the model learns to predict (depth)")
    parser.add_argument("--steps", type=_whole(1), default=200, help="steps of the optimiser (200)")
    parser.add_argument("--batch", type=_whole(1), default=4, help="scenes per step (4)")
    parser.add_argument(
        "--crop", type=_whole(1), default=48, help=f"side of the random crops: a multiple of 16, up to {SIZE} (48)"
    )
    rates = ", ".join(f"{task}: {{}}" for task in RATES)
    for i, group in enumerate(("backbone", "decoder")):
        default = rates.format(*(f"{pair[i]:g}" for pair in RATES.values()))
        parser.add_argument(f"--{group}-rate", type=_rate, help=f"learning rate of the {group}'s parameters ({default})")
    parser.add_argument("--seed", type=_whole(0), default=0, help="seeds weights, order of the scenes, crops, dropout (0)")
    parser.add_argument(
        "--folder", type=Path, help="gets metrics.csv and weights.safetensors, replacing such (runs/reference-TASK)"
    )
    parser.add_argument("--scenes", type=_whole(1), default=8, help="rendered scenes learnt from (8)")
    parser.add_argument("--cache", type=Path, default=Path("cache/scenes"), help="folder of the rendered scenes (cache/scenes)")
    options = parser.parse_args(arguments)
    if options.crop % 16 or options.crop > SIZE:
        raise UsageError(f"--crop is {options.crop}: expected a multiple of 16, at most {SIZE}, the size of the scenes")
    if options.task == "segmentation" and options.batch == 1 and options.crop <= 32:
        raise UsageError(
            "--batch is 1: batch norm needs at least 2 where the coarsest map of a crop is one pixel (--crop 16 and 32)"
        )
    for i, group in enumerate(("backbone_rate", "decoder_rate")):
        if getattr(options, group) is None:
            setattr(options, group, RATES[options.task][i])
    if options.folder is None:
        options.folder = Path("runs") / f"reference-{options.task}"
    return options


def _whole(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} does not fit: expected a whole number of at least {least}")
        return int(text)

    return number


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} does not fit: expected a number of at least 0")
    return rate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; foreseeable trouble is one sentence on stderr."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        scenes = load_scenes(options.cache, options.scenes)
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--folder {options.folder} cannot be made: {error.strerror}") from None
        scores = train(options, scenes)
    except UsageError as error:
        return _complain(error, 2)
    except (RunError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt as error:
        return _complain(str(error) or "interrupted before the first step", 130)
    few = max(len(scores) // 10, 1)
    first, last = sum(scores[:few]) / few, sum(scores[-few:]) / few
    print(f"{SCORES[options.task]} {first:.3f} in the first tenth of the steps, {last:.3f} in the last")
    print(f"reference.load({str(options.folder / 'weights.safetensors')!r}) reads the weights")
    return 0


def _complain(sentence: object, status: int) -> int:
    print(f"\nerror: {sentence}" if status == 130 else f"error: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
