"""What is painted over a picture, and what the legend says, against the arithmetic and the counts they stand for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw, ImageFont

from accelerated import ade20k, drawing, images
from accelerated.drawing import class_palette, heat, overlay, side_by_side, with_legend

RNG = np.random.default_rng(0)
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawing") / "x.npy"


@pytest.fixture(params=[1, 20, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few pixels are computed at a time, the result is the same."""
    monkeypatch.setattr(drawing, "_CHUNK", request.param)


def test_ade20k_has_its_own_palette_and_others_a_made_one() -> None:
    colors, names = class_palette(150)
    np.testing.assert_array_equal(colors, ade20k.COLORS)
    assert names == ade20k.NAMES
    for count in (1, 2, 149, 151):
        colors, names = class_palette(count)
        np.testing.assert_array_equal(colors, images.class_colors(count))
        assert names == tuple(f"class {k}" for k in range(count))
    with pytest.raises(ValueError, match="0 classes, where 1 or more"):
        class_palette(0)


@given(SIZES, st.floats(0, 1), st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.uint64]), st.integers(1, 5))
def test_an_overlay_is_the_weighted_mean(size: tuple[int, int], opacity: float, dtype: type, count: int) -> None:
    image, colors = picture(*size), picture(1, count, seed=1)[0]
    classes = RNG.integers(0, count, size).astype(dtype)
    before = image.copy()
    painted = overlay(image, classes, colors, opacity)
    exact = (1 - opacity) * image.astype(float) + opacity * colors[classes].astype(float)
    assert painted.dtype == np.uint8
    assert painted.shape == image.shape
    assert abs(painted - exact).max() <= 0.5 + 1e-4  # the nearest integer; float32 may put a tie on either side
    np.testing.assert_array_equal(image, before)


@pytest.mark.usefixtures("chunk")
def test_an_overlay_by_hand() -> None:
    image = np.array([[[0, 100, 255]], [[10, 20, 30]], [[1, 2, 3]]], np.uint8)
    colors = np.array([[255, 255, 255], [0, 50, 200]], np.uint8)
    classes = np.array([[1], [0], [1]])
    expected = [[[0, 75, 228]], [[132, 138, 142]], [[0, 26, 102]]]  # halves go to the even number
    np.testing.assert_array_equal(overlay(image, classes, colors), expected)
    np.testing.assert_array_equal(overlay(image, classes, colors, 0), image)
    np.testing.assert_array_equal(overlay(image, classes, colors, 1), colors[classes])


@pytest.mark.usefixtures("chunk")
def test_a_picture_in_floating_point_is_the_same_picture() -> None:
    image, colors = picture(4, 6), picture(1, 3)[0]
    classes, weights = RNG.integers(0, 3, (4, 6)), RNG.random((4, 6))
    for dtype in (np.float16, np.float32, np.float64):
        again = (image / 255).astype(dtype)
        np.testing.assert_array_equal(overlay(again, classes, colors), overlay(image, classes, colors))
        np.testing.assert_array_equal(heat(again, weights), heat(image, weights))
        np.testing.assert_array_equal(side_by_side(again, image), side_by_side(image, again))
        np.testing.assert_array_equal(
            with_legend(again, classes, colors, "abc"), with_legend(image, classes, colors, ["a", "b", "c"])
        )


@pytest.mark.usefixtures("chunk")
def test_heat_is_the_colour_map_over_half_the_grey() -> None:
    image, weights = picture(8, 9), RNG.random((8, 9)) * 7
    weights[3, 4], weights[0, 0] = 7, 0
    painted = heat(image, weights)
    w = weights[..., None] / 7
    grey = np.asarray(Image.fromarray(image).convert("L"), float)[..., None] / 2  # Pillow's grey is BT.601's, rounded
    inferno = np.array(matplotlib.colormaps["inferno"].colors)[np.rint(weights / 7 * 255).astype(int)] * 255
    exact = (1 - w) * grey + w * inferno
    assert abs(painted - exact).max() <= 0.75 + 1e-3  # a half from rounding, half of a half from Pillow's rounding of the grey
    np.testing.assert_array_equal(painted[3, 4], [252, 255, 164], "the brightest colour, where the weight is largest")
    assert painted[0, 0].min() == painted[0, 0].max(), "grey, where nobody looks"


