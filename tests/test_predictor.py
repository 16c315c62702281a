"""`accelerated.Predictor`: predictions and attention lie on their pictures, in whatever batches, precisions and sizes."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import accelerated
import reference
from accelerated import placement, preprocess
from accelerated.dpt import DPT, from_config
from accelerated.postprocess import at_size, classes_at_size
from accelerated.predictor import Predictor, _patch_under
from tests.equality import assert_same
from tests.models import model_parameters, small
from tests.noise import FACTOR, floor, relative

SIDES = st.integers(1, 150)
SIZES = st.tuples(st.integers(1, 80), st.integers(1, 80))


class Red(torch.nn.Module):
    """A model whose answer is known: the red channel of its input, in [0, 1], as inverse depth. It keeps the shapes it sees."""

    patch_size = 16

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        preprocessing = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
        self.config = accelerated.configuration("dpt_tiny") | preprocessing | changes
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.dropout = torch.nn.Dropout(0.5)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(image.shape))
        return self.dropout(image[:, 0] * 0.2 + 0.4)


def numpy_model(name: str, task: str = "depth", seed: int = 0, **changes: Any) -> DPT:
    """A small model in float64, none of whose parameters is zero."""
    config = small(name, task, **changes)
    model = from_config(config).double().eval()
    model.load_state_dict({key: torch.tensor(value) for key, value in model_parameters(config, seed).items()})
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def depth_model() -> DPT:
    torch.manual_seed(0)
    model = accelerated.create_model("dpt_tiny")
    torch.nn.init.constant_(model.head.conv3.bias, 1.0)  # keep the last ReLU open, so that there is a picture to predict
    return model


@pytest.fixture(scope="module")
def segmentation_model() -> DPT:
    torch.manual_seed(0)
    return accelerated.create_model("dpt_tiny", task="segmentation", num_classes=9)


# one picture


@given(SIDES, SIDES, st.sampled_from([64, (48, 96), (32, 32)]), st.integers(0, 2**32 - 1))
def test_the_prediction_lies_on_the_image(height: int, width: int, size: Any, seed: int) -> None:
    """Through a model that hands over its red channel, with OpenCV as witness of both resizings."""
    coarse = np.random.default_rng(seed).random((4, 4, 3))
    image = np.clip(cv2.resize(coarse, (width, height)), 0, 1)
    h, w = preprocess.network_shape(height, width, Red(network_size=size).config)
    red = cv2.resize(image[..., 0], (w, h), interpolation=cv2.INTER_CUBIC)
    expected = cv2.resize(red, (width, height), interpolation=cv2.INTER_CUBIC)
    actual = Predictor(Red(), size=size, device="cpu")(image)
    assert actual.dtype == np.float32
    # float32 coordinates up to the sides, each off by eps / 2 of itself, moving the value by less than 3 (tests/test_preprocess)
    allowed = 4 * 1.4 * (h + w) * float(np.finfo(np.float32).eps)
    assert_same(actual.astype(np.float64), expected, allowed, scale=1.0)
    bilinear = Predictor(Red(output_resize="bilinear"), size=size, device="cpu", dtype="float64")(image)
    assert bilinear.dtype == np.float64
    assert_same(bilinear, cv2.resize(red, (width, height), interpolation=cv2.INTER_LINEAR), allowed, scale=1.0)


def test_uint8_and_its_float_are_the_same_image(depth_model: DPT) -> None:
    image, predictor = picture(37, 61), Predictor(depth_model, device="cpu")
    np.testing.assert_array_equal(predictor(image), predictor(image / 255))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 400), (700, 2), (33, 31), (128, 160)])
def test_any_size_has_a_prediction_and_the_model_stays_as_it_was(
    size: tuple[int, int], depth_model: DPT, segmentation_model: DPT
) -> None:
    image = picture(*size)
    segmentation_model.train()
    segmentation_model.head.bn.eval()
    before = {key: value.clone() for key, value in segmentation_model.state_dict().items()}
    predictor = Predictor(segmentation_model, device="cpu")
    assert predictor.model is segmentation_model
    depth, classes = Predictor(depth_model, device="cpu")(image), predictor(image)
    assert depth.shape == classes.shape == size
    assert (depth.dtype, classes.dtype) == (np.float32, np.uint8)
    assert np.isfinite(depth).all()
    assert classes.max() < 9
    np.testing.assert_array_equal(classes, predictor(image), err_msg="dropout or batch statistics at work")
    assert segmentation_model.training
    assert not segmentation_model.head.bn.training
    assert all(torch.equal(before[key], value) for key, value in segmentation_model.state_dict().items())


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_a_class_is_the_largest_logit_at_the_size_of_the_image(classes: int, dtype: Any) -> None:
    logits = torch.randn(classes, 6, 8, generator=torch.Generator().manual_seed(0))
    logits[0] -= 2
    ids = classes_at_size(logits, (13, 21)).numpy()
    resized = torch.nn.functional.interpolate(logits[None], (13, 21), mode="bicubic", align_corners=False)[0]
    assert ids.dtype == dtype
    np.testing.assert_array_equal(ids, resized.argmax(0).numpy())
    assert not classes_at_size(torch.zeros(3, 2, 2), (4, 4)).any(), "on a tie, the lowest id"


def test_half_precision_is_resized_in_float32() -> None:
    maps = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(at_size(maps, (11, 13)), at_size(maps.float(), (11, 13)))


def test_float64_is_predicted_in_float64() -> None:
    image = picture(64, 64)
    depth = Predictor(Red().double(), dtype="float64")(image)  # type: ignore[arg-type]
    assert_same(depth, image[..., 0] / 255)  # the network's own size: nothing is resized


def test_a_prediction_that_is_not_finite_is_refused() -> None:
    model = Red()
    model.forward = lambda image: torch.full((1, *image.shape[2:]), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="the model's prediction is not finite: its weights are damaged"):
        Predictor(model, device="cpu")(picture(4, 5))


def test_a_metric_model_gives_metres() -> None:
    metres = {"metric_scale": 0.3, "metric_shift": 0.1, "metric_png_scale": 256, "network_size": [32, 64]}
    plain, metric = numpy_model("dpt_base"), numpy_model("dpt_base", **metres)
    image = picture(32, 64)
    predictor = Predictor(metric, device="cpu", dtype="float64")
    assert predictor.metric
    inverse = Predictor(plain, device="cpu", dtype="float64", size=(32, 64))
    assert not inverse.metric
    assert_same(predictor(image), 1 / (0.3 * inverse(image) + 0.1))


# many pictures


@settings(max_examples=10)
@given(st.lists(SIZES, min_size=1, max_size=6), st.integers(1, 4), st.sampled_from(["depth", "segmentation"]), st.randoms())
def test_results_depend_neither_on_the_batch_nor_on_the_order(sizes: list, batch_size: int, task: str, random: Any) -> None:
    model = numpy_model("dpt_hybrid", task, network_size=32)
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    one = Predictor(model, device="cpu", dtype="float64")
    many = Predictor(model, device="cpu", dtype="float64", batch_size=batch_size)
    alone = [one(image) for image in pictures]
    order = random.sample(range(len(pictures)), len(pictures))
    together = many([pictures[index] for index in order])
    streamed = list(many.stream(iter(pictures)))
    for place, index in enumerate(order):
        for result in (together[place], streamed[index]):
            assert result.shape == alone[index].shape == sizes[index]
            if task == "depth":
                assert_same(result, alone[index])
            else:
                np.testing.assert_array_equal(result, alone[index])


def test_in_float32_a_batch_is_as_exact_as_the_model() -> None:
    """Against the reference in float64, within the noise floor; pictures of the network's size, exact in float32."""
    config = small("dpt_base", network_size=32)
    params = {k: v.astype(np.float32).astype(np.float64) for k, v in model_parameters(config, 3).items()}
    model = DPT(config)
    model.load_state_dict({key: torch.tensor(value, dtype=torch.float32) for key, value in params.items()})
    pictures = [np.random.default_rng(seed).integers(0, 257, (32, 32, 3)) / 256 for seed in range(5)]
    image = np.stack(pictures).transpose(0, 3, 1, 2) * 2 - 1

    def run() -> np.ndarray:
        return reference.apply(params, image, config)[0]

    exact = run()
    allowed = FACTOR * floor(run, exact)
    for batch_size in (1, 2, 5):
        found = np.stack(Predictor(model, device="cpu", batch_size=batch_size)(pictures))
        assert found.dtype == np.float32
        assert relative(found, exact) <= allowed


