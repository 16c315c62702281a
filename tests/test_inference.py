"""Sliding windows, mirrors and scales: by definition, in both forms, and with real segmentation models."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerated.inference as fast
import reference
import reference.inference as plain
from accelerated.dpt import DPT
from tests.equality import MODEL, assert_same
from tests.models import model_parameters, small

sides = st.integers(1, 14)
crops = st.integers(1, 9)
seeds = st.integers(0, 999)


@st.composite
def windows(draw):
    """A crop, and a stride that leaves no gap."""
    crop = draw(crops)
    return crop, draw(st.integers(1, crop))


def random_image(rng, height, width, batch=2):
    return rng.standard_normal((batch, 3, height, width))


def placed(rng, channels=4):
    """A function, for NumPy and for torch, neither pointwise nor the same everywhere in a window: so are networks."""
    mix = rng.standard_normal((channels, 3))

    def in_numpy(x):
        rows, columns = np.arange(x.shape[2])[:, None], np.arange(x.shape[3])
        return np.einsum("kc,bchw->bkhw", mix, x) * (1 + rows + 0.1 * columns) + np.cumsum(x, axis=3)[:, :1]

    def in_torch(x):
        rows, columns = torch.arange(x.shape[2]).to(x)[:, None], torch.arange(x.shape[3]).to(x)
        return torch.einsum("kc,bchw->bkhw", torch.tensor(mix), x) * (1 + rows + 0.1 * columns) + x.cumsum(3)[:, :1]

    return in_numpy, in_torch


def affine(rng, channels=4):
    """A pointwise function: every pixel's output is one affine map of its colour."""
    mix, shift = rng.standard_normal((channels, 3)), rng.standard_normal((channels, 1, 1))
    return lambda x: np.einsum("kc,bchw->bkhw", mix, x) + shift


def in_both(compute):
    """Run `compute(module, wrap)` with each form; assert that they agree; return NumPy's."""
    actual = compute(plain, np.asarray)
    assert_same(compute(fast, torch.tensor).numpy(), actual)
    return actual


# Where the windows lie


@given(length=st.integers(1, 60), window=windows())
def test_windows_cover_every_pixel_and_end_at_the_border(length, window):
    crop, stride = window
    starts = plain.window_starts(length, crop, stride)
    assert starts == fast.window_starts(length, crop, stride)
    assert starts[0] == 0
    assert starts[-1] == max(length - crop, 0)
    assert all(0 < b - a <= stride for a, b in pairwise(starts))
    assert all(start % stride == 0 for start in starts[:-1])
    # The fewest that windows this far apart can be.
    assert len(starts) == math.ceil(max(length - crop, 0) / stride) + 1
    seen = plain.coverage(length, crop, stride)
    by_definition = [sum(start <= x < start + crop for start in starts) for x in range(max(length, crop))]
    assert seen.tolist() == by_definition
    assert seen.min() >= 1


@pytest.mark.parametrize("form", [plain, fast])
def test_where_the_windows_of_the_paper_lie(form):
    """Base size 520, crop 480: one stride of 320 further, or, at the border, 40; at scale 1.75 the longer side is 910."""
    assert form.default_stride(480) == 320
    assert form.window_starts(520, 480, 320) == [0, 40]
    assert form.window_starts(910, 480, 320) == [0, 320, 430]
    assert form.window_starts(260, 480, 320) == [0]
    assert form.default_stride(1) == 1
    sizes = [form.scaled_size((683, 512), 520, scale) for scale in form.SCALES]
    assert sizes == [(260, 195), (390, 292), (520, 390), (650, 487), (780, 585), (910, 682)]
    assert form.scaled_size((1, 100), 10, 0.5) == (1, 5)


