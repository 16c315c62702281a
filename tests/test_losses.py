"""The depth losses: both forms equal, by definition, by differences, by invariance, by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import accelerated.losses as fast
import reference.losses as plain
from tests.equality import LOGIC, assert_same, check_vjp
from tests.maps import Batch, batches, distance_to_kinks, distance_to_other_median
from tests.primitives import each_implementation  # noqa: F401

both = pytest.mark.usefixtures("each_implementation")
ALIGNMENTS = ("median", "least_squares")
LOSSES = {
    "median": lambda form, *maps: form.depth_loss(*maps),
    "least_squares": lambda form, *maps: form.depth_loss(*maps, alignment="least_squares"),
    "snippet": lambda form, *maps: form.published_snippet_loss(*maps),
}
NOISE = 1e-9  # how near to a kink float64 rounding can change a sign or a choice


def by_torch(loss, prediction, target, mask):
    """Loss and gradient of the PyTorch form, as NumPy."""
    leaf = torch.tensor(prediction, requires_grad=True)
    value = LOSSES[loss](fast, leaf, torch.tensor(target), torch.tensor(mask))
    value.backward()
    return value.detach().numpy(), leaf.grad.numpy()


def by_numpy(loss, prediction, target, mask):
    value, vjp = LOSSES[loss](plain, prediction, target, mask)
    return value, vjp(1.0)


def residual_of(loss, prediction, target, mask):
    return plain.ALIGNMENTS["median" if loss == "median" else "least_squares"](prediction, target, mask)[0]


def cancelling(loss, prediction, target, mask):
    """The size of the terms that cancel in the gradient of an invariant loss: some |dloss/dR| times d(aligned)/d(prediction)."""
    size = 0.0
    for p, t, m in zip(prediction, target, mask, strict=True):
        if m.sum() > 1 and np.ptp(p[m]) > 0:
            slope = np.ptp(t[m]) if loss != "median" else 1.0
            size = max(size, 8 * max(slope, slope**2) / np.ptp(p[m]))
        elif m.any() and loss == "median":
            size = 8e6  # constant: s = 1e-6
    return size


# ---- the two forms -------------------------------------------------------------------------------------------------------------


@both
@settings(max_examples=150)
@given(maps=batches(), loss=st.sampled_from(sorted(LOSSES)))
def test_both_forms_agree(maps, loss):
    value, gradient = by_numpy(loss, *maps)
    # Multiples of 1/4 have exact sums, so the median alignment ties exactly in both forms and needs no exclusion. Least squares
    # does not: there an exact zero or tie is rounding's to decide. (With two pixels the fit is exact and no gradient flows.)
    if loss != "median":
        for b, m in enumerate(maps.mask):
            one = Batch(*(x[b : b + 1] for x in maps))
            flat = np.ptp(maps.prediction[b][m]) * np.ptp(maps.target[b][m]) == 0 if m.any() else True
            assume(flat or m.sum() <= 2 or distance_to_kinks(residual_of(loss, *one), one.mask) > NOISE)
    fast_value, fast_gradient = by_torch(loss, *maps)
    assert_same(fast_value, np.asarray(value), scale=max(1.0, float(value)), what="loss")
    scale = max(float(np.abs(gradient).max()), cancelling(loss, *maps))
    assert_same(fast_gradient, gradient, scale=scale, what="gradient")
    assert not fast_gradient[~maps.mask].any()
    assert not gradient[~maps.mask].any()


@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(maps=batches(kinds=("normal",), largest=9), loss=st.sampled_from(sorted(LOSSES)), seed=st.integers(0, 99))
def test_reference_vjp_by_differences(maps, loss, seed):
    # A hundred times the prediction, which changes no loss, makes the steps of the differences small. They reach some 0.01 far:
    # predictions within 0.05 of a kink or of another median are excluded. So are images of so few pixels that the loss may be
    # constant, where the derivative is 0 and the difference noise.
    assume(all(count == 0 or count > 4 for count in maps.mask.sum((1, 2))))
    prediction = 100 * maps.prediction
    assume(distance_to_kinks(residual_of(loss, prediction, *maps[1:]), maps.mask) > 5e-4)
    assume(loss != "median" or distance_to_other_median(prediction, maps.mask) > 0.05)
    assume(loss == "median" or min((np.ptp(p[m]) for p, m in zip(prediction, maps.mask, strict=True) if m.any()), default=9) > 5)
    function = lambda p: LOSSES[loss](plain, p, maps.target, maps.mask)  # noqa: E731
    check_vjp(function, [prediction], np.random.default_rng(seed))


def by_definition(prediction, target, mask, alignment, kept=0.8, scales=4, weight=0.5):
    """The depth loss as the paper's text has it: one pixel after the other."""
    total = 0.0
    for p, t, m in zip(prediction, target, mask, strict=True):
        pixels = [(y, x) for y in range(m.shape[0]) for x in range(m.shape[1]) if m[y, x]]
        if not pixels:
            continue
        d = [p[i] for i in pixels]
        truth = [t[i] for i in pixels]

        def standardized(d):
            middle = sorted(d)[math.ceil(len(d) / 2) - 1]
            deviation = max(sum(abs(v - middle) for v in d) / len(d), 1e-6)
            return [(v - middle) / deviation for v in d]

        if alignment == "median":
            d, truth = standardized(d), standardized(truth)
        elif len(set(d)) == 1:
            d = [sum(truth) / len(truth)] * len(d)
        else:
            scale, shift = np.linalg.lstsq(np.stack([d, np.ones(len(d))], axis=1), np.array(truth), rcond=None)[0]
            d = [scale * v + shift for v in d]
        residual = {i: a - b for i, a, b in zip(pixels, d, truth, strict=True)}
        smallest = sorted(abs(r) for r in residual.values())[: int(kept * len(pixels) + 1e-9)]
        total += sum(smallest) / (2 * len(pixels))
        for k in range(scales):
            grid = [(y, x) for y, x in pixels if y % 2**k == 0 and x % 2**k == 0]
            for y, x in grid:
                for neighbour in ((y + 2**k, x), (y, x + 2**k)):
                    if neighbour in residual:
                        total += weight * abs(residual[neighbour] - residual[y, x]) / len(grid)
    return total / len(prediction)


