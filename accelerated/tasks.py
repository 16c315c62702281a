"""The two things a DPT learns, as a training run sees them: what to compare with what, and by which number to judge.

A target is (N, H, W): metres for depth, 0 where unknown; class ids for segmentation. A prediction is (N, H, W) too: inverse
depth up to scale and shift, or class ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import accelerated
from accelerated import baselines, metrics, panels
from accelerated.data.scenes import CLASSES
from accelerated.losses import anchor_loss, correlation_loss, depth_loss, segmentation_loss

if TYPE_CHECKING:
    from accelerated import DPT, Segmentation
    from accelerated.data.scenes import SceneArrays
    from accelerated.recipe import Recipe


Total = Callable[[Tensor], Tensor]


def itself(sums: Tensor) -> Tensor:
    """The sums over all processes, where there is one."""
    return sums


class Task(Protocol):
    """What the training loop asks of a task."""

    metric: ClassVar[str]  # the number that judges
    smaller_is_better: ClassVar[bool]

    def create_model(self) -> DPT:
        """Return a model with random weights. Raises ValueError for a configuration that does not exist."""

    def targets(self, scenes: SceneArrays) -> Tensor:
        """Return what the model should learn from `scenes`, (N, H, W)."""

    def loss(self, output: Tensor | Segmentation, target: Tensor, progress: float, total: Total = itself) -> Tensor:
        """Return a scalar to minimise; `progress` is the share of the steps already made.

        `total` adds up what several processes hold of the batch, for what is no mean over `count`.
        """

    def count(self, target: Tensor) -> Tensor:
        """Return the scalar by which `loss` divides for these targets (B, H, W): what it is a mean over."""

    def prediction(self, output: Tensor | Segmentation) -> Tensor:
        """Return (B, H, W) from what the model returns in evaluation."""

    def score(self, prediction: Tensor, target: Tensor) -> float:
        """Return `metric` of predictions for targets; both (N, H, W), on the CPU."""

    def baselines(self, target: Tensor) -> Mapping[str, Tensor]:
        """Return image-independent predictions (H, W) learnt from the training targets; the first is the simplest."""

    def best(self, scores: Mapping[str, float]) -> str:
        """Return the name of the baseline that the recipe's bar is measured against."""

    def panels(self, images: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> Figure:
        """Draw image | truth | prediction | error for scenes (N, H, W, 3), (N, H, W), (N, H, W)."""


class Depth:
    """Inverse depth up to scale and shift, by the paper's loss (section 4)."""

    metric: ClassVar[str] = "AbsRel"
    smaller_is_better: ClassVar[bool] = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def create_model(self) -> DPT:
        return accelerated.create_model(self.recipe.model, task="depth")

    def targets(self, scenes: SceneArrays) -> Tensor:
        return torch.tensor(scenes.depth)

    def loss(self, output: Tensor | Segmentation, target: Tensor, progress: float, total: Total = itself) -> Tensor:
        """The correlation's loss, which blends into the paper's, at first untrimmed.

        From random weights, the paper's loss alone may never leave the image-independent solution: it grows the prediction's
        scale, which it cannot see, and with it shrinks its own gradient.
        """
        assert isinstance(output, Tensor)
        recipe, (inverse, known) = self.recipe, inverse_depth(target)
        begun = (progress - recipe.correlation) / recipe.correlation if recipe.correlation else 1.0
        paper = min(max(begun, 0.0), 1.0)
        kept = 1.0 if progress < recipe.untrimmed else recipe.kept
        loss = recipe.anchor * anchor_loss(output, known, total) if recipe.anchor else output.new_zeros(())
        if paper < 1:
            loss = loss + (1 - paper) * correlation_loss(output, inverse, known)
        if paper > 0:
            loss = loss + paper * depth_loss(output, inverse, known, kept=kept, gradient_weight=recipe.gradient_weight)
        return loss

    def count(self, target: Tensor) -> Tensor:
        """All images, those without known depth included."""
        return torch.tensor(len(target), device=target.device)

    def prediction(self, output: Tensor | Segmentation) -> Tensor:
        assert isinstance(output, Tensor)
        return output.float()

    def score(self, prediction: Tensor, target: Tensor) -> float:
        errors = [metrics.absolute_relative_error(p[None], z[None]) for p, z in zip(prediction, target, strict=True)]
        return float(torch.cat(errors).nanmean())

    def baselines(self, target: Tensor) -> Mapping[str, Tensor]:
        return baselines.constant_depths(*inverse_depth(target))

    def best(self, scores: Mapping[str, float]) -> str:
        return min(scores, key=scores.__getitem__)

    def panels(self, images: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> Figure:
        return panels.depth_panels(images, target, prediction)


class Segment:
    """The class of every pixel, by cross-entropy with an auxiliary head (section 5.2)."""

    metric: ClassVar[str] = "mIoU"
    smaller_is_better: ClassVar[bool] = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.num_classes = len(CLASSES)

    def create_model(self) -> DPT:
        return accelerated.create_model(self.recipe.model, task="segmentation", num_classes=self.num_classes)

    def targets(self, scenes: SceneArrays) -> Tensor:
        return torch.tensor(scenes.label)

    def loss(self, output: Tensor | Segmentation, target: Tensor, progress: float, total: Total = itself) -> Tensor:
        assert not isinstance(output, Tensor)
        return segmentation_loss(output.logits, output.auxiliary, target, self.recipe.auxiliary_weight)

    def count(self, target: Tensor) -> Tensor:
        """The labelled pixels."""
        return (target != 255).sum()

    def prediction(self, output: Tensor | Segmentation) -> Tensor:
        assert not isinstance(output, Tensor)
        return output.logits.argmax(1)

    def score(self, prediction: Tensor, target: Tensor) -> float:
        return metrics.mean_intersection_over_union(metrics.confusion(prediction, target, self.num_classes))

    def baselines(self, target: Tensor) -> Mapping[str, Tensor]:
        return baselines.constant_labels(target, self.num_classes)

    def best(self, scores: Mapping[str, float]) -> str:
        return "commonest class"

    def panels(self, images: np.ndarray, target: np.ndarray, prediction: np.ndarray) -> Figure:
        return panels.segmentation_panels(images, target, prediction, CLASSES)


TASKS: Mapping[str, Callable[[Recipe], Task]] = {"depth": Depth, "segmentation": Segment}


def inverse_depth(depth: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / depth (0 where unknown) and where it is known, bool."""
    known = depth > 0
    return torch.where(known, 1 / torch.where(known, depth, 1.0), 0.0), known