def test_pictures_of_one_network_shape_share_a_batch() -> None:
    model = Red()
    wide, tall = picture(40, 80), picture(80, 40)
    Predictor(model, device="cpu", batch_size=3)([wide, tall, wide, picture(20, 40), wide, tall])
    assert model.seen == [(3, 3, 32, 64), (1, 3, 32, 64), (2, 3, 64, 32)]
    assert Predictor(model, device="cpu")([]) == []


def test_a_stream_reads_no_further_than_its_batch() -> None:
    read = []

    def endless() -> Iterator[np.ndarray]:
        for index in itertools.count():
            read.append(index)
            yield np.full((4, 5, 3), index % 256, np.uint8)

    stream = Predictor(Red(), device="cpu", batch_size=3).stream(endless())
    assert not read
    for index in range(7):
        assert_same(next(stream), np.full((4, 5), np.float32(index / 255)), 1e-6, scale=1.0)
        assert len(read) == 3 * (index // 3 + 1)


# attention


@settings(max_examples=12)
@given(SIZES, st.integers(0, 3), st.sampled_from([None, 0, 1]), st.booleans(), st.data())
def test_attention_lies_on_the_picture(size: tuple[int, int], block: int, head: int | None, distilled: bool, data: Any) -> None:
    """The row of the token, laid out as patches, resized by OpenCV."""
    name = "dpt_deit_base_distilled" if distilled else "dpt_hybrid"
    model = numpy_model(name, network_size=48, resize_multiple=16)
    image, (height, width) = picture(*size), size
    point = data.draw(st.none() | st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)))
    inputs = preprocess.preprocess(image, model.config)
    rows, columns = inputs.shape[2] // 16, inputs.shape[3] // 16
    prefix = 2 if distilled else 1
    maps = accelerated.attention_maps(model, inputs, [block])[f"attention.{block}"].numpy()[0]
    token = 0
    if point is not None:  # the middle of the pixel, in patches
        middle = ((point[0] + 0.5) / width * columns, (point[1] + 0.5) / height * rows)
        token = prefix + math.floor(middle[1]) * columns + math.floor(middle[0])
    weights = maps[:, token, prefix:].reshape(-1, rows, columns)
    chosen = weights.mean(0) if head is None else weights[head]
    expected = cv2.resize(chosen, (width, height), interpolation=cv2.INTER_LINEAR)
    actual = Predictor(model, device="cpu", dtype="float64").attention(image, block, head, point)
    assert actual.dtype == np.float32
    assert actual.shape == size
    # OpenCV's float32 coordinates: off by at most eps / 2 of the side, a slope of at most the largest weight
    allowed = 2 * (rows + columns + 4) * float(np.finfo(np.float32).eps)
    assert_same(actual.astype(np.float64), expected, allowed, scale=float(chosen.max()))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_a_pixel_is_the_patchs_that_its_middle_lies_in(height: int, width: int, rows: int, columns: int) -> None:
    for x, y in itertools.product(range(width), range(height)):
        row, column = _patch_under((x, y), (height, width), (rows, columns))
        assert row <= (y + Fraction(1, 2)) / height * rows < row + 1
        assert column <= (x + Fraction(1, 2)) / width * columns < column + 1