@given(
    SIZES, st.sampled_from([1e-300, 1e-45, 0.1, 1, 3e38, 1e308]), st.sampled_from([np.uint8, np.int64, np.float16, np.float64])
)
def test_heat_does_not_depend_on_the_unit_of_the_weights(size: tuple[int, int], unit: float, dtype: type) -> None:
    image, weights = picture(*size), RNG.integers(0, 5, size)
    np.testing.assert_array_equal(heat(image, weights.astype(dtype)), heat(image, weights * (unit / 5)))


def test_no_attention_leaves_the_grey_picture() -> None:
    image = np.full((2, 3, 3), 200, np.uint8)
    np.testing.assert_array_equal(heat(image, np.zeros((2, 3))), np.full((2, 3, 3), 100))


@pytest.mark.parametrize("value", [-1, -1e-30, np.nan, np.inf])
def test_weights_that_are_no_weights_are_named(value: float) -> None:
    with pytest.raises(ValueError, match="not all finite and at least 0"):
        heat(picture(1, 2), np.array([[1, value]]))
    with pytest.raises(ValueError, match="weights of bool"):
        heat(picture(1, 2), np.array([[True, False]]))


@given(SIZES)
@example((100, 300))
@example((300, 149))
def test_two_pictures_beside_each_other(size: tuple[int, int]) -> None:
    height, width = size
    left, right = picture(*size, 1), picture(*size, 2)
    pair = side_by_side(left, right)
    gap = pair.shape[1] - 2 * width
    assert gap == {(100, 300): 2, (300, 149): 3}.get(size, 1)
    assert pair.shape == (height, 2 * width + gap, 3)
    np.testing.assert_array_equal(pair[:, :width], left)
    np.testing.assert_array_equal(pair[:, width:-width], 255)
    np.testing.assert_array_equal(pair[:, -width:], right)


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list to which every text that is drawn from now on is appended."""
    texts: list[str] = []
    draw = ImageDraw.ImageDraw.text

    def recorded(self: ImageDraw.ImageDraw, xy: tuple, text: str, *args: object, **kwargs: object) -> None:
        texts.append(text)
        draw(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    return texts


@pytest.mark.usefixtures("chunk")
def test_the_legend_names_what_is_there_the_largest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = written(monkeypatch)
    colors, names = class_palette(150)
    classes = np.full((50, 200), 2, np.uint8)
    classes[:25] = 4
    classes[:25, :100] = 12
    classes[25:35, :100] = 20
    classes[35, 0] = 3
    with_legend(picture(50, 200), classes, colors, names)
    assert texts == ["sky", "40.0 %", "tree", "25.0 %", "person", "25.0 %", "car", "10.0 %", "floor", "<0.1 %"], (
        "the larger first; the lower id, which is tree's, among equals"
    )
    texts.clear()
    with_legend(picture(50, 200), classes, colors, names, most=5)
    assert len(texts) == 10, "all five fit, so there are no more"
    texts.clear()
    with_legend(picture(50, 200), classes, colors, names, most=3)
    assert texts[-3:] == ["25.0 %", "and 2 more", ""]
    assert len(texts) == 8
    texts.clear()
    classes[35, :5] = 3
    with_legend(picture(50, 200), classes, colors, names)
    assert texts[-1] == "0.1 %", "0.05 % is the smallest share that has a number"
    texts.clear()
    with_legend(picture(50, 200), np.zeros((1, 1), np.uint64), colors[:1], ["two\nlines"])
    assert texts == ["two lines", "100.0 %"]


@given(st.lists(st.text("Wi m", min_size=1, max_size=20), min_size=1, max_size=9), st.integers(1, 900))
def test_no_words_overlap(names: list[str], width: int) -> None:
    boxes: list[tuple[float, ...]] = []
    draw = ImageDraw.ImageDraw.text

    def recorded(self: ImageDraw.ImageDraw, xy: tuple, text: str, fill: tuple, font: ImageFont.FreeTypeFont, anchor: str) -> None:
        if text:
            boxes.append(self.textbbox(xy, text, font, anchor))
        draw(self, xy, text, fill, font, anchor=anchor)

    classes, colors = np.arange(len(names))[None], class_palette(len(names))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", recorded)
        with_legend(np.zeros((100, width, 3), np.uint8), classes, colors, names)
    assert len(boxes) >= len(names), "at least the share of each"
    for i, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:i]:
            assert right < other[0] or other[2] < left or bottom < other[1] or other[3] < top


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 700), st.integers(1, 700)),
    hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 29)),
    st.integers(1, 30),
)
@example((480, 640), np.arange(20, dtype=np.uint8)[None], 16)
@example((640, 480), np.arange(20, dtype=np.uint8)[None], 16)
@example((64, 64), np.arange(30, dtype=np.uint8)[None], 30)
@example((1, 1), np.zeros((1, 1), np.uint8), 16)
@example((30, 1500), np.arange(30, dtype=np.uint8)[None], 30)
@example((1500, 30), np.arange(30, dtype=np.uint8)[None], 30)
def test_every_class_of_the_legend_has_its_square_and_nothing_is_cut_off(
    size: tuple[int, int], classes: np.ndarray, most: int
) -> None:
    height, width = size
    shown = np.full((height, width, 3), 128, np.uint8)
    colors, names = class_palette(30)
    page = with_legend(shown, classes, colors, names, most)
    assert page.dtype == np.uint8
    np.testing.assert_array_equal(page[:height, :width], shown)
    counts = Counter(classes.ravel().tolist())
    expected = sorted(counts, key=lambda k: (-counts[k], k))[:most]
    letters = max(12, round((height * width) ** 0.5 / 40))
    top, left = np.argwhere((page == colors[expected[0]]).all(axis=-1)).min(axis=0)
    margin, line = -(-3 * letters // 4), -(-3 * letters // 2)
    place = (top - margin - line // 2 + letters // 2 - 1, left - margin - 1)  # where the panel begins
    assert place in ((height, 0), (0, width)), "below the picture or beside it"
    panel = page[place[0] :, place[1] :]
    outside = page.copy()
    outside[:height, :width] = outside[place[0] :, place[1] :] = 255
    assert (outside == 255).all()
    assert (panel[[0, -1]] == 255).all()
    assert (panel[:, [0, -1]] == 255).all(), "a word at the border would be cut off"
    found = {tuple(color) for color in panel.reshape(-1, 3).tolist()} & {tuple(color) for color in colors.tolist()}
    assert found == {tuple(colors[k].tolist()) for k in expected}
    at = {k: np.argwhere((panel == colors[k]).all(axis=-1)) for k in expected}
    for places in at.values():
        assert np.ptp(places, axis=0).tolist() == [letters - 3, letters - 3], "a square with an outline of one pixel"
        assert len(places) == (letters - 2) ** 2
    order = sorted(expected, key=lambda k: (at[k][:, 1].min(), at[k][:, 0].min()))
    assert order == expected, "down the first column, then the next"
    ink = (panel < 100).all(axis=-1)  # dark grey: letters, and no colour of the palette
    for k in expected:
        rows = slice(at[k][:, 0].min(), at[k][:, 0].max() + 1)
        right = at[k][:, 1].max() + 2
        assert ink[rows, right : right + 2 * letters].any(), "a name beside the square"


@given(st.tuples(st.integers(20, 900), st.integers(20, 900)), st.integers(1, 20))
def test_the_legend_stands_where_the_page_stays_shorter(size: tuple[int, int], count: int) -> None:
    height, width = size
    colors, names = class_palette(count)
    classes = np.arange(count)[None]
    page = with_legend(picture(*size), classes, colors, names, most=count)
    letters = max(12, round((height * width) ** 0.5 / 40))
    legend = drawing._Legend(drawing._entries(classes, colors, names, count), letters)
    columns = legend.columns(width)
    assert columns == 1 or legend.size(columns)[0] <= width, "no more columns than fit"
    assert legend.size(columns + 1)[0] > width, "as many columns as fit"
    beside, below = legend.size(1), legend.size(columns)
    longest = min(max(width + beside[0], height, beside[1]), max(width, below[0], height + below[1]))
    assert max(page.shape) == longest


def test_letters_grow_with_the_picture() -> None:
    colors, names = class_palette(2)
    small, large = (with_legend(np.zeros((side, side, 3), np.uint8), np.array([[0]]), colors, names) for side in (400, 4000))
    height, width = large.shape[0] - 4000, small.shape[0] - 400
    assert 7 < height / width < 10, "100 pixels where it was 12"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": np.zeros((4, 5), int)}, r"classes of shape \(4, 5\), where that of the picture, \(4, 6\)"),
        ({"classes": np.zeros((4, 6))}, "and float64, where integers"),
        ({"classes": np.zeros((4, 6, 1), int)}, r"classes of shape \(4, 6, 1\)"),
        ({"classes": np.full((4, 6), 3)}, "class ids from 3 to 3, where 0 to 2 were expected"),
        ({"classes": np.full((4, 6), -1)}, "class ids from -1 to -1"),
        ({"colors": np.zeros((3, 4), np.uint8)}, r"colors of shape \(3, 4\)"),
        ({"colors": np.zeros((0, 3), np.uint8)}, r"colors of shape \(0, 3\)"),
        ({"colors": np.zeros((3, 3))}, "and float64, where"),
        ({"opacity": 1.01}, "opacity of 1.01, where 0 to 1"),
        ({"opacity": -0.1}, "opacity of -0.1"),
        ({"opacity": np.nan}, "opacity of nan"),
        ({"image": np.zeros((4, 6), np.uint8)}, r"image of shape \(4, 6\), where \(H, W, 3\)"),
        ({"image": np.zeros((4, 6, 4), np.uint8)}, r"image of shape \(4, 6, 4\)"),
        ({"image": np.zeros((0, 6, 3), np.uint8)}, r"image of shape \(0, 6, 3\)"),
        ({"image": np.zeros((4, 6, 3), np.int32)}, "picture of dtype int32"),
        ({"image": np.full((4, 6, 3), 2.0)}, "values from 2 to 2, where 0 to 1"),
        ({"image": np.full((4, 6, 3), np.nan)}, "values from nan to nan"),
    ],
)
def test_an_overlay_that_cannot_be_is_named(change: dict, words: str) -> None:
    arguments = {"image": picture(4, 6), "classes": np.zeros((4, 6), int), "colors": np.zeros((3, 3), np.uint8)} | change
    with pytest.raises(ValueError, match=words):
        overlay(**arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ["a"]}, "1 names of 2 colours"),
        ({"most": 0}, "legend of 0 classes"),
        ({"classes": np.full((2, 2), 2)}, "class ids from 2 to 2"),
        ({"classes": np.zeros((0, 2), int)}, r"classes of shape \(0, 2\)"),
        ({"colors": np.zeros((2, 2), np.uint8)}, r"colors of shape \(2, 2\)"),
        ({"picture": np.zeros((2, 2), np.uint8)}, r"picture of shape \(2, 2\)"),
    ],
)
def test_a_legend_that_cannot_be_is_named(change: dict, words: str) -> None:
    arguments = {"picture": picture(2, 2), "classes": np.zeros((2, 2), int), "colors": picture(1, 2)[0], "names": "ab"} | change
    with pytest.raises(ValueError, match=words):
        with_legend(**arguments)


def test_pictures_and_weights_of_other_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and \(3, 2, 3\), where one shape"):
        side_by_side(picture(2, 3), picture(3, 2))
    with pytest.raises(ValueError, match=r"left picture of shape \(2, 3\)"):
        side_by_side(np.zeros((2, 3)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"weights of shape \(3, 2\), where that of the picture, \(2, 3\)"):
        heat(picture(2, 3), np.zeros((3, 2)))


@given(hnp.arrays(np.float32, SIZES, elements=st.floats(0, 1, width=32)))
def test_brightness_becomes_the_nearest_of_256(values: np.ndarray) -> None:
    bright = images.to_uint8(values)
    assert bright.dtype == np.uint8
    exact = values.astype(np.float64) * 255
    assume((abs(exact % 1 - 0.5) > 1e-4).all())  # a tie in float32 may be none in float64
    np.testing.assert_array_equal(bright, np.rint(exact))


@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_side=4)))
def test_npy_is_what_numpy_reads(scratch: Path, values: np.ndarray) -> None:
    images.write_npy(scratch, values)
    again = np.load(scratch, allow_pickle=False)
    assert again.dtype == values.dtype
    np.testing.assert_array_equal(again, values)
    images.write_npy(scratch, np.ones((4, 6))[::2, ::-3])
    np.testing.assert_array_equal(np.load(scratch), np.ones((2, 2)))


def test_a_failed_npy_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_text("before")
    with pytest.raises(ValueError, match="Object arrays"):
        images.write_npy(path, np.array([{}]))
    with pytest.raises(TypeError), images.complete_path(path) as part:
        part.write_bytes("half")  # type: ignore[arg-type]  # creates the file, and fails
    with pytest.raises(TypeError), images.complete_file(path) as file:
        file.write("half")  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
    assert path.read_text() == "before"
    images.write_npy(path, np.arange(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
