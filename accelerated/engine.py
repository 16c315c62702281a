"""One training run, from a recipe to a folder (paper, sections 4 and 5, in miniature). `train` reads as the recipe does.

Images are kept as (N, H, W, 3) uint8 and become (B, 3, H, W) in channels-last memory when a batch is cut out of them; targets are
(N, H, W) as in `accelerated.tasks`. All scenes stay in memory, on the device that trains.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from accelerated.augment import Windows, color_factors, cut, jitter_colors, normalize, random_windows
from accelerated.comparison import compare
from accelerated.data.scenes import HELD_OUT_SEED, TRAIN_SEED, load_scenes
from accelerated.device import Device, choose_device, keep_freed_memory
from accelerated.dpt import DPT
from accelerated.optim import parameter_groups
from accelerated.panels import learning_curve
from accelerated.parallel import World
from accelerated.progress import TrainingProgress
from accelerated.recipe import Recipe, RecipeError
from accelerated.run_folder import Log, RunError, RunFolder
from accelerated.signals import StopSignal
from accelerated.snapshots import Snapshot
from accelerated.tasks import TASKS, Task

PANELS = 6  # held-out scenes drawn: the first ones
REPORTS = 200  # rows of metrics.csv, about
CHUNK = 32  # images predicted at once


class Scenes(NamedTuple):
    """Scenes of one split, on the device."""

    image: Tensor  # (N, H, W, 3) uint8
    target: Tensor  # (N, H, W)


class Run(NamedTuple):
    """What every part of a run goes by."""

    recipe: Recipe
    task: Task
    device: Device
    folder: RunFolder
    world: World


class Stopped(RunError):
    """A run that was told to stop, and has saved what it needs to go on."""

    def __init__(self, step: int, steps: int, by: signal.Signals) -> None:
        super().__init__(f"stopped after step {step} of {steps} by {by.name}, all saved: the same command goes on from there")
        self.status = 128 + by


def train(
    recipe: Recipe, folder: RunFolder, cache: Path, threads: int, resume: bool = True, snapshot_seconds: float = math.inf
) -> dict[str, Any]:
    """Carry out `recipe` and return its results, which `folder` then holds with everything else.

    `cache` is the folder of the rendered scenes, `threads` as in `choose_device`. `resume`: go on from the newest whole snapshot
    of exactly this recipe, if the folder has one; on the CPU that ends with the same bits as a run that nothing interrupted. A
    snapshot is taken every `snapshot_seconds`, after the last step, and where SIGTERM or SIGINT ask to stop, by `Stopped`.

    Raises RecipeError for a recipe that cannot be carried out, RunError where the loss or its gradient is not finite (the folder
    keeps the weights from before that step), OSError for files that cannot be written.
    """
    keep_freed_memory()
    device = choose_device(threads)
    with World(device.device) as world:
        return carry_out(Run(recipe, TASKS[recipe.task](recipe), device, folder, world), cache, resume, snapshot_seconds)


def carry_out(run: Run, cache: Path, resume: bool, snapshot_seconds: float) -> dict[str, Any]:
    """Do what `train` promises, in the processes of `run.world`, of which the first writes the folder."""
    recipe, folder, world = run.recipe, run.folder, run.world
    for key in ("batch_size", "validation_scenes", "held_out_scenes"):
        if (count := getattr(recipe, key)) < world.size:
            raise RecipeError(f"{key} = {count} does not fit {world.size} processes: expected at least one scene each")
    torch.manual_seed(recipe.seed)
    model = build_model(run)
    snapshot = None
    if world.first:
        if resume and folder.holds(recipe):
            snapshot = folder.snapshots.newest(lambda words: print(f"warning: {words}"))
        if snapshot is None:
            folder.start(recipe)
    snapshot = world.from_first(snapshot)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if world.first:
        where = run.device.words if world.size == 1 else f"{world.size} processes, each {run.device.words}"
        print(f"{recipe.task}: {recipe.model}, {parameters / 1e6:.1f} M parameters; {where}; into {folder.path}", flush=True)

    training, validation, held_out = load_splits(run, cache)
    average, rows = optimize(run, model, training, validation, snapshot, snapshot_seconds)

    exactly = run._replace(device=run.device._replace(dtype=torch.float32))
    prediction = predict(exactly, average, held_out.image)
    comparison = compare(run.task, recipe, prediction, held_out.target.cpu(), training.target.cpu())
    results = {**comparison.as_dict(), "parameters": parameters, "device": run.device.words, "torch": torch.__version__}
    if world.first:
        folder.save_weights(average)
        first = (held_out.image[:PANELS], held_out.target[:PANELS], prediction[:PANELS])
        folder.save_figure(folder.panels, run.task.panels(*(tensor.cpu().numpy() for tensor in first)))
        folder.save_figure(folder.curve, learning_curve(rows, comparison.metric, comparison.others))
        folder.write_results(results)
        folder.snapshots.clear()
    world.from_first(None)  # nobody leaves before the folder is complete
    return results


class Training:
    """What the steps of a run change: the weights and their average, the optimizer, the schedule, and everything random.

    `state` and `load` hold all of it, so that a run goes on as if nothing had interrupted it.
    """

    def __init__(self, run: Run, model: DPT, scenes: Scenes) -> None:
        recipe = run.recipe
        self.run, self.model, self.scenes = run, model, scenes
        self.replica = run.world.replicated(model)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, recipe))
        self.average = copy.deepcopy(model).requires_grad_(False)
        self._averaged, self._current = list(self.average.state_dict().values()), list(model.state_dict().values())
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = Order(len(scenes.image), recipe.batch_size, self.generator)

    def step(self, step: int) -> float:
        """Take the step of this number, from 1 on, and return its loss.

        Raises RunError, with nothing changed, where the loss or its gradient is not finite.
        """
        run, recipe = self.run, self.run.recipe
        torch.manual_seed(dropout_seed(recipe.seed, step, run.world.rank))
        indices = next(self.order)
        image, target = self.augmented(indices, crop_at(step - 1, recipe))
        self.optimizer.zero_grad()
        value = self.backward(image, target, (step - 1) / recipe.steps)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        if not math.isfinite(value) or not math.isfinite(norm.item()):
            if run.world.first:
                run.folder.save_weights(self.average)
            raise RunError(
                f"stopped at step {step}: the loss is {value:g} and the norm of its gradient {norm.item():g}, on "
                f"training scenes {indices.tolist()}; {run.folder.weights} holds the weights from before that step"
            )
        self.optimizer.step()
        self.schedule.step()
        move_average(self._averaged, self._current, step, recipe.average_decay)
        return value

    def augmented(self, indices: Tensor, crop: int) -> tuple[Tensor, Tensor]:
        """Return this process's share of a batch: image (b, 3, crop, crop) normalised, target (b, crop, crop).

        Every process draws the random numbers of the whole batch, so a scene is cut alike however many there are.
        """
        recipe, config, share = self.run.recipe, self.model.config, self.run.world.share
        _, height, width = self.scenes.target.shape
        drawn = random_windows(indices, (height, width), crop, recipe.smallest_window, recipe.flip, self.generator)
        brightness, contrast = (share(factor) for factor in color_factors(len(indices), recipe.color_jitter, self.generator))
        windows = Windows(*(share(part) for part in drawn))
        image = cut(self.scenes.image, windows).permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 255
        image = jitter_colors(image, brightness, contrast)
        return normalize(image, config["image_mean"], config["image_std"]), cut(self.scenes.target, windows)

    def backward(self, image: Tensor, target: Tensor, progress: float) -> float:
        """Add the gradient of the whole batch's loss to every .grad; return that loss. This process holds a share of the batch.

        What the loss is divided by, images or labelled pixels, is counted over all processes and all parts of `accumulation`.
        """
        world, task = self.run.world, self.run.task
        parts = list(
            zip(*(tensor.split(-(-len(image) // self.run.recipe.accumulation)) for tensor in (image, target)), strict=True)
        )
        total = world.sum(task.count(target).double()).clamp(min=1)
        loss = torch.zeros((), dtype=torch.float64, device=image.device)
        for k, (images, targets) in enumerate(parts, start=1):
            last = k == len(parts)  # only then do the processes exchange gradients
            with self.replica.no_sync() if isinstance(self.replica, DistributedDataParallel) and not last else nullcontext():
                with self.run.device.autocast():
                    output = self.replica(images)
                mean = task.loss(output, targets, progress, world.total)
                share = (task.count(targets) / total).to(mean.dtype)
                (mean * (share * world.size)).backward()  # DistributedDataParallel takes the mean of the gradients
            loss += mean.detach() * share
        return world.sum(loss).item()

    def state(self) -> dict[str, Any]:
        """Return tensors and plain data alone, for a snapshot."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "queue": self.order.queue,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned. Raises whatever the parts raise where it is not of this program and model."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.order.queue = state["queue"]