def test_a_patch_looks_where_its_pixels_are() -> None:
    """With queries that are keys, far apart from patch to patch, each looks at itself."""
    config = small("dpt_base", network_size=48, resize_multiple=16)
    model = DPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        attention = model.backbone.blocks[0]
        attention.norm1.weight.fill_(1)
        model.backbone.pos_embed.copy_(
            torch.randn(model.backbone.pos_embed.shape, generator=torch.Generator().manual_seed(0)) * 9
        )
        attention.attn.qkv.weight[:32].copy_(torch.cat([torch.eye(16)] * 2) * 9)
    predictor = Predictor(model, device="cpu", size=32)
    image = picture(30, 32)  # two patches by two
    for x, y in ((0, 0), (15, 14), (16, 14), (15, 15), (31, 29)):
        weights = predictor.attention(image, 0, point=(x, y))
        corner = weights[0 if y < 15 else -1, 0 if x < 16 else -1]
        assert corner > 0.9
        assert weights.sum() < 0.5 * weights.size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"block": 4}, "block is 4: expected a whole number from 0 to 3"),
        ({"block": -1}, "block is -1: expected a whole number from 0 to 3"),
        ({"block": True}, "block is True: expected a whole number from 0 to 3"),
        ({"block": 0, "head": 2}, "head is 2: expected a whole number from 0 to 1"),
        ({"block": 0, "head": -1}, "head is -1: expected a whole number from 0 to 1"),
        ({"block": 0, "point": (5, 3)}, r"point is \(5, 3\): expected \(x, y\), x from 0 to 4 and y from 0 to 3"),
        ({"block": 0, "point": (4, 4)}, r"point is \(4, 4\): expected \(x, y\), x from 0 to 4 and y from 0 to 3"),
        ({"block": 0, "point": (0, -1)}, r"point is \(0, -1\): expected"),
    ],
)
def test_a_block_head_or_point_that_is_not_there_is_named(arguments: dict, sentence: str) -> None:
    predictor = Predictor(numpy_model("dpt_base", network_size=32), device="cpu")
    with pytest.raises(ValueError, match=f"^{sentence}"):
        predictor.attention(picture(4, 5), **arguments)


