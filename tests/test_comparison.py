"""How a trained model is judged: its score, and the scores of predictors that do not look at the image, against plain NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accelerated.baselines import constant_depths, constant_labels
from accelerated.comparison import PERMUTED, compare, derangement
from accelerated.metrics import absolute_relative_error, aligned_depth, confusion, mean_intersection_over_union
from accelerated.recipe import Recipe
from accelerated.tasks import Depth, inverse_depth
from tests.equality import assert_same

SEEDS = st.integers(0, 2**32 - 1)


def random_depth(rng: np.random.Generator, count: int = 5, size: tuple[int, int] = (6, 7), unknown: float = 0.3) -> np.ndarray:
    """Metres (count, *size), some of them 0, unknown; every image knows some."""
    depth = rng.uniform(0.5, 20, (count, *size)) * (rng.random((count, *size)) >= unknown)
    depth[:, 0, :2] = rng.uniform(0.5, 20, (count, 2))
    return depth


def absrel_directly(prediction: np.ndarray, depth: np.ndarray) -> float:
    """AbsRel of one image, by NumPy's own least squares."""
    z, p = depth[depth > 0], prediction[depth > 0]
    (scale, shift), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), 1 / z, rcond=None)
    inverse = scale * p + shift
    aligned = np.where(inverse > 1 / z.max(), 1 / np.where(inverse > 0, inverse, 1), z.max())
    return float(np.mean(np.abs(aligned - z) / z))


@given(seed=SEEDS)
def test_absolute_relative_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    depth, prediction = random_depth(rng), rng.random((5, 6, 7))
    expected = np.array([absrel_directly(p, z) for p, z in zip(prediction, depth, strict=True)])
    assert_same(absolute_relative_error(torch.tensor(prediction), torch.tensor(depth)).numpy(), expected, rtol=1e-9)


