"""Metrics in both forms: by hand, by definition, against torchmetrics, whatever the mask and however the batches are split."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchmetrics.functional as witness
from hypothesis import given
from hypothesis import strategies as st

import accelerated.metrics as fast
import reference.metrics as plain
from tests.equality import assert_same
from tests.maps import GARBAGE, MASKS, valid

NAMES = plain.DepthErrors._fields
SEEDS = st.integers(0, 2**20)


class Maps(NamedTuple):
    """Metres (B, H, W) float64, garbage where they do not count."""

    prediction: np.ndarray
    depth: np.ndarray
    mask: np.ndarray


@st.composite
def depths(draw: Any) -> Maps:
    """One to four images of 1x1 to 7x7 pixels: all kinds of masks; predictions random, exact, off by a factor, on a threshold."""
    shape = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    each = draw(
        st.lists(
            st.tuples(st.sampled_from(["random", "exact", "factor", "threshold"]), st.sampled_from(MASKS)), min_size=1, max_size=4
        )
    )
    rng = np.random.default_rng(draw(SEEDS))
    prediction, depth, mask = (np.empty((len(each), *shape), dtype) for dtype in (float, float, bool))
    for b, (kind, which) in enumerate(each):
        depth[b], mask[b] = 10 ** rng.uniform(-3, 2, shape), valid(which, shape, rng)
        if kind == "random":
            prediction[b] = depth[b] * np.exp(rng.normal(0, 0.5, shape))
        elif kind == "threshold":  # powers of 2, so that the ratio is 1.25^k exactly
            depth[b] = 2.0 ** rng.integers(-3, 6, shape)
            prediction[b] = depth[b] * 1.25 ** rng.integers(0, 4, shape)
            prediction[b], depth[b] = (depth[b], prediction[b]) if rng.random() < 0.5 else (prediction[b], depth[b])
        else:
            prediction[b] = depth[b] * (1 if kind == "exact" else 3)
    prediction[~mask], depth[~mask] = rng.choice([*GARBAGE, -1], (2, int((~mask).sum())))
    return Maps(prediction, depth, mask)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.tensor(array) for array in arrays]


def both_depth_errors(maps: Maps) -> dict[str, np.ndarray]:
    """Each metric (B,), asserted to be the same in both forms."""
    errors, other = plain.depth_errors(*maps), fast.depth_errors(*tensors(*maps))
    some = maps.mask.any(axis=(1, 2))
    logs = np.abs(np.log([maps.prediction[maps.mask], maps.depth[maps.mask]])).max(initial=1)
    for name in NAMES:
        have, want = getattr(other, name).numpy(), getattr(errors, name)
        assert np.isnan(have[~some]).all() and np.isnan(want[~some]).all(), name
        cancelling = {"silog": 100 * logs, "rmse_log": logs, "log10": logs}  # differences of logarithms
        assert_same(have[some], want[some], scale=cancelling.get(name), what=name)
    return errors._asdict()


def test_the_depth_metrics_by_hand() -> None:
    """z = 2, 4 for z* = 1, 4: errors 1, 0 and ratios 2, 1; the third pixel does not count. 1.25^3 = 1.953 < 2."""
    errors = both_depth_errors(
        Maps(np.array([[[2.0, 4.0, np.nan]]]), np.array([[[1.0, 4.0, 0.0]]]), np.array([[[True, True, False]]]))
    )
    expected = {
        "abs_rel": 0.5,
        "sq_rel": 0.5,
        "rmse": math.sqrt(0.5),
        "rmse_log": math.log(2) / math.sqrt(2),
        "log10": math.log10(2) / 2,
        "silog": 100 * math.log(2) / 2,
        "delta1": 0.5,
        "delta2": 0.5,
        "delta3": 0.5,
    }
    assert errors.keys() == expected.keys()
    for name, value in expected.items():
        assert errors[name] == pytest.approx([value], rel=1e-12), name


def test_a_ratio_on_a_threshold_is_not_below_it() -> None:
    """4 / 5 and 5 / 4 alike, and the powers of 1.25; just below each threshold, a pixel is good."""
    depth = np.array([[[4.0, 5.0, 16.0, 64.0]]])
    on = np.array([[[5.0, 4.0, 25.0, 125.0]]])
    all_pixels = np.ones_like(depth, bool)
    errors = both_depth_errors(Maps(on, depth, all_pixels))
    assert [errors[f"delta{k}"][0] for k in (1, 2, 3)] == [0.0, 0.5, 0.75]
    below = np.where(on > depth, np.nextafter(on, 0), np.nextafter(on, 9))
    errors = both_depth_errors(Maps(below, depth, all_pixels))
    assert [errors[f"delta{k}"][0] for k in (1, 2, 3)] == [0.5, 0.75, 1.0]


@given(maps=depths())
def test_the_depth_metrics_in_both_forms_by_definition(maps: Maps) -> None:
    errors = both_depth_errors(maps)
    for b, mask in enumerate(maps.mask):
        if not mask.any():
            continue
        pairs = list(zip(maps.prediction[b][mask].tolist(), maps.depth[b][mask].tolist(), strict=True))
        logs = [math.log(z / t) for z, t in pairs]
        mean_log = math.fsum(logs) / len(pairs)
        expected = {
            "abs_rel": math.fsum(abs(z - t) / t for z, t in pairs) / len(pairs),
            "sq_rel": math.fsum((z - t) ** 2 / t for z, t in pairs) / len(pairs),
            "rmse": math.sqrt(math.fsum((z - t) ** 2 for z, t in pairs) / len(pairs)),
            "rmse_log": math.sqrt(math.fsum(d * d for d in logs) / len(pairs)),
            "log10": math.fsum(abs(d) for d in logs) / len(pairs) / math.log(10),
            "silog": 100 * math.sqrt(math.fsum((d - mean_log) ** 2 for d in logs) / len(pairs)),
        }
        for k in (1, 2, 3):
            expected[f"delta{k}"] = sum(max(z / t, t / z) < 1.25**k for z, t in pairs) / len(pairs)
        for name, value in expected.items():
            assert errors[name][b] == pytest.approx(value, rel=1e-10, abs=1e-12), name


@given(maps=depths())
def test_torchmetrics_agrees(maps: Maps) -> None:
    errors = both_depth_errors(maps)
    for b, mask in enumerate(maps.mask):
        if mask.any():
            z, t = tensors(maps.prediction[b][mask], maps.depth[b][mask])
            assert errors["rmse"][b] == pytest.approx(witness.mean_squared_error(z, t, squared=False).item(), rel=1e-10)
            assert errors["abs_rel"][b] == pytest.approx(witness.mean_absolute_percentage_error(z, t).item(), rel=1e-10)
            log_error = witness.mean_squared_error(z.log(), t.log(), squared=False).item()
            assert errors["rmse_log"][b] == pytest.approx(log_error, rel=1e-10)
            log_error = witness.mean_absolute_error(z.log10(), t.log10()).item()
            assert errors["log10"][b] == pytest.approx(log_error, rel=1e-10, abs=1e-15)


@given(maps=depths())
def test_float32_is_computed_in_float64(maps: Maps) -> None:
    single = Maps(maps.prediction.astype(np.float32), maps.depth.astype(np.float32), maps.mask)
    expected = both_depth_errors(Maps(single.prediction.astype(np.float64), single.depth.astype(np.float64), maps.mask))
    for name, values in both_depth_errors(single).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@given(maps=depths(), cut=st.integers(0, 4))
def test_sums_of_batches_are_sums_of_images(maps: Maps, cut: int) -> None:
    """Split anywhere, an empty batch included, the means are those over the images with a pixel, each of weight one."""
    whole = plain.depth_errors(*maps)
    some = maps.mask.any(axis=(1, 2))
    for form, convert in ((plain, list), (fast, lambda arrays: tensors(*arrays))):
        sums = form.DepthSums()
        for part in (slice(None, cut), slice(cut, None)):
            sums = form.add(sums, form.sum_images(form.depth_errors(*convert([array[part] for array in maps]))))
        assert sums.images == some.sum()
        means = form.mean_errors(sums)
        for name in NAMES:
            mean = getattr(means, name)
            if some.any():
                assert mean == pytest.approx(getattr(whole, name)[some].mean(), rel=1e-10, abs=1e-12), name
            else:
                assert math.isnan(mean), name


def test_a_pixel_that_counts_must_be_a_depth() -> None:
    good, mask = np.ones((2, 3, 4)), np.ones((2, 3, 4), bool)
    for form, convert in ((plain, lambda x: x), (fast, torch.tensor)):
        for bad in (np.nan, np.inf, 0.0, -1.0):
            wrong = good.copy()
            wrong[1, 2, 3] = bad
            words = f"holds {bad} at a pixel that counts: expected positive and finite"
            for op, extra in ((form.depth_errors, ()), (form.zero_shot_depth, (10.0,))):
                with pytest.raises(ValueError, match=f"{op.__name__}: depth {words}"):
                    op(convert(good), convert(wrong), convert(mask), *extra)
            with pytest.raises(ValueError, match=f"depth_errors: prediction {words}"):
                form.depth_errors(convert(wrong), convert(good), convert(mask))
        with pytest.raises(ValueError, match=r"prediction has shape \(1, 3, 4\): expected \(B, H, W\), the same"):
            form.depth_errors(convert(good[:1]), convert(good), convert(mask))
        with pytest.raises(ValueError, match=r"depth has shape \(3, 4\): expected \(B, H, W\)"):
            form.zero_shot_depth(convert(good[0]), convert(good[0]), convert(mask[0]), 10.0)
        with pytest.raises(TypeError, match=r"mask has dtype .*int64: expected bool"):
            form.depth_errors(convert(good), convert(good), convert(mask.astype(np.int64)))
        with pytest.raises(ValueError, match="prediction holds nan at a pixel that counts: expected finite"):
            form.zero_shot_depth(convert(good * np.nan), convert(good), convert(mask), 10.0)
        with pytest.raises(ValueError, match="zero_shot_depth: cap is 0.0: expected a positive number of metres"):
            form.zero_shot_depth(convert(good), convert(good), convert(mask), 0.0)


# ---- the zero-shot protocol ----------------------------------------------------------------------------------------------------


def both_zero_shot_depths(maps: Maps, cap: float) -> np.ndarray:
    """The aligned depth, asserted to be the same in both forms."""
    z = plain.zero_shot_depth(*maps, cap)
    assert_same(fast.zero_shot_depth(*tensors(*maps), cap).numpy(), z, rtol=1e-9)
    return z


@given(maps=depths(), seed=SEEDS, cap=st.sampled_from([5.0, 80.0]))
def test_zero_shot_depth_by_definition(maps: Maps, seed: int, cap: float) -> None:
    """NumPy's own least squares in inverse depth, capped; of any sign and scale. Constant predictions align to the mean."""
    rng = np.random.default_rng(seed)
    prediction = np.where(maps.mask, 100 * rng.standard_normal(maps.mask.shape), maps.prediction)
    depth = np.where(maps.mask, rng.uniform(0.5, 100, maps.mask.shape), maps.depth)
    z = both_zero_shot_depths(Maps(prediction, depth, maps.mask), cap)
    assert (z[~maps.mask] == 0).all()
    for b, mask in enumerate(maps.mask):
        if mask.any():
            d, inverse = prediction[b][mask], 1 / depth[b][mask]
            system = np.stack([d - d.mean(), np.ones_like(d)], axis=1)
            (scale, shift), *_ = np.linalg.lstsq(system, inverse, rcond=None)
            aligned = scale * (d - d.mean()) + shift
            assert_same(z[b][mask], np.where(aligned > 1 / cap, 1 / np.maximum(aligned, 1e-9), cap), rtol=1e-9)