def test_a_convolutional_midas_predicts_and_has_no_attention() -> None:
    predictor = Predictor(from_config(small_midas()), device="cpu")
    assert predictor(picture(41, 70)).std() > 0
    with pytest.raises(ValueError, match="midas_v21_small is a convolutional MiDaS, which has no attention: expected a DPT"):
        predictor.attention(picture(41, 70), 0)


def small_midas() -> dict[str, Any]:
    from tests.midas import small as midas

    return midas("midas_v21_small", network_size=64)


# options


def test_the_callers_model_is_copied_only_where_it_has_to_be(depth_model: DPT) -> None:
    assert Predictor(depth_model, device="cpu").model is depth_model
    double = Predictor(depth_model, device="cpu", dtype="float64")
    assert double.model is not depth_model
    assert {parameter.dtype for parameter in double.model.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in depth_model.parameters()} == {torch.float32}
    assert (double.dtype, double.device, double.task) == (torch.float64, torch.device("cpu"), "depth")
    sized = Predictor(depth_model, device="cpu", size=(32, 64))
    assert sized.config["network_size"] == [32, 64]
    assert depth_model.config["network_size"] == 64


def test_a_path_is_opened_as_what_it_is_named(tmp_path: Path, depth_model: DPT) -> None:
    accelerated.save(depth_model, tmp_path / "weights.safetensors")
    image = picture(30, 50)
    expected = Predictor(depth_model, device="cpu")(image)
    for path in (tmp_path / "weights.safetensors", str(tmp_path / "weights.safetensors")):
        np.testing.assert_array_equal(Predictor(path, name="dpt_tiny", device="cpu")(image), expected)
    with pytest.raises(ValueError, match="not the dpt_large it was opened as"):
        Predictor(tmp_path / "weights.safetensors", name="dpt_large")
    with pytest.raises(FileNotFoundError, match="there is no file or folder at"):
        Predictor(tmp_path / "none.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(dtype: str) -> None:
    """The network in half precision rounds to 8 or 11 bits some hundred times: within 100 eps of the range, and not equal."""
    model, image = numpy_model("dpt_base", network_size=32), picture(40, 50)
    half, full = Predictor(model, device="cpu", dtype=dtype), Predictor(model, device="cpu", dtype="float64")
    assert {parameter.dtype for parameter in half.model.parameters()} == {getattr(torch, dtype)}
    actual, expected = half(image), full(image)
    assert actual.dtype == np.float32
    assert not np.array_equal(actual, expected.astype(np.float32))
    assert_same(actual, expected.astype(np.float32), 100 * torch.finfo(getattr(torch, dtype)).eps)
    assert np.isfinite(half.attention(image, 3)).all()


@pytest.mark.parametrize("size", [(30, 50), (100, 40), (33, 200)])
def test_multi_scale_is_segment_and_shrinks_what_is_larger_than_its_largest_scale(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[torch.Tensor, dict]] = []

    def segment(model: Any, image: torch.Tensor, **settings: Any) -> torch.Tensor:
        given.append((image, settings))
        return accelerated.segment(model, image, **settings)

    monkeypatch.setattr("accelerated.predictor.segment", segment)
    model, image = numpy_model("dpt_base", "segmentation", network_size=32), picture(*size)
    predictor = Predictor(model, device="cpu", dtype="float64", multi_scale=True)
    largest = math.ceil(35 * 1.75)  # 13/12 of 32 is 34.7
    seen = image / 255
    if max(size) > largest:
        shrunk = [max(math.floor(side * largest / max(size) + 0.5), 1) for side in size]
        seen = cv2.resize(seen, shrunk[::-1], interpolation=cv2.INTER_CUBIC)
    maps = accelerated.segment(model, torch.tensor(seen.transpose(2, 0, 1)[None] * 2 - 1))[0]
    resized = torch.nn.functional.interpolate(maps[None], size, mode="bicubic", align_corners=False)[0].numpy()
    best = resized.argmax(0)
    close = np.sort(resized, axis=0)
    clear = close[-1] - close[-2] > 1e-5  # elsewhere OpenCV's float32 coordinates may decide
    assert clear.mean() > 0.95
    assert (best != Predictor(model, device="cpu", dtype="float64")(image)).any(), "one scale says the same: nothing is tested"
    np.testing.assert_array_equal(predictor(image)[clear], best[clear])
    ((inputs, settings),) = given
    assert settings == {"crop": 32, "base": 35}, "not the defaults, or not those of the size"
    assert_same(inputs.numpy()[0].transpose(1, 2, 0) / 2 + 0.5, seen, 4 * 1.4 * sum(size) * float(np.finfo(np.float32).eps), 1.0)
    again = Predictor(model, device="cpu", dtype="float64", multi_scale=True, batch_size=2)([image, image[:, ::-1], image])
    np.testing.assert_array_equal(again[2], predictor(image))


def test_the_crop_of_kitti_is_the_middle_of_the_bottom() -> None:
    image = picture(375, 1242)
    predictor = Predictor(Red(), device="cpu", size=(352, 1216), kitti_crop=True, dtype="float64")
    crop = image[23:375, 13:1229]
    assert_same(predictor(image), crop[..., 0] / 255)
    np.testing.assert_array_equal(predictor.view(image), crop)
    for size in ((351, 1242), (375, 1215)):
        sentence = f"a picture of {size[0]} x {size[1]} pixels is too small for KITTI's crop: expected 352 x 1216"
        with pytest.raises(ValueError, match=sentence):
            predictor(picture(*size))


def tiny(**changes: Any) -> Callable[[], Predictor]:
    return lambda: Predictor(numpy_model("dpt_base"), **({"device": "cpu"} | changes))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (tiny(device="tpu"), "unknown device 'tpu': expected auto, cpu, cuda, cuda:N, mps or xpu"),
        (tiny(device="cuda:99"), "the device cuda:99 is not there: "),
        (tiny(device="cpu:1"), "the device cpu:1 is not there: this machine has 1 of that kind"),
        (tiny(dtype="int8"), "unknown dtype 'int8': expected one of float32, bfloat16, float16, float64"),
        (tiny(batch_size=0), "batch_size is 0: expected a whole number of at least 1"),
        (tiny(batch_size=1.5), "batch_size is 1.5: expected a whole number"),
        (tiny(size=0), "size is 0: expected a number of pixels of at least 1, or two"),
        (tiny(size=(32,)), r"size is \(32,\): expected a number of pixels"),
        (tiny(size=(32, -1)), r"size is \(32, -1\): expected a number of pixels"),
        (tiny(size="384"), "size is '384': expected a number of pixels"),
        (tiny(size=True), "size is True: expected a number of pixels"),
        (tiny(multi_scale=True), "multi_scale averages class probabilities: expected a segmentation model"),
        (tiny(name="dpt_base"), "name is 'dpt_base', which says what a weight file holds: expected None beside a model"),
        (lambda: Predictor(torch.nn.Linear(2, 2)), "the model is a Linear: expected a DPT, or the path of its weights"),
        (lambda: Predictor(7), "the model is a int: expected a DPT, or the path of its weights"),
        (
            lambda: Predictor(Red(output_resize="nearest"), device="cpu"),
            "unknown output_resize 'nearest': expected one of bicubic, b",
        ),
        (
            lambda: Predictor(numpy_model("dpt_base", "segmentation"), device="cpu", multi_scale=True, size=(32, 64)),
            "the network size is 32 x 64: multi_scale needs a square window, a multiple of 16 pixels",
        ),
        (
            lambda: Predictor(numpy_model("dpt_base", "segmentation"), device="cpu", multi_scale=True, size=40),
            "the network size is 40 x 40: multi_scale needs a square window, a multiple of 16 pixels",
        ),
    ],
)
def test_an_option_that_makes_no_sense_is_one_sentence(make: Callable, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        make()


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert placement.find_device("auto") == torch.device(expected)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement.find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="the device cuda:2 is not there: this machine has 2 of that kind"):
        placement.find_device("cuda:2")