def optimize(
    run: Run,
    model: DPT,
    scenes: Scenes,
    validation: Scenes,
    snapshot: Snapshot | None = None,
    snapshot_seconds: float = math.inf,
) -> tuple[DPT, list[dict[str, float]]]:
    """Take the recipe's steps, those after `snapshot` if there is one; snapshots are taken as `train` says.

    Returns the running average of the weights, saved at every validation, and the log's rows. Raises RunError for a snapshot that
    another version of this program has taken.
    """
    recipe, task, training = run.recipe, run.task, Training(run, model, scenes)
    begun, losses, rows, seconds = resumed(training, snapshot)
    last = saved = time.monotonic()
    started = last - seconds
    with ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if run.world.first:
            log = stack.enter_context(Log(run.folder, rows, begun))
            progress = stack.enter_context(TrainingProgress(recipe.steps, task.metric, begun))
            rows = log.rows
        for step in range(begun + 1, recipe.steps + 1):
            losses.append(training.step(step))
            validates = is_mark(step, recipe.steps, recipe.validations)
            if validates or is_mark(step, recipe.steps, REPORTS):
                now = time.monotonic()
                images_per_second, mean_loss = len(losses) * recipe.batch_size / (now - last), sum(losses) / len(losses)
                score = math.nan
                if validates:
                    seen = scaled(validation, crop_at(step - 1, recipe))
                    score = task.score(predict(run, training.average, seen.image), seen.target.cpu())
                backbone_rate, decoder_rate = (float(group["lr"]) for group in training.optimizer.param_groups)
                if run.world.first:
                    if validates:
                        run.folder.save_weights(training.average)
                    log.row(step, now - started, mean_loss, score, images_per_second, backbone_rate, decoder_rate)
                    progress.update(step, mean_loss, score, images_per_second)
                losses, last = [], time.monotonic()
            received = run.world.largest(stop.received or 0)
            due = received or step == recipe.steps or time.monotonic() - saved >= snapshot_seconds
            if due and run.world.first:
                shown = {"losses": losses, "rows": rows, "seconds": time.monotonic() - started}
                run.folder.snapshots.save(step, training.state() | shown)
                saved = time.monotonic()
            if received:
                raise Stopped(step, recipe.steps, signal.Signals(received))
    return training.average, rows