@given(maps=depths(), scale=st.sampled_from([1.0, 50.0, -3.0]), shift=st.floats(-5, 5))
def test_an_affine_truth_is_found_and_capped(maps: Maps, scale: float, shift: float) -> None:
    """From scale * inverse depth + shift the depth itself returns, as far as the cap, even for a negative scale."""
    depth = np.where(maps.mask, np.clip(maps.depth, 0.5, 100), maps.depth)
    prediction = np.where(maps.mask, scale / np.where(maps.mask, depth, 1) + shift, maps.prediction)
    z = both_zero_shot_depths(Maps(prediction, depth, maps.mask), 80.0)
    assert_same(z, np.where(maps.mask, np.minimum(depth, 80), 0), rtol=1e-9)


def test_the_protocols_cap_is_not_the_trainings() -> None:
    """`absolute_relative_error` caps at the farthest known depth: with that as the cap, the protocol gives the same number."""
    rng = np.random.default_rng(0)
    depth, prediction = rng.uniform(1, 20, (1, 6, 7)), rng.random((1, 6, 7))
    everywhere = np.ones_like(depth, bool)
    farthest = both_zero_shot_depths(Maps(prediction, depth, everywhere), depth.max())
    expected = fast.absolute_relative_error(*tensors(prediction, depth)).numpy()
    assert_same(plain.depth_errors(farthest, depth, everywhere).abs_rel, expected)
    assert plain.DEPTH_CAPS == fast.DEPTH_CAPS == {"eth3d": 72, "sintel": 72, "kitti": 80, "nyu": 10, "tum": 10}