@pytest.mark.parametrize("image", ["photo.jpg", None, np.zeros((4, 5)), [np.zeros((4, 5, 3)), np.zeros((4, 5, 4))]])
def test_what_is_no_picture_is_refused_before_anything_runs(image: Any) -> None:
    model = Red()
    with pytest.raises(ValueError, match="^the image "):
        Predictor(model, device="cpu")(image)
    assert not model.seen


@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you"), MemoryError()]
)
def test_memory_that_does_not_suffice_is_one_sentence(fault: Exception) -> None:
    def full(image: torch.Tensor) -> torch.Tensor:
        raise fault

    model = Red()
    model.forward = full  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="^not enough memory for 1 at once, as network inputs of 64 x 64$"):
        Predictor(model, device="cpu")(picture(4, 4))


def test_a_fault_of_the_program_is_not_hidden() -> None:
    model = Red()
    model.forward = lambda image: image.no_such_thing  # type: ignore[method-assign]
    with pytest.raises(AttributeError, match="no_such_thing"):
        Predictor(model, device="cpu")(picture(4, 4))


# torch.compile, without the minute that its C++ takes


class Plain(Red):
    """Without the list, which would be compiled anew at every call."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, 0] * 0.2 + 0.4


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))


def test_a_compiled_model_is_the_model_at_every_shape(monkeypatch: pytest.MonkeyPatch, segmentation_model: DPT) -> None:
    shapes: list[tuple[int, ...]] = []

    def backend(graph: Any, inputs: list) -> Any:
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] == 3)
        return graph.forward

    compiled_by(monkeypatch, backend)
    predictor = Predictor(Plain(), device="cpu", compile=True)
    sizes = [(32, 32 * k) for k in range(1, 12)]  # more than torch compiles for by itself
    for size in [*sizes, *sizes]:
        image = picture(*size)
        assert_same(predictor(image), Predictor(Plain(), device="cpu")(image), 1e-6)
    assert len(shapes) == len({preprocess.network_shape(*size, Plain().config) for size in sizes})
    before = len(shapes)
    whole = Predictor(segmentation_model, device="cpu", compile=True, multi_scale=True, size=32)
    eager = Predictor(segmentation_model, device="cpu", multi_scale=True, size=32)
    np.testing.assert_array_equal(whole(picture(32, 32)), eager(picture(32, 32)))
    assert len(shapes) > before, "nothing was compiled"


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found: (None, 'g++')\nand more lines")

    compiled_by(monkeypatch, backend)
    with pytest.raises(
        placement.CompilerError, match="^torch.compile does not work here, .*No working C.. compiler found"
    ) as caught:
        Predictor(Plain(), device="cpu", compile=True)(picture(4, 4))
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_the_gpu_says_what_the_cpu_says(depth_model: DPT) -> None:
    image = picture(60, 90)
    gpu = Predictor(depth_model, dtype="float64")
    assert gpu.device.type == "cuda"
    assert_same(gpu(image), Predictor(depth_model, device="cpu", dtype="float64")(image))
    assert {parameter.device.type for parameter in depth_model.parameters()} == {"cpu"}
    assert_same(gpu.attention(image, 2), Predictor(depth_model, device="cpu", dtype="float64").attention(image, 2), 1e-6)