@settings(max_examples=20)
@given(height=sides, width=sides, window=windows(), batch=st.integers(1, 2), at_once=st.integers(1, 5), seed=seeds)
def test_a_pixel_is_the_mean_over_the_windows_that_hold_it(height, width, window, batch, at_once, seed):
    (crop, stride), rng = window, np.random.default_rng(seed)
    image, fill = random_image(rng, height, width, batch), rng.standard_normal(3)
    function, in_torch = placed(rng)
    actual = plain.sliding_window(function, image, crop, stride, fill)
    padded = np.broadcast_to(fill[:, None, None], (batch, 3, max(height, crop), max(width, crop))).copy()
    padded[:, :, :height, :width] = image
    expected = np.zeros((batch, 4, height, width))
    for y in range(height):
        for x in range(width):
            answers = []
            for top in plain.window_starts(height, crop, stride):
                for left in plain.window_starts(width, crop, stride):
                    if top <= y < top + crop and left <= x < left + crop:
                        maps = function(padded[:, :, top : top + crop, left : left + crop])
                        answers.append(maps[:, :, y - top, x - left])
            expected[:, :, y, x] = np.mean(answers, axis=0)
    assert_same(actual, expected)
    tensor = torch.tensor(image)
    assert_same(fast.sliding_window(in_torch, tensor, crop, stride, torch.tensor(fill), at_once).numpy(), expected)
    by_default = fast.sliding_window(in_torch, tensor, crop).numpy()
    assert_same(by_default, plain.sliding_window(function, image, crop))
    assert_same(by_default, plain.sliding_window(function, image, crop, plain.default_stride(crop), 0.0))


# What the three steps are


@settings(max_examples=20)
@given(
    height=sides, width=sides, window=windows(), scales=st.lists(st.sampled_from([0.5, 0.8, 1.0, 1.75]), min_size=1), seed=seeds
)
def test_a_pointwise_function_commutes_with_every_step(height, width, window, scales, seed):
    rng = np.random.default_rng(seed)
    image, function = random_image(rng, height, width), affine(rng)
    assert_same(plain.sliding_window(function, image, *window, fill=7.0), function(image))
    assert_same(plain.mirrored(function)(image), function(image))
    assert_same(plain.multi_scale(function, image, [1.0]), function(image))
    same = plain.multi_scale(lambda x: x, image, scales, base=9)
    assert_same(plain.multi_scale(function, image, scales, base=9), function(same))


@settings(max_examples=15)
@given(
    height=sides,
    width=sides,
    window=windows(),
    base=st.integers(1, 20),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=seeds,
)
def test_constants_stay_constant_whatever_the_image_and_keep_its_type(height, width, window, base, dtype, seed):
    constant = np.random.default_rng(seed).standard_normal(5).astype(dtype)
    image = random_image(np.random.default_rng(seed), height, width).astype(dtype)
    expected = np.broadcast_to(constant[:, None, None], (2, 5, height, width))
    allowed = 50 * np.finfo(dtype).eps

    def in_numpy(x):
        return np.broadcast_to(constant[:, None, None], (len(x), 5, *x.shape[2:])).copy()

    def in_torch(x):
        return torch.tensor(constant)[:, None, None].expand(len(x), 5, *x.shape[2:])

    for form, function, tensor in ((plain, in_numpy, image), (fast, in_torch, torch.tensor(image))):
        step = lambda x, form=form, function=function: form.sliding_window(form.mirrored(function), x, *window)  # noqa: E731
        assert_same(np.asarray(form.multi_scale(step, tensor, base=base)), expected, allowed)


@settings(max_examples=20)
@given(height=sides, width=sides, seed=seeds)
def test_the_mirrored_function_does_not_know_left_from_right(height, width, seed):
    rng = np.random.default_rng(seed)
    image = random_image(rng, height, width)
    functions = dict(zip((plain, fast), placed(rng), strict=True))
    y = in_both(lambda form, wrap: form.mirrored(functions[form])(wrap(image)))
    assert_same(plain.mirrored(functions[plain])(image[..., ::-1])[..., ::-1], y)
    once, other = functions[plain](image), functions[plain](image[..., ::-1].copy())
    assert_same(y, (once + other[..., ::-1]) / 2)


@settings(max_examples=20)
@given(
    height=sides,
    width=sides,
    scales=st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.25, 2.0]), min_size=1, max_size=4),
    base=st.none() | st.integers(1, 15),
    seed=seeds,
)
def test_scales_are_averaged_at_the_size_of_the_image(height, width, scales, base, seed):
    rng = np.random.default_rng(seed)
    image, sizes = random_image(rng, height, width), []
    functions = dict(zip((plain, fast), placed(rng), strict=True))
    actual = in_both(lambda form, wrap: form.multi_scale(functions[form], wrap(image), scales, base))
    expected = np.zeros_like(actual)
    for scale in scales:
        long = math.ceil((max(height, width) if base is None else base) * scale)
        size = [max(int(side / max(height, width) * long + 0.5 + 1e-9), 1) for side in (height, width)]
        sizes.append(tuple(size))
        resized = torch.nn.functional.interpolate(torch.tensor(image), size, mode="bilinear", align_corners=True)
        maps = functions[fast](resized)
        expected += torch.nn.functional.interpolate(maps, (height, width), mode="bilinear", align_corners=True).numpy() / len(
            scales
        )
    assert all(max(size) == math.ceil((base or max(height, width)) * scale) for size, scale in zip(sizes, scales, strict=True))
    assert_same(actual, expected)