@given(seed=SEEDS, scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_the_error_ignores_scale_and_shift_and_is_zero_for_the_truth(seed: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    depth = torch.tensor(random_depth(rng))
    inverse, known = inverse_depth(depth)
    affine = scale * inverse + shift
    assert absolute_relative_error(affine, depth).max() < 1e-9
    assert_same(torch.where(known, aligned_depth(affine, depth), 0.0).numpy(), depth.numpy(), rtol=1e-9)
    prediction = torch.tensor(rng.random(depth.shape))
    before, after = (absolute_relative_error(p, depth) for p in (prediction, scale * prediction + shift))
    assert_same(after.numpy(), before.numpy(), rtol=1e-6)


def test_an_image_without_known_depth_counts_for_nothing() -> None:
    depth = torch.tensor(random_depth(np.random.default_rng(0)))
    prediction = torch.rand(depth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    more = torch.cat([depth, torch.zeros_like(depth[:1])])
    task = Depth(Recipe())
    assert absolute_relative_error(prediction[:1], more[-1:]).isnan().all()
    assert (aligned_depth(prediction[:1], more[-1:]) == 0).all()
    assert task.score(torch.cat([prediction, prediction[:1]]), more) == task.score(prediction, depth)


@given(seed=SEEDS, num_classes=st.integers(1, 5))
def test_confusion_and_mean_intersection_over_union(seed: int, num_classes: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(num_classes, size=(3, 4, 5)).astype(np.uint8)
    prediction = rng.integers(num_classes, size=label.shape)
    label[0, 0, 0] = 255
    counts = confusion(torch.tensor(prediction), torch.tensor(label), num_classes)
    expected = [[((label == i) & (prediction == j)).sum() for j in range(num_classes)] for i in range(num_classes)]
    assert counts.tolist() == expected
    ious = []
    for k in range(num_classes):
        truth, predicted = label == k, (prediction == k) & (label != 255)
        if (truth | predicted).any():
            ious.append((truth & predicted).sum() / (truth | predicted).sum())
    assert mean_intersection_over_union(counts) == pytest.approx(np.mean(ious), rel=1e-12)


def test_confusion_names_a_value_that_is_no_class() -> None:
    label = torch.tensor([[[0, 1], [255, 2]]])
    with pytest.raises(ValueError, match="the label holds 2: expected a class from 0 to 1"):
        confusion(label % 2, label, 2)
    with pytest.raises(ValueError, match="the prediction holds 3: expected a class from 0 to 2"):
        confusion(torch.full_like(label, 3), label, 3)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 1\): expected \(1, 2, 2\)"):
        confusion(label[:, :, :1], label, 3)


@given(seed=SEEDS, count=st.integers(1, 6))
def test_depth_baselines(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    depth = random_depth(rng, count)
    depth[:, 5, 6] = 0  # a pixel that no image knows
    got = constant_depths(*inverse_depth(torch.tensor(depth)))

    def lower_median(values: np.ndarray) -> float:
        return float(np.sort(values)[(len(values) - 1) // 2])

    inverse = np.where(depth > 0, 1 / np.where(depth > 0, depth, 1), np.nan)
    normalized = inverse.copy()
    for image in normalized:
        image -= lower_median(image[~np.isnan(image)])
        image /= np.nanmean(np.abs(image))
    for name, values in (("inverse depth", inverse), ("of the normalised", normalized)):
        columns = [[column[~np.isnan(column)] for column in row] for row in np.moveaxis(values, 0, -1)]
        for statistic, function in (("mean", np.mean), ("median", lower_median)):
            expected = np.array([[function(c) if len(c) else np.nan for c in row] for row in columns])
            expected[np.isnan(expected)] = np.nanmean(expected)
            assert_same(got[f"{statistic} {name}"].numpy(), expected)
    assert (got["constant"] == got["constant"][0, 0]).all() and len(got) == 5


@given(seed=SEEDS)
def test_label_baselines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    label = rng.integers(4, size=(6, 3, 4)).astype(np.uint8)
    label[rng.random(label.shape) < 0.2] = 255
    got = constant_labels(torch.tensor(label), 4)
    counts = np.stack([(label == k).sum(0) for k in range(4)])
    assert (got["commonest class"].numpy() == counts.sum((1, 2)).argmax()).all()
    assert got["commonest class"].shape == (3, 4)
    assert (np.take_along_axis(counts, got["commonest per pixel"].numpy()[None], 0)[0] == counts.max(0)).all()


@given(count=st.integers(2, 40), seed=st.integers(0, 100))
def test_a_derangement_moves_everything(count: int, seed: int) -> None:
    order = derangement(count, seed)
    assert sorted(order.tolist()) == list(range(count))
    assert (order != torch.arange(count)).all()


def test_the_comparison_keeps_its_word() -> None:
    """The truth keeps every promise, a constant none, and the permuted score is that of other scenes' predictions."""
    rng = np.random.default_rng(0)
    training, held_out = (torch.tensor(random_depth(rng, count)) for count in (8, 6))
    recipe = Recipe()
    task = Depth(recipe)
    inverse, _ = inverse_depth(held_out)
    good = compare(task, recipe, inverse, held_out, training)
    assert good.met and good.model < 1e-9
    assert good.others[PERMUTED] == task.score(inverse[derangement(6, recipe.seed)], held_out)
    baselines = {name: score for name, score in good.others.items() if name != PERMUTED}
    assert [(p.against, p.bound) for p in good.promises] == [(min(baselines, key=baselines.__getitem__), 0.6), (PERMUTED, 0.75)]
    poor = compare(task, recipe, torch.ones_like(inverse), held_out, training)
    assert not poor.met and [p.kept for p in poor.promises] == [False, False]
    assert poor.promises[0].ratio == pytest.approx(poor.model / min(baselines.values()))
    assert json.loads(json.dumps(poor.as_dict()))["met"] is False
    unpromised = recipe.model_copy(update={"baseline_bar": None, "permuted_bar": None})
    assert compare(task, unpromised, torch.ones_like(inverse), held_out, training).promises == []
