"""Pictures of a training run: its learning curve, and panels image | truth | prediction | error.

Arrays are NumPy: images (N, H, W, 3) uint8, targets and predictions (N, H, W) as in `accelerated.tasks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter

from accelerated.images import class_colors
from accelerated.metrics import aligned_depth

LARGEST_ERROR = 0.5  # relative; the brightest colour of the error panels
_UNKNOWN = "0.6"  # grey


def depth_panels(images: np.ndarray, depth: np.ndarray, prediction: np.ndarray) -> Figure:
    """Draw one row per scene: image, true inverse depth, prediction aligned to it, relative error in depth."""
    aligned = aligned_depth(torch.from_numpy(prediction), torch.from_numpy(depth)).numpy()
    titles = ["image", "true inverse depth", "prediction, aligned", f"|z - z*| / z*, 0 to {LARGEST_ERROR}"]
    figure, axes = _grid(len(images), titles)
    for row, image, truth, z in zip(axes, images, depth, aligned, strict=True):
        known = truth > 0
        inverse = np.where(known, 1 / np.where(known, truth, 1), np.nan)
        low, high = (np.nanpercentile(inverse, [1, 99])) if known.any() else (0.0, 1.0)
        error = np.where(known, np.abs(z - truth) / np.where(known, truth, 1), np.nan)
        row[0].imshow(image)
        row[1].imshow(inverse, cmap="inferno", vmin=low, vmax=high)
        row[2].imshow(1 / np.maximum(z, 1e-12), cmap="inferno", vmin=low, vmax=high)
        row[3].imshow(error, cmap="viridis", vmin=0, vmax=LARGEST_ERROR)
        row[3].set_xlabel(f"AbsRel {np.nanmean(error):.3f}" if known.any() else "no known depth", fontsize=8)
    return figure


def segmentation_panels(images: np.ndarray, label: np.ndarray, prediction: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw one row per scene: image, true classes, predicted classes, and the image with wrong pixels in red."""
    colors = class_colors(len(classes))
    figure, axes = _grid(len(images), ["image", "true class", "prediction", "wrong pixels"])
    for row, image, truth, predicted in zip(axes, images, label, prediction, strict=True):
        counted = truth != 255
        wrong = counted & (predicted != truth)
        row[0].imshow(image)
        row[1].imshow(np.where(counted[..., None], colors[np.where(counted, truth, 0)], 153))
        row[2].imshow(colors[predicted])
        row[3].imshow(np.where(wrong[..., None], np.array([220, 30, 30]), image // 2 + 127))
        row[3].set_xlabel(f"{wrong.sum() / max(counted.sum(), 1):.1%} wrong", fontsize=8)
    handles = [Patch(color=color / 255, label=name) for color, name in zip(colors, classes, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    return figure


def learning_curve(rows: Sequence[Mapping[str, float]], metric: str, references: Mapping[str, float]) -> Figure:
    """Draw the training loss and the validation score over the steps, beside horizontal lines for `references`.

    `rows` are those of metrics.csv: each has `step` and `loss`, and `validation` where it was measured.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    measured = [row for row in rows if not np.isnan(row["validation"])]
    right.plot([row["step"] for row in measured], [row["validation"] for row in measured], marker=".", label="validation scenes")
    for index, (name, score) in enumerate(references.items()):
        right.axhline(score, color=f"C{index + 1}", linestyle="--", linewidth=1, label=name)
    right.set(xlabel="step", ylabel=metric, ylim=(0, None))
    right.legend(fontsize=7)
    left.yaxis.set_minor_formatter(FormatStrFormatter("%.2g"))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def _grid(rows: int, titles: Sequence[str]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(1.9 * len(titles), 1.95 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(titles), squeeze=False)
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[], facecolor=_UNKNOWN)
    return figure, axes