def resumed(training: Training, snapshot: Snapshot | None) -> tuple[int, list[float], list[dict[str, float]], float]:
    """Bring `training` where `snapshot` was: its step, the losses not yet reported, the log's rows and the seconds until then."""
    if snapshot is None:
        return 0, [], [], 0.0
    step, state = snapshot
    try:
        training.load(state)
        shown = state["losses"], state["rows"], state["seconds"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise RunError(
            f"the snapshot of step {step} in {training.run.folder.snapshots.folder} was taken by another version of this program "
            f"({type(error).__name__}: {reason}): go on with that version, or begin anew with --resume never"
        ) from error
    if training.run.world.first:
        print(f"going on after step {step} of {training.run.recipe.steps}", flush=True)
    return step, *shown


def build_model(run: Run) -> DPT:
    """Return the recipe's model, new, in training mode, on the device, its convolutions' weights channels last.

    Raises RecipeError where there is no such model, or where the crop or the size of the scenes do not fit it.
    """
    recipe = run.recipe
    try:
        model = run.task.create_model()
    except ValueError as error:
        raise RecipeError(f"model = {recipe.model!r} does not fit: {error}") from error
    for key, value in (("size", recipe.size), *(("crops", crop) for crop in recipe.crops)):
        # At a grid of one patch there is nothing to attend to, and oneDNN's strided bfloat16 convolution of a single pixel has a
        # weight gradient of uninitialised memory.
        if value % model.patch_size or value < 2 * model.patch_size:
            raise RecipeError(
                f"{key} = {value} does not fit: expected a multiple of the patch size, {model.patch_size}, and at least twice it"
            )
    model.to(run.device.device)
    model.to(memory_format=torch.channels_last)
    if run.world.size > 1 and run.device.device.type == "cuda":  # PyTorch has it for GPUs alone
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def load_splits(run: Run, cache: Path) -> tuple[Scenes, Scenes, Scenes]:
    """Render or reuse the scenes: those learnt from, those of the same seed that validate, and the held-out ones.

    They are copied out of the cache's files, which are mapped: a file that vanishes during the run must not end it. What has to
    be rendered, the first process renders.
    """
    recipe, task, device = run.recipe, run.task, run.device.device
    if not run.world.first:
        run.world.from_first(None)
    count = recipe.training_scenes
    seen = load_scenes(TRAIN_SEED, count + recipe.validation_scenes, size=recipe.size, cache=cache)
    unseen = load_scenes(HELD_OUT_SEED, recipe.held_out_scenes, size=recipe.size, cache=cache)
    if run.world.first:
        run.world.from_first(None)
    image, target = torch.tensor(seen.image, device=device), task.targets(seen).to(device)
    held_out = Scenes(torch.tensor(unseen.image, device=device), task.targets(unseen).to(device))
    return Scenes(image[:count], target[:count]), Scenes(image[count:], target[count:]), held_out


def make_optimizer(model: DPT, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the recipe's two learning rates."""
    groups = parameter_groups(model, recipe.backbone_learning_rate, recipe.decoder_learning_rate)
    return torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """By what both learning rates are multiplied at `step`, counted from 0: up linearly, then down linearly to 0."""
    warmup = round(recipe.warmup * recipe.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (step - warmup) / max(recipe.steps - warmup, 1)


def move_average(averaged: list[Tensor], current: list[Tensor], step: int, decay: float) -> None:
    """Move a running average of tensors towards their current values, in place.

    After `step` steps it remembers min(decay, (1 + step) / (10 + step)) of itself: little of the random beginning.
    """
    torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + step) / (10 + step)))