# ---- which pixels count --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("crop", "size", "rows", "columns"),
    [
        ("garg_crop", (375, 1242), (153, 371), (44, 1197)),
        ("garg_crop", (352, 1216), (143, 349), (43, 1172)),
        ("eigen_kitti_crop", (375, 1242), (124, 342), (44, 1197)),
        ("eigen_kitti_crop", (352, 1216), (117, 321), (43, 1172)),
        ("eigen_nyu_crop", (480, 640), (45, 471), (41, 601)),
    ],
)
def test_a_crop_is_its_published_rectangle(crop: str, size: Any, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    expected = np.zeros(size, bool)
    expected[slice(*rows), slice(*columns)] = True
    for mask in (getattr(plain, crop)(*size), getattr(fast, crop)(*size).numpy()):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)


@given(height=st.integers(1, 99), width=st.integers(1, 99))
def test_the_crops_of_any_size_in_both_forms(height: int, width: int) -> None:
    for crop in ("garg_crop", "eigen_kitti_crop"):
        np.testing.assert_array_equal(getattr(fast, crop)(height, width).numpy(), getattr(plain, crop)(height, width))
    for form in (plain, fast):
        with pytest.raises(ValueError, match=f"the image is {height} x {width}: expected 480 x 640"):
            form.eigen_nyu_crop(height, width)