@both
@settings(max_examples=60)
@given(
    maps=batches(),
    alignment=st.sampled_from(ALIGNMENTS),
    kept=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    scales=st.integers(0, 5),
    weight=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_depth_loss_is_the_definition(maps, alignment, kept, scales, weight):
    expected = np.float64(by_definition(*maps, alignment, kept, scales, weight))
    options = {"alignment": alignment, "kept": kept, "scales": scales, "gradient_weight": weight}
    loss, _ = plain.depth_loss(*maps, **options)
    assert_same(loss, expected, scale=max(1.0, expected))
    assert_same(fast.depth_loss(*map(torch.tensor, maps), **options).numpy(), expected, scale=max(1.0, expected))


@settings(max_examples=60)
@given(maps=batches(kinds=("normal", "quantised")))
def test_published_snippet_loss_is_the_snippet(maps):
    """Sums over the batch over sums over the batch; the fit by Cramer's rule, (0, 0) where it has no answer."""
    errors = []
    differences, counts = np.zeros(4), np.zeros(4)
    for p, t, m in zip(*maps, strict=True):
        d, truth = p[m], t[m]
        scale = shift = 0.0
        if len(d) and np.ptp(d) > 0:
            determinant = len(d) * (d**2).sum() - d.sum() ** 2
            scale = (len(d) * (d * truth).sum() - d.sum() * truth.sum()) / determinant
            shift = ((d**2).sum() * truth.sum() - d.sum() * (d * truth).sum()) / determinant
        errors += [(scale * d + shift - truth) ** 2]
        r = np.full(m.shape, np.nan)  # an invalid neighbour makes a difference NaN, which nansum leaves out
        r[m] = scale * d + shift - truth
        for k in range(4):
            step = r[:: 2**k, :: 2**k]
            differences[k] += sum(np.nansum(np.abs(np.diff(step, axis=axis))) for axis in (0, 1))
            counts[k] += np.isfinite(step).sum()
    errors = np.concatenate(errors)
    expected = errors.sum() / (2 * max(len(errors), 1)) + 0.5 * (differences / np.maximum(counts, 1)).sum()
    for value in (by_numpy("snippet", *maps)[0], by_torch("snippet", *maps)[0]):
        assert_same(value, np.float64(expected), scale=max(1.0, expected))


# ---- invariances ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(maps=batches(), loss=st.sampled_from(sorted(LOSSES)), scale=st.sampled_from([0.25, 0.7, 30]), shift=st.integers(-5, 5))
def test_scale_and_shift_of_the_prediction_change_nothing(maps, loss, scale, shift):
    moved = np.where(maps.mask, scale * maps.prediction + shift, np.nan)
    value, gradient = by_numpy(loss, *maps)
    assert_same(by_numpy(loss, moved, *maps[1:])[0], value, scale=max(1.0, float(value)))
    # A direction in which the loss does not change is one along which its gradient vanishes: image by image, 1 and the image.
    # (Where s is clamped the scale of a constant image is still free, for d - t stays 0.)
    for g, p, m in zip(gradient, maps.prediction, maps.mask, strict=True):
        assert abs(g[m].sum()) <= LOGIC * max(np.abs(g).sum(), cancelling(loss, *maps))
        assert abs((g[m] * p[m]).sum()) <= LOGIC * max(np.abs(g[m] * p[m]).sum(), 9 * cancelling(loss, *maps))


@both
@settings(max_examples=30)
@given(maps=batches(), loss=st.sampled_from(sorted(LOSSES)))
def test_what_stands_at_invalid_pixels_does_not_matter(maps, loss):
    clean = [np.where(maps.mask, x, 0.5) for x in maps[:2]]
    for form in (by_numpy, by_torch):
        for actual, expected in zip(form(loss, *maps), form(loss, *clean, maps.mask), strict=True):
            assert (actual == expected).all()


# ---- by hand -------------------------------------------------------------------------------------------------------------------


def trimmed(residual, mask, dloss, kept=0.8):
    """Values and gradients of both forms, which must agree exactly on these small numbers."""
    value, vjp = plain.trimmed_absolute(residual, mask, kept)
    leaf = torch.tensor(residual, requires_grad=True)
    other = fast.trimmed_absolute(leaf, torch.tensor(mask), kept)
    other.backward(torch.tensor(dloss))
    assert_same(other.detach().numpy(), value)
    assert_same(leaf.grad.numpy(), vjp(dloss))
    return value, vjp(dloss)


@both
def test_trimming_drops_the_largest_residuals_and_the_later_of_equal_ones():
    residual = np.array([[[1.0, -5.0, 2.0], [-1.0, 0.0, 9.0]], [[3.0, -3.0, 3.0], [3.0, -3.0, 0.0]]])
    mask = np.array([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 0]]], bool)
    value, gradient = trimmed(residual, mask, np.array([10.0, 20.0]))
    assert_same(value, np.array([(0 + 1 + 1 + 2) / 10, 12 / 10]))  # M = 5, U_m = 4
    assert_same(gradient, np.array([[[1.0, 0, 1], [-1, 0, 0]], [[2, -2, 2], [2, 0, 0]]]))


