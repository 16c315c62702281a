"""Is the trained model any good? Its score beside those of predictors that do not look at the image.

Two kinds: maps learnt from the training set alone (`accelerated.baselines`), and the model itself shown another scene's image,
which keeps everything it knows except what it sees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from accelerated.recipe import Recipe
from accelerated.tasks import Task

PERMUTED = "the model, other scenes' images"


class Promise(NamedTuple):
    """One bar of the recipe: the model's score divided by another, and how large (or small) that may be."""

    against: str
    ratio: float
    bound: float
    kept: bool


class Comparison(NamedTuple):
    """Scores on the held-out scenes by the task's metric, and what of the recipe's promises was kept."""

    metric: str
    model: float
    others: dict[str, float]
    promises: list[Promise]

    @property
    def met(self) -> bool:
        return all(promise.kept for promise in self.promises)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        promises = [promise._asdict() for promise in self.promises]
        return {"metric": self.metric, "model": self.model, **self._asdict(), "promises": promises, "met": self.met}


def compare(task: Task, recipe: Recipe, prediction: Tensor, held_out: Tensor, training: Tensor) -> Comparison:
    """Score the held-out `prediction` (N, H, W), the same in another order, and every baseline learnt from `training`."""
    model = task.score(prediction, held_out)
    scores = {name: task.score(fixed.expand_as(held_out), held_out) for name, fixed in task.baselines(training).items()}
    permuted = task.score(prediction[derangement(len(prediction), recipe.seed)], held_out)
    promises = []
    bars = ((task.best(scores), scores[task.best(scores)], recipe.baseline_bar), (PERMUTED, permuted, recipe.permuted_bar))
    for name, score, bound in bars:
        if bound is not None:
            ratio = model / score
            promises.append(Promise(name, ratio, bound, ratio <= bound if task.smaller_is_better else ratio >= bound))
    return Comparison(task.metric, model, {**scores, PERMUTED: permuted}, promises)


def derangement(count: int, seed: int) -> Tensor:
    """Return a random permutation of `count` >= 2 things, (count,), that leaves none in its place: one long cycle."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result
