"""The folder of one training run: what is in it, and how it gets there without ever holding half a file.

- recipe.yaml: every key of the recipe as it ran
- weights.safetensors: the averaged weights with the configuration, replaced at every validation
- metrics.csv: one row per report: step, seconds, loss, validation, images_per_second and both learning rates
- events.out.tfevents.*: the same for TensorBoard
- learning_curve.png, panels.png
- snapshots/: the newest states from which an unfinished run goes on
- results.json: the comparison; written last, so a folder that has it holds a finished run
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

import accelerated
from accelerated.recipe import Recipe, RecipeError
from accelerated.snapshots import Snapshots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from accelerated import DPT


class RunError(RuntimeError):
    """A run that cannot go on; the message is one sentence, `status` what the process exits with."""

    status = 1


COLUMNS = ("step", "seconds", "loss", "validation", "images_per_second", "backbone_learning_rate", "decoder_learning_rate")


class RunFolder:
    """Paths and files of a run. `path` need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "weights.safetensors"
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.csv"
        self.results = path / "results.json"
        self.curve = path / "learning_curve.png"
        self.panels = path / "panels.png"
        self.snapshots = Snapshots(path / "snapshots")

    def holds(self, recipe: Recipe) -> bool:
        """Return whether a run of exactly this recipe is here, finished or not."""
        try:
            return yaml.safe_load(self.recipe.read_text(encoding="utf-8")) == recipe.model_dump(mode="json")
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            return False

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """Return the results of a finished run of exactly this recipe, or None."""
        if not self.holds(recipe) or not self.weights.is_file():
            return None
        try:
            return json.loads(self.results.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def refuse_another(self, recipe: Recipe) -> None:
        """Raise RecipeError where a run of another recipe is here, or the snapshots of one whose recipe is gone."""
        if self.recipe.exists() and not self.holds(recipe):
            raise RecipeError(f"{self.path} holds a run of another recipe: give this one its own --name, or --overwrite true")
        if not self.recipe.exists() and self.snapshots.steps():
            raise RecipeError(
                f"{self.path} holds snapshots of a run, but not its {self.recipe.name}: put that back, give this one its own "
                "--name, or --overwrite true"
            )

    def start(self, recipe: Recipe) -> None:
        """Make the folder ready for a new run of `recipe`: a run's old files go, any other file stays.

        Raises OSError where it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.snapshots.clear()
        own = (self.results, self.weights, self.recipe, self.metrics, self.curve, self.panels)
        for file in (*own, *self.path.glob("events.out.tfevents.*")):
            file.unlink(missing_ok=True)
        content = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        self.replace(self.recipe, lambda path: path.write_text(content, encoding="utf-8"))

    def replace(self, target: Path, write: Callable[[Path], object]) -> None:
        """Let `write` make a file beside `target`, then put it in its place at once: a kill leaves the old one or the new one."""
        beside = target.with_name(f".partial-{target.name}")
        try:
            write(beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)

    def save_weights(self, model: DPT) -> None:
        """Replace the run's weights by those of `model`; the file is complete at every moment."""
        accelerated.save(model, self.weights)

    def save_figure(self, path: Path, figure: Figure) -> None:
        """Write a figure as PNG."""
        self.replace(path, lambda beside: figure.savefig(beside, format="png", dpi=110))

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        content = json.dumps(results, indent=2) + "\n"
        self.replace(self.results, lambda path: path.write_text(content, encoding="utf-8"))


class Log:
    """Writes rows of numbers to metrics.csv and TensorBoard as they come, and keeps them."""

    def __init__(self, folder: RunFolder, rows: Sequence[dict[str, float]] = (), begun: int = 0) -> None:
        """`rows`: those of the `begun` steps that an interrupted run had made; what it wrote after them is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        self.rows: list[dict[str, float]] = []
        self.file = folder.metrics.open("w", newline="", encoding="utf-8")
        self.csv = csv.DictWriter(self.file, COLUMNS)
        self.csv.writeheader()
        for row in rows:
            self._write(row)
        self.tensorboard = SummaryWriter(str(folder.path), purge_step=begun + 1 if begun else None)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.file.close()
        self.tensorboard.close()

    def row(self, *row: float) -> None:
        """Add one row of COLUMNS; `validation` is NaN where it was not measured."""
        values = dict(zip(COLUMNS, row, strict=True))
        self._write(values)
        for key in COLUMNS[2:]:
            if not math.isnan(values[key]):
                self.tensorboard.add_scalar(key, values[key], int(values["step"]))

    def _write(self, values: dict[str, float]) -> None:
        self.rows.append(values)
        self.csv.writerow({key: "" if math.isnan(value) else f"{value:.6g}" for key, value in values.items()})
        self.file.flush()