def test_the_evaluator_of_the_paper_is_these_steps_where_windows_fit():
    """PyTorch-Encoding's rule, exp(logits + mirrored logits), is a function like any other: written out, for a size that fits."""
    rng = np.random.default_rng(0)
    image, logits = random_image(rng, 14, 10, 1), placed(rng)[0]
    small_logits = lambda x: 0.05 * logits(x)  # noqa: E731
    score = plain.sliding_window(lambda x: np.exp(2 * plain.mirrored(small_logits)(x)), image, 6, 4)
    total, count = np.zeros((1, 4, 14, 10)), np.zeros((14, 10))
    for top in (0, 4, 8):
        for left in (0, 4):
            rows, columns = slice(top, top + 6), slice(left, left + 6)
            window = image[:, :, rows, columns]
            total[:, :, rows, columns] += np.exp(small_logits(window) + small_logits(window[..., ::-1])[..., ::-1])
            count[rows, columns] += 1
    assert_same(score, total / count)


# With a model


@settings(max_examples=4)
@given(
    name=st.sampled_from(["dpt_base", "dpt_hybrid"]),
    size=st.sampled_from([(20, 45), (33, 32), (50, 17)]),
    flip=st.booleans(),
    at_once=st.sampled_from([1, 3, 8]),
)
def test_probabilities_in_both_forms_of_images_of_any_size(name, size, flip, at_once):
    colours = {"image_mean": [0.4, 0.5, 0.3], "image_std": [0.2, 0.25, 0.5]}
    config = small(name, "segmentation", image_size=32, network_size=32, **colours)
    params = model_parameters(config, 5)
    model = DPT(config).double().eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in params.items()})
    image = random_image(np.random.default_rng(1), *size)
    scales = (0.5, 1.0, 1.5)
    actual = reference.segment(params, image, config, scales, flip)
    again = fast.segment(model, torch.tensor(image), scales, flip, windows_at_once=at_once)
    assert_same(again.numpy(), actual, MODEL)
    assert actual.shape == (2, 5, *size)
    assert_same(actual.sum(axis=1), np.ones((2, *size)))
    assert (actual > 0).all()
    # The parts by hand: black below and to the right, a base of 13/12 windows, softmax before any mean.
    softmax = lambda x: fast_probabilities(model, x)  # noqa: E731
    function = plain.mirrored(softmax) if flip else softmax
    black = np.array([-2.0, -2.0, -0.6])
    by_hand = plain.multi_scale(lambda x: plain.sliding_window(function, x, 32, 21, black), image, scales, base=35)
    assert_same(actual, by_hand, MODEL)


@torch.no_grad()
def fast_probabilities(model, x):
    return model(torch.tensor(np.ascontiguousarray(x))).logits.softmax(1).numpy()


def test_one_window_that_fits_is_the_model_itself():
    config = small("dpt_base", "segmentation", network_size=48)
    params, image = model_parameters(config, 2), random_image(np.random.default_rng(2), 48, 48)
    logits = reference.apply(params, image, config)[0].logits
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_same(reference.segment(params, image, config, (1.0,), flip=False, base=48), expected)