class Order(Iterator[Tensor]):
    """Yields the indices (batch_size,) of a step's scenes, without end: each pass over `count` scenes in an order of its own.

    What it yields next depends on `queue`, the rest of the passes drawn so far, and on the generator alone.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        self.count, self.batch_size, self.generator = count, batch_size, generator
        self.queue = torch.empty(0, dtype=torch.long)

    def __next__(self) -> Tensor:
        while len(self.queue) < self.batch_size:
            self.queue = torch.cat([self.queue, torch.randperm(self.count, generator=self.generator)])
        chosen, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :].clone()
        return chosen


def crop_at(step: int, recipe: Recipe) -> int:
    """The side, in pixels, to which windows are scaled at `step`, counted from 0."""
    ends = list(itertools.accumulate(recipe.crop_shares))
    stage = bisect.bisect(ends, (step + 0.5) / recipe.steps * ends[-1])
    return recipe.crops[min(stage, len(recipe.crops) - 1)]


def scaled(scenes: Scenes, side: int) -> Scenes:
    """The whole of every scene, whose shorter side is cut to, at `side` x `side` pixels: what a model in training is used to."""
    count, height, width = scenes.target.shape
    windows = random_windows(torch.arange(count), (height, width), side, 1.0, False, torch.Generator())
    return Scenes(cut(scenes.image, windows), cut(scenes.target, windows))


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What torch's own generator is seeded with before a step, so that dropout depends on nothing that came before it."""
    return ((seed * 2**32 + step) * 2**16 + rank) % 2**63


def is_mark(step: int, steps: int, marks: int) -> bool:
    """Whether `step`, from 1 to `steps`, is one of `marks` evenly spread ones, of which the last step is always one."""
    marks = min(marks, steps)
    return step * marks // steps > (step - 1) * marks // steps


@torch.inference_mode()
def predict(run: Run, model: DPT, image: Tensor) -> Tensor:
    """Return the task's predictions (N, H, W), on the CPU, for images (N, H, W, 3) uint8; the model's mode is kept.

    Each process predicts its share; all get all.
    """
    training = model.training
    model.eval()
    parts = []
    mean, std = model.config["image_mean"], model.config["image_std"]
    for chunk in run.world.share(image).split(CHUNK):
        batch = normalize(chunk.permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 255, mean, std)
        with run.device.autocast():
            parts.append(run.task.prediction(model(batch)).cpu())
    model.train(training)
    return run.world.joined(torch.cat(parts), len(image))
