"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere (a log file, CI)."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress:
    """Shows step, loss, the last validation, images per second and the time left. A context manager.

    The time left extrapolates from the steps made so far, validations included.
    """

    def __init__(self, steps: int, metric: str, begun: int = 0) -> None:
        """`begun`: steps that an earlier process has made."""
        self.steps, self.metric, self.begun = steps, metric, begun
        self.console = Console()
        self.started = self.last_line = time.monotonic()
        self.score = ""
        self.bar = Progress(
            TextColumn("training"), BarColumn(), TextColumn("{task.fields[text]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=steps, text="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, step: int, loss: float, validation: float, images_per_second: float) -> None:
        """Report after `step` of the steps; `validation` is NaN where it was not measured."""
        now = time.monotonic()
        left = (now - self.started) / (step - self.begun) * (self.steps - step)
        if not math.isnan(validation):
            self.score = f"  {self.metric} {validation:.4f}"
        minutes, seconds = divmod(round(left), 60)
        text = f"{step}/{self.steps}  loss {loss:.4f}{self.score}  {images_per_second:.1f} images/s  {minutes}:{seconds:02d} left"
        self.bar.update(self.task, completed=step, text=text)
        if not self.console.is_terminal and (step == self.steps or now - self.last_line >= _SECONDS_BETWEEN_LINES):
            self.last_line = now
            print(f"step {text}", flush=True)
