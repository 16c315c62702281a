"""What `benchmarks.kernels` measures: every operation's sizes, dtypes and layouts, and the least that each must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks import kernel_problems, kernel_traffic
from benchmarks.kernel_problems import Case, Draw, Problem
from benchmarks.kernel_traffic import Work
from kernels import alignment, confusion, cross_entropy, fusion, reassemble

NARROW = ("float32", "float16", "bfloat16")
LAYOUTS = ("channels_first", "channels_last")


class Operation(NamedTuple):
    """How an operation's problems are made, the work of a case, its rungs, and its sizes: on a GPU, and on the host."""

    problem: Callable[[Case, Draw], Problem]
    work: Callable[[Case], Work]
    rungs: Callable[[str], int]
    sizes: list[dict[str, int]]
    small: list[dict[str, int]]
    dtypes: tuple[str, ...] = NARROW
    layouts: tuple[str, ...] = ("",)

    def cases(self, name: str, host: bool) -> list[Case]:
        """Every case: float32 first."""
        sizes = self.small if host else self.sizes
        return [
            Case(name, size, dtype, self.rungs(dtype), layout)
            for layout in self.layouts
            for size in sizes
            for dtype in self.dtypes
        ]


def _depth_work(case: Case) -> Work:
    return kernel_traffic.depth_loss(case.size["images"] * case.size["side"] ** 2, case.element)


def _cross_entropy_work(case: Case) -> Work:
    size = case.size
    logits = size["images"] * size["classes"] * size["side"] ** 2
    return kernel_traffic.cross_entropy(logits, size["images"] * size["labels"] ** 2, case.element, label=1)


def _upsample_work(case: Case) -> Work:
    planes = case.size["images"] * case.size["channels"]
    return kernel_traffic.upsample_add(planes * case.size["side"] ** 2, planes * case.size["out"] ** 2, case.element)


def _attention_work(case: Case) -> Work:
    size = case.size
    return kernel_traffic.attention(size["images"] * size["heads"], size["tokens"], size["tokens"], size["depth"], case.element)


def _read_work(case: Case) -> Work:
    return kernel_traffic.read_project(case.size["images"] * case.size["grid"] ** 2 * case.size["width"], case.element)


def _least_squares_work(case: Case) -> Work:
    return kernel_traffic.least_squares(case.size["images"] * case.size["side"] ** 2, case.element)


def _confusion_work(case: Case) -> Work:
    return kernel_traffic.confusion(case.size["images"] * case.size["side"] ** 2, case.element, case.size["classes"])


OPERATIONS = {
    "depth_loss": Operation(
        kernel_problems.depth_loss,
        _depth_work,
        lambda dtype: 2,
        [{"images": 16, "side": 384}, {"images": 128, "side": 384}],
        [{"images": 2, "side": 21}],
    ),
    "cross_entropy": Operation(
        kernel_problems.cross_entropy_loss,
        _cross_entropy_work,
        lambda dtype: cross_entropy.RUNGS,
        [{"images": 4, "classes": 150, "side": 240, "labels": 480}],
        [{"images": 2, "classes": 7, "side": 6, "labels": 13}],
    ),
    "upsample_add": Operation(
        kernel_problems.upsample_add,
        _upsample_work,
        lambda dtype: fusion.RUNGS,
        [{"images": 16, "channels": 256, "side": 96, "out": 192}],
        [{"images": 2, "channels": 8, "side": 6, "out": 12}],
        layouts=LAYOUTS,
    ),
    "attention": Operation(
        kernel_problems.attention_heads,
        _attention_work,
        lambda dtype: 2 if dtype == "float32" else 3,
        [{"images": 16, "heads": heads, "tokens": 577, "depth": 64} for heads in (12, 16)],
        [{"images": 1, "heads": 2, "tokens": 37, "depth": 64}],
    ),
    "read_project": Operation(
        kernel_problems.read_project,
        _read_work,
        lambda dtype: reassemble.RUNGS,
        [{"images": 16, "grid": 24, "width": 768}],
        [{"images": 2, "grid": 4, "width": 24}],
        layouts=LAYOUTS,
    ),
    "least_squares": Operation(
        kernel_problems.least_squares,
        _least_squares_work,
        lambda dtype: alignment.RUNGS,
        [{"images": 128, "side": 384}],
        [{"images": 2, "side": 21}],
        dtypes=("float32",),
    ),
    "confusion": Operation(
        kernel_problems.confusion_matrix,
        _confusion_work,
        lambda dtype: confusion.RUNGS,
        [{"images": 16, "side": 480, "classes": 150}],
        [{"images": 2, "side": 21, "classes": 7}],
        dtypes=("uint8", "int64"),
    ),
}


def rungs_of(case: Case) -> list[int]:
    """The rungs that can compute a case: channels last, there is no naive kernel."""
    return list(range(2 if case.layout == "channels_last" else 1, case.rungs + 1))