def test_valid_depth_excludes_its_ends() -> None:
    depth = np.array([[[0.0, 1e-3, 0.002, 79.9, 80.0, np.nan, np.inf]]])
    for mask in (plain.valid_depth(depth, 1e-3, 80), fast.valid_depth(torch.tensor(depth), 1e-3, 80).numpy()):
        assert mask.tolist() == [[[False, False, True, True, False, False, False]]]


# ---- order of points -----------------------------------------------------------------------------------------------------------


def test_the_closer_point_has_the_larger_inverse_depth() -> None:
    prediction = np.array([[3.0, 1.0], [1.0, 2.0]])
    points = np.array([[[0, 0], [0, 1]], [[0, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 1], [1, 0]]])
    closer = np.array([1, -1, 1, 1])  # right; wrong; a tie is wrong; right
    for sums in (plain.ordinal_errors(prediction, points, closer), fast.ordinal_errors(*tensors(prediction, points, closer))):
        assert sums == (2, 4)
    for form in (plain, fast):
        assert form.whdr(form.add(form.OrdinalSums(2, 4), form.OrdinalSums(0, 4))) == 0.25
        assert math.isnan(form.whdr(form.OrdinalSums()))


@given(seed=SEEDS, count=st.integers(0, 9))
def test_ordinal_errors_in_both_forms(seed: int, count: int) -> None:
    """By counting, on predictions that tie; the other order of each pair, with the other relation, is the same statement."""
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, 4, (3, 5)).astype(np.float32)
    points = np.stack([rng.integers(0, 3, (count, 2)), rng.integers(0, 5, (count, 2))], axis=-1)
    closer = rng.choice([-1, 1], count)
    wrong = 0
    for ((i, j), (k, m)), relation in zip(points, closer, strict=True):
        predicted = int(prediction[i, j] > prediction[k, m]) - int(prediction[i, j] < prediction[k, m])
        wrong += predicted != relation
    for swapped in (points, points[:, ::-1].copy()):
        relations = closer if swapped is points else -closer
        assert plain.ordinal_errors(prediction, swapped, relations) == (wrong, count)
        assert fast.ordinal_errors(*tensors(prediction, swapped, relations)) == (wrong, count)