# Words


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda form, f, x: form.sliding_window(f, x, 4, 5), "stride is 5: expected at most the crop, 4, so that no"),
        (lambda form, f, x: form.sliding_window(f, x, 4, 0), "stride is 0: expected a whole number of at least 1"),
        (lambda form, f, x: form.sliding_window(f, x, 0), "crop is 0: expected a whole number of at least 1"),
        (lambda form, f, x: form.sliding_window(f, x, 2.5, 1), "crop is 2.5: expected a whole number of at least 1"),
        (lambda form, f, x: form.window_starts(0, 4, 1), "length is 0: expected a whole number of at least 1"),
        (lambda form, f, x: form.sliding_window(f, x[0], 4), r"image has shape \(3, 6, 7\) .*expected .*\(B, C, H, W\)"),
        (lambda form, f, x: form.multi_scale(f, x[0]), r"image has shape \(3, 6, 7\) .*expected .*\(B, C, H, W\)"),
        (lambda form, f, x: form.sliding_window(f, x[:0], 4), r"image has shape \(0, 3, 6, 7\)"),
        (lambda form, f, x: form.multi_scale(f, x, []), r"scales are \[\]: expected at least one, all of them positive numbers"),
        (lambda form, f, x: form.multi_scale(f, x, [1.0, 0.0]), r"scales are \[1.0, 0.0\]"),
        (lambda form, f, x: form.multi_scale(f, x, [-1.0]), r"scales are \[-1.0\]"),
        (lambda form, f, x: form.multi_scale(f, x, [math.inf]), r"scales are \[inf\]"),
        (lambda form, f, x: form.multi_scale(f, x, [math.nan]), r"scales are \[nan\]"),
        (lambda form, f, x: form.multi_scale(f, x, [1.0], base=0), "base is 0: expected at least 1 pixel"),
        (lambda form, f, x: form.sliding_window(lambda y: y[..., 2:], x, 4), r"shape \(\d+, 3, 4, 2\): expected \(\d+, K, 4, 4"),
        (lambda form, f, x: form.sliding_window(lambda y: y[:1], x, 4), r"shape \(1, 3, 4, 4\): expected \(\d+, K, 4, 4\)"),
        (lambda form, f, x: form.mirrored(lambda y: y[:, 0])(x), r"maps have shape \(2, 6, 7\): expected \(2, K, 6, 7\)"),
        (lambda form, f, x: form.multi_scale(lambda y: y[:, :, 1:], x), r"maps have shape \(2, 3, \d, \d\): expected \(2, K"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_alike_in_both_forms(call, message):
    for form, wrap in ((plain, np.asarray), (fast, torch.tensor)):
        with pytest.raises(ValueError, match=message):
            call(form, lambda x: x, wrap(np.zeros((2, 3, 6, 7))))


def test_what_only_one_form_can_be_told_is_refused():
    whole = np.zeros((2, 3, 6, 7), int)
    with pytest.raises(ValueError, match="dtype int64: expected"):
        plain.sliding_window(lambda x: x, whole, 4)
    with pytest.raises(ValueError, match="dtype torch.int64: expected"):
        fast.sliding_window(lambda x: x, torch.tensor(whole), 4)
    with pytest.raises(ValueError, match=r"fill has shape \(2,\): expected a number, or one for each of 3 channels"):
        plain.sliding_window(lambda x: x, np.zeros((2, 3, 6, 7)), 8, fill=np.zeros(2))
    with pytest.raises(ValueError, match=r"fill has shape \(2,\): expected a number, or one for each of 3 channels"):
        fast.sliding_window(lambda x: x, torch.zeros((2, 3, 6, 7)), 8, fill=torch.zeros(2))
    with pytest.raises(ValueError, match="windows_at_once is 0: expected at least 1"):
        fast.sliding_window(lambda x: x, torch.zeros((2, 3, 6, 7)), 4, windows_at_once=0)


def test_a_model_that_does_not_segment_is_refused():
    image, depth = np.zeros((1, 3, 32, 32)), small("dpt_base")
    with pytest.raises(ValueError, match="the model's task is 'depth': expected 'segmentation'"):
        reference.segment(model_parameters(depth, 0), image, depth)
    with pytest.raises(ValueError, match="the model's task is 'depth': expected 'segmentation'"):
        fast.segment(DPT(depth).eval(), torch.tensor(image))
    config = small("dpt_base", "segmentation")
    with pytest.raises(ValueError, match="crop is 40: expected a multiple of the patch size, 16"):
        reference.segment(model_parameters(config, 0), image, config, crop=40)
    with pytest.raises(ValueError, match="crop is 40: expected a multiple of the patch size, 16"):
        fast.segment(DPT(config).eval(), torch.tensor(image), crop=40)
    with pytest.raises(ValueError, match="the model is in training mode: expected model.eval"):
        fast.segment(DPT(config), torch.tensor(image))
