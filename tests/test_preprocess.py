"""Preprocessing at inference: the authors' sizes, OpenCV's cubic, the normalisation, and images that it must refuse."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from accelerated.preprocess import MAX_NETWORK_PIXELS, RESIZE_METHODS, network_shape, preprocess
from tests.equality import assert_same

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # unequal, so that a channel in another's place shows
SIDES = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)


def configuration(size: int | list[int] = 24, multiple: int = 4, method: str = "minimal") -> dict[str, Any]:
    return {"network_size": size, "resize_multiple": multiple, "resize_method": method, "image_mean": MEAN, "image_std": STD}


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.integers(3, 48) | st.lists(st.integers(3, 48), min_size=2, max_size=2))
    return configuration(size, draw(st.integers(1, 14)), draw(st.sampled_from(RESIZE_METHODS)))


def cubic_weights(n_in: int, n_out: int) -> np.ndarray:
    """The (n_out, n_in) matrix of cubic convolution with a = -0.75, pixel centres at halves, the border repeated."""
    a = -0.75
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        centre = (i + 0.5) * n_in / n_out - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - j)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), n_in - 1)] += w
    return matrix


@given(SIDES, SIDES, configurations(), SEEDS)
def test_preprocess_is_the_cubic_of_its_definition(height: int, width: int, config: dict[str, Any], seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    h, w = network_shape(height, width, config)
    assume(h * w < 100_000)
    expected = np.einsum("ih,jw,hwc->cij", cubic_weights(height, h), cubic_weights(width, w), image / 255)
    expected = (expected - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert_same(preprocess(image, config).numpy(), expected[None])


def opencv_bound(height: int, width: int) -> float:
    """How far OpenCV, with float32 coordinates and weights, may be from exact, for an image in [0, 1].

    A coordinate below N is rounded by at most N eps / 2, which moves the result by at most 3 times that, the largest sum of the
    weights' absolute slopes; each of the 4 x 4 weights, whose absolute values sum to at most 1.375 per axis, is rounded some
    ten times.
    """
    eps = float(np.finfo(np.float32).eps)
    return (3 * 1.375 * (height + width) / 2 + 2 * 10 * 1.375**2) * eps


@given(st.integers(1, 300), st.integers(1, 300), configurations(), st.sampled_from([np.uint8, np.float32, np.float64]), SEEDS)
@example(427, 640, configuration(384, 32), np.uint8, 0)
@example(2, 3, configuration(384, 32), np.uint8, 0)
@example(1, 4000, configuration(384, 32), np.float32, 0)
def test_preprocess_is_opencv_as_the_authors_use_it(
    height: int, width: int, config: dict[str, Any], dtype: Any, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = (
        rng.integers(0, 256, (height, width, 3), np.uint8) if dtype == np.uint8 else rng.random((height, width, 3)).astype(dtype)
    )
    h, w = network_shape(height, width, config)
    assume(h * w < 300_000)
    unit = image / 255 if dtype == np.uint8 else image.astype(np.float64)
    resized = cv2.resize(unit, (w, h), interpolation=cv2.INTER_CUBIC)
    actual = preprocess(image, config).numpy()[0].transpose(1, 2, 0) * STD + MEAN
    assert_same(actual, resized, opencv_bound(height, width), scale=1.0)


HUGGING_FACE = [(384, 32), (480, 32), (128, 32), (518, 14), (500, 32), ([352, 1216], 32), ([480, 640], 32), ([640, 100], 14)]


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(HUGGING_FACE))
def test_minimal_is_what_hugging_face_computes(height: int, width: int, sizes: tuple[int | list[int], int]) -> None:
    module = pytest.importorskip("transformers.models.dpt.image_processing_dpt")
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    size, multiple = sizes
    both = (size, size) if isinstance(size, int) else tuple(size)
    expected = module.get_resize_output_image_size(image, both, keep_aspect_ratio=True, multiple=multiple)
    expected = (max(expected.height, multiple), max(expected.width, multiple))  # where theirs is 0, ours is one multiple
    assert network_shape(height, width, configuration(size, multiple)) == expected


@pytest.mark.parametrize(
    ("size", "method", "expected"),
    [
        ((427, 640), "minimal", (384, 576)),
        ((640, 427), "minimal", (576, 384)),
        ((352, 1216), "minimal", (384, 1312)),  # 1326.5 pixels are 41.45 multiples
        ((4000, 6000), "minimal", (384, 576)),  # shrinking: the larger scale, of the shorter side, is nearer to 1
        ((100, 150), "minimal", (256, 384)),  # growing: the smaller scale, of the longer side, is nearer to 1
        ((100, 150), "lower_bound", (384, 576)),
        ((4000, 6000), "upper_bound", (256, 384)),
        ((1, 1), "minimal", (384, 384)),
        ((1, 4000), "minimal", (32, 384)),
        ((2, 3), "minimal", (256, 384)),
        ((768, 256), "minimal", (384, 128)),  # half or one and a half: a tie goes to the height
        ((12, 13), "minimal", (352, 384)),  # 354.46
        ((480, 500), "minimal", (384, 384)),  # 400 is 12.5 multiples: to the even 12
    ],
)
def test_network_shape_by_hand(size: tuple[int, int], method: str, expected: tuple[int, int]) -> None:
    assert network_shape(*size, configuration(384, 32, method)) == expected


@given(st.integers(1, 5000), st.integers(1, 5000), configurations())
def test_network_shape_has_the_properties_of_its_method(height: int, width: int, config: dict[str, Any]) -> None:
    size, multiple, method = config["network_size"], config["resize_multiple"], config["resize_method"]
    shape = network_shape(height, width, config)
    sizes = [size, size] if isinstance(size, int) else size
    scales = (sizes[0] / height, sizes[1] / width)
    choose = {"lower_bound": max, "upper_bound": min}.get(method, lambda s: min(s, key=lambda scale: abs(scale - 1)))
    for side, length, wanted in zip(shape, (height, width), sizes, strict=True):
        ideal = choose(scales) * length
        assert side % multiple == 0
        assert side >= multiple
        assert abs(side - ideal) < multiple * (1 + 1e-9)
        assert abs(side - ideal) <= multiple / 2 * (1 + 1e-9) or side == multiple or method != "minimal"
        assert side >= wanted or method != "lower_bound"
        assert side <= max(wanted, multiple) or method != "upper_bound"
    if abs(abs(scales[0] - 1) - abs(scales[1] - 1)) > 1e-9:
        turned = config | {"network_size": size if isinstance(size, int) else size[::-1]}
        assert network_shape(width, height, turned) == shape[::-1]


def test_the_bounds_round_away_from_what_the_nearest_multiple_would_undercut_or_exceed() -> None:
    assert network_shape(50, 50, configuration(36, 32, "lower_bound")) == (64, 64)
    assert network_shape(50, 50, configuration(60, 32, "upper_bound")) == (32, 32)
    assert network_shape(50, 60, configuration(64, 32, "lower_bound")) == (64, 64)  # 76.8: to the nearest, as nothing forbids


@pytest.mark.parametrize(
    ("size", "method", "expected"),
    [
        ((352, 1216), "minimal", (352, 1216)),
        ((375, 1242), "minimal", (352, 1216)),  # 0.9387 and 0.9791: the width's, and 367.1 pixels are 11.47 multiples
        ((480, 640), "minimal", (352, 480)),  # 0.7333 and 1.9: the height's, and 469.3 pixels are 14.67 multiples
        ((704, 1216), "lower_bound", (704, 1216)),  # the width decides, the height is far above its own bound
        ((704, 1216), "upper_bound", (352, 608)),
        ((200, 1300), "lower_bound", (352, 2304)),  # 1.76: 2288 is 71.5 multiples, to the even 72
        ((360, 1216), "upper_bound", (352, 1184)),  # 0.9778: 1188.98 is 37.2 multiples
    ],
)
def test_network_shape_of_two_sizes_by_hand(size: tuple[int, int], method: str, expected: tuple[int, int]) -> None:
    assert network_shape(*size, configuration([352, 1216], 32, method)) == expected


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5)), r"shape \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"shape \(4, 5, 4\)"),
        (np.broadcast_to(np.uint8(0), (20_000, 5001, 3)), r"shape \(20000, 5001, 3\): expected at most 100,000,000 pixels"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\)"),
        (np.zeros((4, 5, 3), np.int32), "dtype int32"),
        (np.zeros((4, 5, 3), np.uint16), "dtype uint16"),
        (np.zeros((4, 5, 3), bool), "dtype bool"),
        (np.full((4, 5, 3), np.nan), "NaN"),
        (np.full((4, 5, 3), np.inf, np.float32), "infinite"),
        (np.full((4, 5, 3), 255.0), "from 255 to 255"),
        (np.full((4, 5, 3), -0.1, np.float32), "from -0.1"),
        ([[[0, 0, 0]]], "a list"),
    ],
)
def test_what_is_no_image_is_named(image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        preprocess(image, configuration())


def test_views_of_any_strides_are_images() -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for view in (image[::-1], image[..., ::-1], image.swapaxes(0, 1), np.broadcast_to(image[:1], (4, 7, 3))):
        assert_same(preprocess(view, configuration()).numpy(), preprocess(view.copy(), configuration()).numpy())


def test_an_input_beyond_the_limit_is_refused_before_it_is_made() -> None:
    long = np.broadcast_to(np.uint8(0), (380, 60_000, 3))
    assert math.prod(network_shape(380, 60_000, configuration(384, 32))) > MAX_NETWORK_PIXELS
    with pytest.raises(ValueError, match="60000 x 380 pixels needs a network input of 60640 x 384"):
        preprocess(long, configuration(384, 32))


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="unknown resize_method 'stretch': expected one of minimal, lower_bound, upper_bound"):
        network_shape(4, 5, configuration(method="stretch"))