def test_ordinal_errors_names_what_it_cannot_count() -> None:
    prediction, points, closer = np.ones((2, 3)), np.array([[[0, 0], [1, 2]]]), np.array([1])
    for form, convert in ((plain, list), (fast, lambda arrays: tensors(*arrays))):
        for point in ([0, 3], [-1, 0], [2, 0]):
            with pytest.raises(ValueError, match=rf"a point is at \({point[0]}, {point[1]}\): .* within \(2, 3\)"):
                form.ordinal_errors(*convert([prediction, np.array([[[0, 0], point]]), closer]))
        with pytest.raises(ValueError, match="closer holds 0: expected 1 or -1"):
            form.ordinal_errors(*convert([prediction, points, 0 * closer]))
        with pytest.raises(ValueError, match="prediction is not finite at a point"):
            form.ordinal_errors(*convert([prediction * np.nan, points, closer]))
        with pytest.raises(ValueError, match=r"shapes \(2, 3\), \(1, 2\) and \(1,\): expected \(H, W\), \(N, 2, 2\) and \(N,\)"):
            form.ordinal_errors(*convert([prediction, points[0, :1], closer]))


# ---- segmentation --------------------------------------------------------------------------------------------------------------


def test_segmentation_by_hand() -> None:
    """Class 0: 2 hits of a union of 3; class 1: 1 of 2; class 2 occurs nowhere and counts for nothing."""
    label, prediction = np.array([[[0, 0, 1, 1, 255]]]), np.array([[[0, 0, 0, 1, 2]]])
    for form, convert in ((plain, list), (fast, lambda arrays: tensors(*arrays))):
        counts = form.confusion(*convert([prediction, label]), 3)
        assert counts.tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
        assert form.pixel_accuracy(counts) == 0.75
        assert form.mean_intersection_over_union(counts) == pytest.approx((2 / 3 + 1 / 2) / 2, rel=1e-12)


@given(
    seed=SEEDS, num_classes=st.integers(2, 6), ignored=st.sampled_from([0.0, 0.3, 1.0]), shape=st.sampled_from([(1, 1), (4, 5)])
)
def test_segmentation_is_torchmetrics(seed: int, num_classes: int, ignored: float, shape: tuple[int, int]) -> None:
    """Classes that do not occur, pixels and whole images that are ignored, what was predicted there, sums of batches."""
    rng = np.random.default_rng(seed)
    label = rng.integers(rng.integers(1, num_classes + 1), size=(3, *shape)).astype(np.uint8)
    prediction = rng.integers(num_classes, size=label.shape)
    label[rng.random(label.shape) < ignored] = 255
    counts = plain.confusion(prediction, label, num_classes)
    assert counts.dtype == np.int64
    other = fast.confusion(*tensors(prediction, label), num_classes)
    np.testing.assert_array_equal(other.numpy(), counts)
    np.testing.assert_array_equal(sum(plain.confusion(p, t, num_classes) for p, t in zip(prediction, label, strict=True)), counts)
    ours = [plain.pixel_accuracy(counts), plain.mean_intersection_over_union(counts)]
    theirs = [fast.pixel_accuracy(other), fast.mean_intersection_over_union(other)]
    if (label == 255).all():
        assert np.isnan([*ours, *theirs]).all()
        return
    arguments = {"num_classes": num_classes, "ignore_index": 255}
    pair = [torch.tensor(array).long() for array in (prediction, label)]
    np.testing.assert_array_equal(witness.classification.multiclass_confusion_matrix(*pair, **arguments).numpy(), counts)
    accuracy = witness.classification.multiclass_accuracy(*pair, average="micro", **arguments).item()
    jaccard = witness.classification.multiclass_jaccard_index(*pair, average="macro", **arguments).item()
    assert ours == pytest.approx(theirs, rel=1e-12)
    assert ours == pytest.approx([accuracy, jaccard], rel=1e-6)  # torchmetrics divides in float32


def test_confusion_names_a_value_that_is_no_class() -> None:
    label = np.array([[[0, 1], [255, 2]]])
    with pytest.raises(ValueError, match="the label holds 2: expected a class from 0 to 1"):
        plain.confusion(label % 2, label, 2)
    with pytest.raises(ValueError, match="the prediction holds 3: expected a class from 0 to 2"):
        plain.confusion(np.full_like(label, 3), label, 3)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 1\): expected \(1, 2, 2\)"):
        plain.confusion(label[:, :, :1], label, 3)