@both
@given(count=st.integers(0, 400), kept=st.sampled_from([0.0, 0.1, 0.5, 0.8, 0.9, 1.0]))
def test_trimming_keeps_the_floor(count, kept):
    """Of these fractions none is below its decimal in float64, so that the floor is never one too few."""
    tenths = round(10 * kept)
    _, gradient = trimmed(np.ones((1, 20, 20)), np.arange(400).reshape(1, 20, 20) < count, np.ones(1), kept)
    assert (gradient > 0).sum() == tenths * count // 10
    assert (gradient.ravel()[: tenths * count // 10] > 0).all()


@both
def test_gradient_matching_of_a_ramp():
    """R = x on 9x9 pixels: at scale k, n = 9, 5, 3, 2 pixels a side, n (n - 1) differences of 2^k, and M_k = n^2."""
    ramp = np.broadcast_to(np.arange(9.0), (2, 9, 9)).copy()
    mask = np.ones((2, 9, 9), bool)
    mask[1] = False
    expected = sum(2**k * (n - 1) / n for k, n in enumerate((9, 5, 3, 2)))
    for r in (ramp, ramp.transpose(0, 2, 1)):
        value, _ = plain.gradient_matching(r, mask)
        assert_same(value, np.array([expected, 0.0]))
        assert_same(fast.gradient_matching(torch.tensor(r), torch.tensor(mask)).numpy(), value)


@both
def test_gradient_matching_counts_a_difference_only_between_valid_pixels():
    residual = np.array([[[0.0, 1.0, 7.0], [5.0, 5.0, 9.0]]])
    mask = np.array([[[1, 1, 0], [0, 1, 1]]], bool)
    value, vjp = plain.gradient_matching(residual, mask, scales=1)
    assert_same(value, np.array([(1 + 4 + 4) / 4]))
    assert_same(vjp(np.array([4.0])), np.array([[[-1.0, 0, 0], [0, 0, 1]]]))
    assert_same(fast.gradient_matching(torch.tensor(residual), torch.tensor(mask), scales=1).numpy(), value)


@both
def test_depth_loss_by_hand():
    """d = 4 1 3 2: t = 2, s = 1, d^ = 2 -1 1 0. d* = 0 0 0 4: t = 0, s = 1. R = 2 -1 1 -4, U_m = 3. The second image is empty."""
    prediction = np.array([[[4.0, 1.0, 3.0, 2.0]], [[np.nan] * 4]])
    target = np.array([[[0.0, 0.0, 0.0, 4.0]], [[np.inf] * 4]])
    mask = np.array([[[True] * 4], [[False] * 4]])
    data, matching = (1 + 1 + 2) / 8, (3 + 2 + 5) / 4 + abs(1 - 2) / 2
    for form in (by_numpy, by_torch):
        value, gradient = form("median", prediction, target, mask)
        assert_same(value, np.float64((data + 0.5 * matching) / 2))
        assert not gradient[1].any()


@both
def test_only_kept_pixels_get_a_gradient_from_the_data_term():
    _, gradient = trimmed(np.arange(10.0).reshape(1, 2, 5) - 4.6, np.ones((1, 2, 5), bool), np.ones(1))
    assert_same(gradient, np.array([[[0, -1, -1, -1, -1], [1, 1, 1, 1, 0]]]) / 20)


@pytest.mark.parametrize("loss", ["least_squares", "snippet"])
def test_a_constant_prediction_gets_no_gradient_through_least_squares(loss):
    """s = 0; t = mean target (R = -1 1) in the paper's loss, 0 (R = -2 -4) in the snippet's."""
    maps = np.full((1, 1, 2), 7.0), np.array([[[2.0, 4.0]]]), np.ones((1, 1, 2), bool)
    expected = {"least_squares": 1 / 4 + 0.5 * 2 / 2, "snippet": (4 + 16) / 4 + 0.5 * 2 / 2}[loss]
    for form in (by_numpy, by_torch):
        value, gradient = form(loss, *maps)
        assert_same(value, np.float64(expected))
        assert not gradient.any()


def test_no_gradient_reaches_the_target():
    prediction, target = torch.rand(2, 1, 5, 7, dtype=torch.float64).requires_grad_().unbind()
    for loss, function in LOSSES.items():
        through = torch.autograd.grad(
            function(fast, prediction.detach(), target, torch.ones(1, 5, 7, dtype=torch.bool)) + 0 * prediction.sum(),
            target,
            allow_unused=True,
        )
        assert through == (None,), loss


# ---- precisions and devices ----------------------------------------------------------------------------------------------------


@both
@settings(max_examples=60)
@given(maps=batches(kinds=("normal",), masks=("none", "some", "all"), largest=13), alignment=st.sampled_from(ALIGNMENTS))
def test_float32_within_rounding(maps, alignment):
    """Both libraries add n < 200 numbers in blocks, within some 12 eps of the sum of their sizes; the loss is three such sums.

    So 64 eps bounds the error relative to the loss with sizes added where it has differences (`terms`): a pixel is in four
    differences of each scale. The gradient's bound is the vjp of the median alignment, with sizes for values.
    """
    prediction, target = (np.where(maps.mask, x, 0).astype(np.float32) for x in maps[:2])
    exact = prediction.astype(np.float64), target.astype(np.float64), maps.mask
    residual = residual_of(alignment, *exact)
    value, gradient = by_numpy(alignment, *exact)
    images, allowed, allowed_gradient = len(maps.mask), 0.0, np.zeros_like(gradient)
    for b, m in enumerate(maps.mask):
        if not m.any():
            continue
        d, truth = exact[0][b][m], exact[1][b][m]
        share = np.full(m.shape, 1 / (2 * m.sum()))  # |dloss/dR| at most
        for k in range(4):
            share[:: 2**k, :: 2**k] += 2 / max(m[:: 2**k, :: 2**k].sum(), 1)
        share = share[m] / images
        if alignment == "median":
            sizes = [np.sort(x) for x in (d, truth)]
            t = [x[(len(x) - 1) // 2] for x in sizes]
            s = [max(np.abs(x - y).mean(), 1e-6) for x, y in zip((d, truth), t, strict=True)]
            aligned = np.abs(d - t[0]) / s[0]
            terms = aligned + np.abs(truth - t[1]) / s[1]
            through_s = (share * aligned).sum() / s[0]
            bound = share / s[0] + through_s / len(d)
            bound[np.argmax(d == t[0])] += share.sum() / s[0] + through_s
            allowed_gradient[b][m] = bound
        elif np.ptp(d) > 0:  # a fit, whose condition is (the range of d)^2 over its variance
            scale = np.polyfit(d, truth, 1)[0]
            terms = np.abs(truth).max() + np.abs(scale * d).max() + np.ptp(truth) * np.ptp(d) ** 2 / d.var()
        else:
            terms = 2 * np.abs(truth).max()
        allowed += (share * terms).sum()
    eps = np.finfo(np.float32).eps
    # Excluded from the comparison of gradients: residuals so near a kink that float32 may choose another sign or pixel.
    clear = alignment == "median" and distance_to_kinks(residual, maps.mask) > 64 * eps * np.abs(residual).max(initial=1)
    for form in (by_numpy, by_torch):
        single, single_gradient = form(alignment, prediction, target, maps.mask)
        assert np.asarray(single).dtype == single_gradient.dtype == np.float32
        assert abs(float(single) - float(value)) <= 64 * eps * allowed
        if clear:
            assert (np.abs(single_gradient - gradient) <= 64 * eps * allowed_gradient).all()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_half_precision_is_computed_in_float32_under_autocast_too(loss):
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 9, 11, generator=generator)
    mask = torch.rand(2, 9, 11, generator=generator) < 0.7
    leaf = prediction.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[loss](fast, leaf, target, mask)
    value.backward()
    wide = leaf.detach().float().requires_grad_()
    expected = LOSSES[loss](fast, wide, target, mask)
    expected.backward()
    assert value.dtype == torch.float32
    assert value == expected
    assert (leaf.grad == wide.grad.bfloat16()).all()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_nothing_is_read_back_to_the_host(loss):
    """Tensors of the meta device have no values: reading one would raise."""
    leaf = torch.empty(2, 9, 11, device="meta", requires_grad=True)
    value = LOSSES[loss](fast, leaf, torch.empty(2, 9, 11, device="meta"), torch.empty(2, 9, 11, dtype=torch.bool, device="meta"))
    value.backward()
    assert value.shape == ()
    assert leaf.grad.shape == leaf.shape


# ---- bad input -----------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_valid_pixel_that_is_not_finite(loss, bad, which):
    """The NumPy form names it; the PyTorch form, which looks at no value, returns NaN and never a number that hides it."""
    maps = [np.random.default_rng(0).standard_normal((2, 4, 5)), np.random.default_rng(1).standard_normal((2, 4, 5))]
    mask = np.zeros((2, 4, 5), bool)
    mask[:, ::2, ::2] = True  # without neighbours at scale 0
    maps[which][1, 2, 4] = bad
    with pytest.raises(ValueError, match=rf"{('prediction', 'target')[which]}\[1, 2, 4\] is {bad}"):
        by_numpy(loss, *maps, mask)
    value, gradient = by_torch(loss, *maps, mask)
    assert np.isnan(value)
    assert np.isnan(gradient[mask]).all()
    assert not gradient[~mask].any()


@pytest.mark.parametrize("form", [plain, fast])
def test_errors_name_what_is_wrong(form):
    make = np.asarray if form is plain else torch.as_tensor
    d, mask = make(np.zeros((1, 2, 3))), make(np.ones((1, 2, 3), bool))
    with pytest.raises(ValueError, match="unknown alignment 'mean': expected one of median, least_squares"):
        form.depth_loss(d, d, mask, alignment="mean")
    with pytest.raises(ValueError, match=r"kept=1\.5"):
        form.depth_loss(d, d, mask, kept=1.5)
    for function in (form.depth_loss, form.published_snippet_loss):
        with pytest.raises(ValueError, match=r"target has shape \(1, 2, 2\): expected \(1, 2, 3\)"):
            function(d, d[:, :, :2], mask)
        with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 3\)"):
            function(d, d, mask[:, :1])
        with pytest.raises(ValueError, match=r"mask has dtype .*float64: expected .*bool"):
            function(d, d, d)
        with pytest.raises(ValueError, match=r"prediction has shape \(1, 1, 2, 3\)"):
            function(d[None], d[None], mask[None])
        with pytest.raises(ValueError, match=r"prediction has shape \(0, 2, 3\)"):
            function(d[:0], d[:0], mask[:0])
        with pytest.raises(ValueError, match=r"prediction has dtype .*int64"):
            function(make(np.zeros((1, 2, 3), np.int64)), d, mask)
