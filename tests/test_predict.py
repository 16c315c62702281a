"""`accelerated.predict`: the function, the names of its files, and the command line with everything people may give it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import accelerated
from accelerated import images
from accelerated import predict as cli
from accelerated.predict import SUFFIXES, output_names, predict
from tests.equality import assert_same

ROOT = Path(__file__).parents[1]
SIDES = st.integers(1, 150)


class Red(torch.nn.Module):
    """A model whose answer is known: the red channel of its input, in [0, 1], as inverse depth."""

    def __init__(self) -> None:
        super().__init__()
        self.config = accelerated.configuration("dpt_tiny") | {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.dropout(image[:, 0] * 0.2 + 0.4)


@pytest.fixture(scope="module")
def depth_model() -> accelerated.DPT:
    torch.manual_seed(0)
    model = accelerated.create_model("dpt_tiny")
    torch.nn.init.constant_(model.head.conv3.bias, 1.0)  # keep the last ReLU open, so that there is a picture to predict
    return model


@pytest.fixture(scope="module")
def segmentation_model() -> accelerated.DPT:
    torch.manual_seed(0)
    return accelerated.create_model("dpt_tiny", task="segmentation", num_classes=9)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, depth_model: Any, segmentation_model: Any) -> Path:
    """A folder with weights of both tasks, a good picture and every kind of bad one."""
    folder = tmp_path_factory.mktemp("files")
    accelerated.save(depth_model, folder / "depth.safetensors")
    accelerated.save(segmentation_model, folder / "segmentation.safetensors")
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    for name in ("good.png", "also good.jpg"):
        Image.fromarray(picture).save(folder / name)
    (folder / "truncated.png").write_bytes((folder / "good.png").read_bytes()[:3000])
    (folder / "text.png").write_text("not a picture")
    Image.fromarray(np.full((4, 5), np.nan, np.float32)).save(folder / "nan.tif")
    Image.new("1", (120_000, 100)).save(folder / "long.png")
    Image.new("1", (10_001, 10_000)).save(folder / "huge.png")
    Image.fromarray(picture).save(folder / "damaged.tif", compression="tiff_lzw")
    damaged = bytearray((folder / "damaged.tif").read_bytes())
    damaged[500:2000] = bytes(1500)  # libtiff has much to say about it
    (folder / "damaged.tif").write_bytes(damaged)
    return folder


# the function


@given(SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_the_prediction_lies_on_the_image(height: int, width: int, seed: int) -> None:
    """Through a model that hands over its red channel, with OpenCV as witness of both resizings."""
    coarse = np.random.default_rng(seed).random((4, 4, 3))
    image = np.clip(cv2.resize(coarse, (width, height)), 0, 1)
    h, w = cli.preprocess(image, Red().config).shape[2:]
    red = cv2.resize(image[..., 0], (w, h), interpolation=cv2.INTER_CUBIC)
    expected = cv2.resize(red, (width, height), interpolation=cv2.INTER_CUBIC)
    actual = predict(Red(), image)
    assert actual.dtype == np.float32
    # float32 coordinates up to the sides, each off by eps / 2 of itself, moving the value by less than 3 (tests/test_preprocess)
    assert_same(actual.astype(np.float64), expected, 4 * 1.4 * (h + w) * float(np.finfo(np.float32).eps), scale=1.0)


def test_uint8_and_its_float_are_the_same_image(depth_model: Any) -> None:
    image = np.random.default_rng(1).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    np.testing.assert_array_equal(predict(depth_model, image), predict(depth_model, image / 255))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 400), (700, 2), (33, 31), (128, 160)])
def test_any_size_has_a_prediction_and_the_model_stays_as_it_was(
    size: tuple[int, int], depth_model: Any, segmentation_model: Any
) -> None:
    image = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    segmentation_model.train()
    segmentation_model.head.bn.eval()
    before = {key: value.clone() for key, value in segmentation_model.state_dict().items()}
    depth, classes = predict(depth_model, image), predict(segmentation_model, image)
    assert depth.shape == classes.shape == size
    assert (depth.dtype, classes.dtype) == (np.float32, np.uint8)
    assert np.isfinite(depth).all()
    assert classes.max() < 9
    np.testing.assert_array_equal(classes, predict(segmentation_model, image), err_msg="dropout or batch statistics at work")
    assert segmentation_model.training
    assert not segmentation_model.head.bn.training
    assert all(torch.equal(before[key], value) for key, value in segmentation_model.state_dict().items())


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_a_class_is_the_largest_logit_at_the_size_of_the_image(classes: int, dtype: Any) -> None:
    logits = torch.randn(classes, 6, 8, generator=torch.Generator().manual_seed(0))
    logits[0] -= 2
    ids = cli._classes(logits, (13, 21)).numpy()
    resized = torch.nn.functional.interpolate(logits[None], (13, 21), mode="bicubic", align_corners=False)[0]
    assert ids.dtype == dtype
    np.testing.assert_array_equal(ids, resized.argmax(0).numpy())
    assert not cli._classes(torch.zeros(3, 2, 2), (4, 4)).any(), "on a tie, the lowest id"


def test_a_prediction_that_is_not_finite_is_refused() -> None:
    model = Red()
    model.forward = lambda image: torch.full((1, *image.shape[2:]), torch.nan)
    with pytest.raises(ValueError, match="prediction is not finite"):
        predict(model, np.zeros((4, 5, 3), np.uint8))


def test_the_model_decides_the_precision() -> None:
    image = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    depth = predict(Red().double(), image)
    assert_same(depth, image[..., 0] / 255)  # the network's own size: nothing is resized


# the names


FOLDERS, NAMES, ENDINGS = ["", "a", "b", "out"], ["x", "x-2", "x-color", "X", "y"], [".png", ".jpg", ".pfm"]
PARTS = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from(ENDINGS))


@given(st.lists(PARTS, max_size=8, unique=True), st.sampled_from(sorted(SUFFIXES)))
def test_no_file_is_written_twice_and_no_picture_replaced(parts: list[tuple[str, str, str]], task: str) -> None:
    pictures = [Path(folder, name + suffix) for folder, name, suffix in parts]
    names = output_names(pictures, Path("out"), SUFFIXES[task])
    written = [Path("out", name + suffix) for name in names for suffix in SUFFIXES[task]]
    assert len({str(path).lower() for path in written}) == len(names) * len(SUFFIXES[task])
    assert not {str(path).lower() for path in written} & {str(path).lower() for path in pictures}
    for picture, name in zip(pictures, names, strict=True):
        assert name == picture.stem or name.startswith(f"{picture.stem}-")


def test_names_stay_where_they_can() -> None:
    pictures = [Path("a/x.jpg"), Path("b/x.png"), Path("y.png"), Path("b/x-color.png"), Path("out/z.png")]
    assert output_names(pictures, Path("out"), SUFFIXES["depth"]) == ["x", "x-2", "y", "x-color-2", "z-2"]


# the command line


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # how argparse ends
        return int(end.code or 0)


def test_depth_files_hold_the_prediction(files: Path, tmp_path: Path, depth_model: Any, capsys: pytest.CaptureFixture) -> None:
    picture, folder = files / "good.png", tmp_path / "new" / "folder"
    assert run(picture, "--weights", files / "depth.safetensors", "--output", folder) == 0
    depth = predict(depth_model, images.read_image(picture))
    read = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in folder.iterdir()}
    assert sorted(read) == ["good-color.png", "good.pfm", "good.png"]
    np.testing.assert_array_equal(read["good.pfm"], depth)
    np.testing.assert_array_equal(read["good.png"], images.depth_to_uint16(depth))
    np.testing.assert_array_equal(read["good-color.png"][..., ::-1], images.depth_to_color(depth))
    out, err = capsys.readouterr()
    assert err == ""
    assert out == f"{picture} -> {folder / 'good.png'}, {folder / 'good.pfm'}, {folder / 'good-color.png'}\n"


def test_segmentation_files_hold_the_classes(files: Path, tmp_path: Path, segmentation_model: Any) -> None:
    assert run(files / "good.png", "--weights", files / "segmentation.safetensors", "--output", tmp_path) == 0
    classes = predict(segmentation_model, images.read_image(files / "good.png"))
    assert len(np.unique(classes)) > 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good-color.png", "good.png"]
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "good.png"), cv2.IMREAD_UNCHANGED), classes)
    color = cv2.imread(str(tmp_path / "good-color.png"))[..., ::-1]
    np.testing.assert_array_equal(color, images.class_colors(9)[classes])


def test_a_constant_prediction_is_black(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "predict", lambda _, image: np.full(image.shape[:2], 3, np.float32))
    with np.errstate(all="raise"):
        assert run(files / "good.png", "--weights", files / "depth.safetensors", "--output", tmp_path) == 0
    assert not cv2.imread(str(tmp_path / "good.png"), cv2.IMREAD_UNCHANGED).any()
    assert (cv2.imread(str(tmp_path / "good.pfm"), cv2.IMREAD_UNCHANGED) == 3).all()


def test_bad_pictures_do_not_stop_the_good_ones(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = {"missing.png": "no such file", "truncated.png": "truncated", "text.png": "not an image", "nan.tif": "NaN",
           "huge.png": "100,010,000 pixels", "long.png": "less elongated", ".": "a folder"}  # fmt: skip
    names = [*list(bad)[:4], "good.png", *list(bad)[4:], "also good.jpg", "good.png"]
    assert run(*(files / name for name in names), "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2 * 3, "the good picture given twice is predicted once"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad) + 1
    for line, (name, words) in zip(lines, bad.items(), strict=False):
        assert line.startswith(f"error: {files / name}: ")
        assert words in line
    assert lines[-1] == "error: 7 of 9 pictures could not be predicted"


def not_enough_memory(*_: object) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried\nto allocate")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "fault", "words"),
    [("predict", not_enough_memory, "not enough memory"), ("write_prediction", full_disk, "cannot be written (No space left")],
)
def test_a_fault_of_the_machine_is_one_sentence(
    place: str, fault: Callable, words: str, files: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, place, fault)
    assert run(files / "good.png", "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {files / 'good.png'}: ")
    assert words in line


def test_what_prevents_everything_is_one_sentence(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, weights = files / "good.png", files / "depth.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:5000])
    cases: list[tuple[list[object], int, str]] = [
        ([good, "--weights", weights, "--output", good], 1, "good.png: cannot be created as output folder"),
        ([good, "--weights", weights, "--output", good / "below"], 1, "below: cannot be created as output folder"),
        ([good, "--weights", files / "none.safetensors", "--output", tmp_path], 1, "none.safetensors"),
        ([good, "--weights", good, "--output", tmp_path], 1, "good.png"),
        ([good, "--weights", files / "text.png", "--output", tmp_path], 1, "text.png"),
        ([good, "--weights", tmp_path / "cut.safetensors", "--output", tmp_path], 1, "cut.safetensors"),
        ([good, "--weights", tmp_path / "cut.pt", "--output", tmp_path], 1, "cut.pt"),
        ([good, "--weights", files, "--output", tmp_path], 1, str(files)),
        ([good, "--weights", weights], 2, "--output"),
        (["--weights", weights, "--output", tmp_path], 2, "IMAGE"),
        ([good, "--weights", weights, "--output", tmp_path, "--colour"], 2, "--colour"),
    ]
    for arguments, status, words in cases:
        assert run(*arguments) == status, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert words in err


def test_a_folder_without_permission_is_named(
    files: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as a user to whom nothing is forbidden
    assert run(files / "good.png", "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: no permission to write into this output folder\n"


def test_a_bar_is_drawn_for_several_pictures_on_a_terminal(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    both, options = (
        [files / "good.png", files / "also good.jpg"],
        ["--weights", files / "depth.safetensors", "--output", tmp_path],
    )
    assert run(*both, *options) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*both, *options) == 0
    assert "2/2" in capsys.readouterr().err
    assert run(both[0], *options) == 0
    assert capsys.readouterr().err == ""


def test_the_command_as_people_type_it(files: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "accelerated.predict",
        "damaged.tif",
        "--weights",
        "depth.safetensors",
        "good.png",
        "--output",
    ]
    done = subprocess.run([*command, tmp_path], cwd=files, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 1
    sentence, count = done.stderr.splitlines()
    assert sentence.startswith("error: damaged.tif: cannot be read, or is damaged or cut short")
    assert count == "error: 1 of 2 pictures could not be predicted"
    assert len(list(tmp_path.iterdir())) == 3
    assert done.stdout.startswith("good.png -> ")
