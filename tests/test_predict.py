"""`accelerated.predict`: the names and contents of its files, and the command line with everything people may give it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
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
from accelerated import drawing, images, pointcloud
from accelerated import outputs as kinds
from accelerated import predict as cli
from accelerated.dpt import DPT, from_config
from accelerated.inputs import PICTURE_SUFFIXES, expand
from accelerated.outputs import SlowLimits, output_names
from accelerated.placement import CompilerError
from accelerated.predictor import Predictor
from accelerated.video import Video, VideoWriter
from tests import midas
from tests.models import model_parameters, small

ROOT = Path(__file__).parents[1]
PICTURE, VIDEO = (".png", ".pfm", "-color.png"), ("-color.mp4", "")  # what may follow a NAME


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
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 65536, (40, 30), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(rng.integers(0, 256, (50, 30, 3), dtype=np.uint8)).save(folder / "p2.png")
    Image.fromarray(rng.integers(0, 256, (360, 1240, 3), dtype=np.uint8)).save(folder / "road.png")
    film(folder / "film.mp4", 5)
    metres = {"metric_scale": 0.8, "metric_shift": 0.1, "metric_png_scale": 20_000, "network_size": [32, 96]}
    config = small("dpt_base", **metres)
    metric = DPT(config)
    params = {key: torch.tensor(value, dtype=torch.float32) for key, value in model_parameters(config, 0).items()}
    metric.load_state_dict(params)
    accelerated.save(metric, folder / "metric.safetensors")
    accelerated.save(from_config(midas.small("midas_v21_small", network_size=32)), folder / "midas.safetensors")
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no picture")
    (folder / "empty" / ".hidden.png").write_bytes((folder / "good.png").read_bytes())
    return folder


def film(path: Path, frames: int, size: tuple[int, int] = (48, 64)) -> None:
    rng = np.random.default_rng(2)
    with VideoWriter(path, 10) as writer:
        for index in range(frames):
            writer.write(rng.integers(40 * index, 40 * index + 40, (*size, 3), dtype=np.uint8))


# the names


FOLDERS, NAMES, ENDINGS = ["", "a", "b", "out", "out/x"], ["x", "x-2", "x-color", "X", "y"], [".png", ".jpg", ".pfm", ".mp4", ""]
PARTS = st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from(ENDINGS))


@given(st.lists(PARTS, max_size=8, unique=True))
def test_no_file_is_written_twice_and_no_input_replaced(parts: list[tuple[str, str, str]]) -> None:
    inputs = [Path(folder, name + suffix) for folder, name, suffix in parts]
    suffixes = [VIDEO if path.suffix == ".mp4" else PICTURE for path in inputs]
    names = output_names(inputs, Path("out"), suffixes)
    written = [
        str(Path("out", name + ending)).lower() for name, endings in zip(names, suffixes, strict=True) for ending in endings
    ]
    assert len(set(written)) == len(written)
    assert not set(written) & {str(path).lower() for path in inputs}
    assert not set(written) & {str(folder).lower() for path in inputs for folder in path.parents}
    for path, name in zip(inputs, names, strict=True):
        assert name == path.stem or name.startswith(f"{path.stem}-")


def test_names_stay_where_they_can() -> None:
    inputs = [Path("a/x.jpg"), Path("b/x.png"), Path("y.png"), Path("b/x-color.png"), Path("out/z.png"), Path("out/w/1.png")]
    films = [Path("x.mp4"), Path("w.mp4"), Path("v.mp4")]
    names = output_names([*inputs, *films], Path("out"), [PICTURE] * len(inputs) + [VIDEO] * len(films))
    assert names == ["x", "x-2", "y", "x-color-2", "z-2", "1", "x", "w-2", "v"]


# the command line


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as end:  # how argparse ends
        return int(end.code or 0)


def read(folder: Path) -> dict[str, Any]:
    """Every file of a folder by its name; pictures as arrays (colour as RGB), videos as their frames."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".npy":
            found[path.name] = np.load(path)
        elif path.suffix == ".mp4":
            with Video(path) as video:
                found[path.name] = list(video)
        elif path.is_dir():
            found |= {f"{path.name}/{name}": value for name, value in read(path).items()}
        elif path.suffix == ".ply":
            header, _, body = path.read_bytes().partition(b"end_header\n")
            found[path.name] = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
            assert f"element vertex {len(found[path.name])}\n".encode() in header
        else:
            pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert pixels is not None, path
            found[path.name] = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    return found


def assert_files(folder: Path, expected: dict[str, Any]) -> None:
    actual = read(folder)
    assert sorted(actual) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_depth_files_hold_the_prediction(files: Path, tmp_path: Path, depth_model: Any, capsys: pytest.CaptureFixture) -> None:
    picture, folder = files / "good.png", tmp_path / "new" / "folder"
    assert run(picture, "--weights", files / "depth.safetensors", "--output", folder) == 0
    depth = Predictor(depth_model)(images.read_image(picture))
    expected = {"good.png": images.depth_to_uint16(depth), "good.pfm": depth, "good-color.png": images.depth_to_color(depth)}
    assert_files(folder, expected)
    out, err = capsys.readouterr()
    assert err == ""
    assert out == f"{picture} -> {folder / 'good.png'}, {folder / 'good.pfm'}, {folder / 'good-color.png'}\n"


def test_segmentation_files_hold_the_classes(files: Path, tmp_path: Path, segmentation_model: Any) -> None:
    assert run(files / "good.png", "--weights", files / "segmentation.safetensors", "--output", tmp_path) == 0
    image = images.read_image(files / "good.png")
    classes = Predictor(segmentation_model)(image)
    assert len(np.unique(classes)) > 1
    colors, names = drawing.class_palette(9)
    overlay = drawing.with_legend(drawing.overlay(image, classes, colors), classes, colors, names)
    assert_files(tmp_path, {"good.png": classes, "good-color.png": colors[classes], "good-overlay.png": overlay})


def test_a_constant_prediction_is_black(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Predictor, "__call__", lambda _, some: [np.full(image.shape[:2], 3, np.float32) for image in some])
    with np.errstate(all="raise"):
        assert run(files / "good.png", "--weights", files / "depth.safetensors", "--output", tmp_path) == 0
    found = read(tmp_path)
    assert not found["good.png"].any()
    assert (found["good.pfm"] == 3).all()


def test_every_kind_and_option_of_depth(files: Path, tmp_path: Path, depth_model: Any, capsys: Any) -> None:
    """Against the functions that draw and write, which have tests of their own."""
    options = ["--save", "npy,side,ply", "--fov", "70", "--size", "32x64", "--dtype", "float64", "--device", "cpu"]
    options += ["--attention", "taps", "--attention", "0", "--attention", "1"]
    pointed = ["--attention-head", "1", "--attention-point", "7,20"]
    common = [files / "deep.png", "--weights", files / "depth.safetensors", "--model", "dpt_tiny", "--output", tmp_path]
    assert run(*common, *options, *pointed) == 0
    assert capsys.readouterr().out.count("attention-1-head1.png") == 1, "a block named twice is drawn once"
    predictor = Predictor(depth_model, device="cpu", dtype="float64", size=(32, 64))
    image = images.read_image(files / "deep.png")
    assert image.dtype == np.float32
    depth, shown = predictor(image), images.to_uint8(image)
    points = pointcloud.point_cloud(pointcloud.relative_depth(depth), 70.0)
    cloud = np.zeros(image.shape[0] * image.shape[1], [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    cloud["xyz"], cloud["rgb"] = points.reshape(-1, 3), shown.reshape(-1, 3)
    looks = {block: predictor.attention(image, block, 1, (7, 20)) for block in (0, 1, 2)}
    assert_files(
        tmp_path,
        {
            "deep.npy": depth,
            "deep-side.png": drawing.side_by_side(shown, images.depth_to_color(depth)),
            "deep.ply": cloud,
            **{f"deep-attention-{block}-head1.png": drawing.heat(image, look) for block, look in looks.items()},
        },
    )


def test_every_kind_and_option_of_segmentation(files: Path, tmp_path: Path, segmentation_model: Any) -> None:
    options = ["--save", "npy,side", "--multi-scale", "--size", "32", "--attention", "2", "--attention-head", "mean"]
    assert run(files / "good.png", "--weights", files / "segmentation.safetensors", "--output", tmp_path, *options) == 0
    image = images.read_image(files / "good.png")
    predictor = Predictor(segmentation_model, size=32, multi_scale=True)
    classes = predictor(image)
    assert (classes != Predictor(segmentation_model, size=32)(image)).any()
    side = drawing.side_by_side(image, drawing.class_palette(9)[0][classes])
    look = drawing.heat(image, predictor.attention(image, 2))
    assert_files(tmp_path, {"good.npy": classes, "good-side.png": side, "good-attention-2.png": look})


def test_files_of_a_metric_model_are_in_metres(files: Path, tmp_path: Path) -> None:
    weights, options = files / "metric.safetensors", ["--save", "png,pfm,color,ply", "--kitti-crop"]
    assert run(files / "road.png", "--weights", weights, "--output", tmp_path, *options) == 0
    predictor = Predictor(weights, kitti_crop=True)
    image = images.read_image(files / "road.png")
    metres = predictor(image)
    assert metres.shape == (352, 1216)
    assert metres.min() < 1 < 65535 / 20_000 < metres.max(), "nothing is cut off, and nothing tested"
    found = read(tmp_path)
    np.testing.assert_array_equal(found["road.pfm"], metres)
    np.testing.assert_array_equal(found["road.png"], np.minimum(np.rint(metres.astype(np.float64) * 20_000), 65535))
    assert found["road.png"].dtype == np.uint16
    np.testing.assert_array_equal(found["road-color.png"], images.depth_to_color(1 / metres))
    np.testing.assert_array_equal(found["road.ply"]["xyz"][:, 2], -metres.ravel())
    np.testing.assert_array_equal(found["road.ply"]["rgb"], image[-352:, 12:1228].reshape(-1, 3))


def test_metres_that_the_cubic_lost_are_far_and_zero(files: Path) -> None:
    products = kinds.Products(Predictor(files / "metric.safetensors", device="cpu"))
    near = products.nearness(np.array([[2.0, 0.0, -1e5, 0.5]], np.float32))
    np.testing.assert_array_equal(near, [[0.5, 0, 0, 2]])


def test_a_published_name_is_found_and_named(
    files: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture
) -> None:
    def published(name: str) -> Path:
        if name == "offline":
            raise ConnectionError("the weights of offline could not be fetched")
        if name != "dpt_tiny":
            raise ValueError(f"unknown model {name!r}: expected one of those there are")
        return files / "depth.safetensors"

    monkeypatch.setattr(accelerated, "published_file", published, raising=False)
    assert run(files / "good.png", "--model", "dpt_tiny", "--output", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 3
    capsys.readouterr()
    for name, words in (("offline", "could not be fetched"), ("none", "unknown model 'none'")):
        assert run(files / "good.png", "--model", name, "--output", tmp_path) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line


def test_pictures_in_batches_are_the_pictures_alone(files: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    sizes, call = [], Predictor.__call__

    def counted(self: Predictor, some: Any) -> Any:
        sizes.append(len(some))
        return call(self, some)

    monkeypatch.setattr(Predictor, "__call__", counted)
    names = ["good.png", "truncated.png", "also good.jpg", "deep.png", "long.png", "p2.png"]
    arguments = [*(files / name for name in names), "--weights", files / "depth.safetensors", "--save", "npy"]
    assert run(*arguments, "--dtype", "float64", "--output", tmp_path / "1") == 1
    assert run(*arguments, "--dtype", "float64", "--output", tmp_path / "3", "--batch-size", 3) == 1
    assert sizes == [1] * 5 + [3, 2, 1, 1]  # the elongated one cannot be prepared: its batch is tried one by one
    alone, together = read(tmp_path / "1"), read(tmp_path / "3")
    assert sorted(alone) == sorted(together) == ["also good.npy", "deep.npy", "good.npy", "p2.npy"]
    for name, values in alone.items():
        np.testing.assert_allclose(together[name], values, rtol=1e-10)
    lines = capsys.readouterr().err.splitlines()
    assert sorted(lines[:3]) == sorted(lines[3:])
    assert "long.png" in "".join(lines[3:]) and lines[5] == "error: 2 of 6 pictures could not be predicted"


def test_bad_pictures_do_not_stop_the_good_ones(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = {"missing.png": "no such file", "truncated.png": "truncated", "text.png": "not an image", "nan.tif": "NaN",
           "huge.png": "100,010,000 pixels", "long.png": "less elongated"}  # fmt: skip
    names = [*list(bad)[:4], "good.png", *list(bad)[4:], "also good.jpg", "good.png"]
    assert run(*(files / name for name in names), "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 2 * 3, "the good picture given twice is predicted once"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(bad) + 1
    for line, (name, words) in zip(lines, bad.items(), strict=False):
        assert line.startswith(f"error: {files / name}: ")
        assert words in line
    assert lines[-1] == "error: 6 of 8 pictures could not be predicted"


def full_memory(*_: object) -> None:
    raise MemoryError("not enough memory for 1 at once")


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "fault", "words"),
    [
        (Predictor, "_scores", full_memory, "not enough memory"),
        (kinds.images, "write_png", full_disk, "cannot be written (No space left"),
        (kinds.Products, "color", full_memory, "not enough memory"),
    ],
)
def test_a_fault_of_the_machine_is_one_sentence(
    place: Any, name: str, fault: Callable, words: str, files: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(place, name, fault)
    for source in ("good.png", "film.mp4") if name != "write_png" else ("good.png",):
        assert run(files / source, "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {files / source}: ")
        assert words in line
    assert not list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".*"))


def test_the_model_is_compiled_where_that_is_asked_for(files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked = []
    monkeypatch.setattr("accelerated.predictor.compiled", lambda model: asked.append(model) or model)
    arguments = [files / "good.png", "--weights", files / "depth.safetensors", "--output", tmp_path]
    assert run(*arguments) == 0 and not asked
    assert run(*arguments, "--compile") == 0 and len(asked) == 1


def test_a_compiler_that_is_missing_stops_everything(files: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def fault(*_: object) -> None:
        raise CompilerError("torch.compile does not work here, leave it out")

    monkeypatch.setattr(Predictor, "_scores", fault)
    both = [files / "good.png", files / "p2.png", files / "film.mp4"]
    for batch_size in (1, 2):
        options = ["--weights", files / "depth.safetensors", "--output", tmp_path, "--compile", "--batch-size", batch_size]
        assert run(*both, *options) == 1
        assert capsys.readouterr().err == "error: torch.compile does not work here, leave it out\n"
    assert not list(tmp_path.iterdir())


def test_what_prevents_everything_is_one_sentence(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, weights = files / "good.png", files / "depth.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:5000])
    depth, good_options = ["--weights", weights, "--output", tmp_path], [good, "--weights", weights, "--output", tmp_path]
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
        ([good, "--output", tmp_path], 2, "nothing says which model: expected --weights FILE, or --model NAME"),
        (["--weights", weights, "--output", tmp_path], 2, "INPUT"),
        ([*good_options, "--colour"], 2, "--colour"),
        ([files / "empty", *depth], 1, "empty: a folder without pictures and videos"),
        ([files / "*.jpeg", *depth], 1, "*.jpeg: no picture or video matches this pattern"),
        ([*good_options, "--model", "dpt_large"], 1, "not the dpt_large it was opened as"),
        ([*good_options, "--device", "tpu"], 2, "'tpu': expected auto, cpu, cuda, cuda:N, mps or xpu"),
        ([*good_options, "--device", "cuda:77"], 1, "the device cuda:77 is not there"),
        ([*good_options, "--dtype", "int8"], 2, "invalid choice: 'int8'"),
        ([*good_options, "--size", "0"], 2, "'0': expected pixels, as in 384, or height x width"),
        ([*good_options, "--size", "32x"], 2, "'32x': expected pixels"),
        ([*good_options, "--size", "4096"], 1, "good.png: a picture of 50 x 30 pixels needs a network input of 4096 x"),
        ([*good_options, "--batch-size", "0"], 2, "'0': expected a whole number of at least 1"),
        ([*good_options, "--save", "jpg"], 2, "'jpg': expected some of png, pfm, npy, color, side, ply, overlay"),
        ([*good_options, "--save", ""], 2, "'': expected some of png"),
        ([*good_options, "--save", "png,overlay"], 1, "a depth model has no overlay to save: expected png, pfm, npy, color"),
        ([*good_options, "--save", "ply", "--fov", "180"], 2, "'180': expected degrees, more than 0 and less than 180"),
        ([*good_options, "--save", "ply", "--fov", "wide"], 2, "'wide': expected degrees"),
        ([*good_options, "--save", "ply", "--fov", "nan"], 2, "'nan': expected degrees"),
        ([*good_options, "--fov", "60"], 2, "--fov is for the point clouds of --save ply"),
        ([*good_options, "--multi-scale"], 1, "expected a segmentation model, and this one predicts depth"),
        ([*good_options, "--kitti-crop"], 1, "good.png: a picture of 30 x 50 pixels is too small for KITTI's crop"),
        ([*good_options, "--attention", "3"], 1, "block is 3: expected a whole number from 0 to 2"),
        ([*good_options, "--attention", "last"], 2, "'last': expected the number of a block, from 0, or taps"),
        ([*good_options, "--attention", "1", "--attention-head", "3"], 1, "head is 3: expected a whole number from 0 to 2"),
        ([*good_options, "--attention", "1", "--attention-head", "all"], 2, "'all': expected the number of a head"),
        ([*good_options, "--attention", "1", "--attention-point", "4"], 2, "'4': expected a pixel X,Y"),
        (
            [*good_options, "--attention", "1", "--attention-point", "50,0"],
            1,
            "good.png: point is (50, 0): expected (x, y), x from",
        ),
        ([*good_options, "--attention-point", "4,4"], 2, "say more about --attention BLOCK, which is missing"),
        ([*good_options, "--attention-head", "mean"], 2, "say more about --attention BLOCK, which is missing"),
        ([good, "--weights", files / "midas.safetensors", "--output", tmp_path, "--attention", "taps"], 1, "has no attention"),
    ]
    before = set(tmp_path.iterdir())
    for arguments, status, words in cases:
        assert run(*arguments) == status, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        assert words in err
    assert set(tmp_path.iterdir()) == before, "something was written"


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


# what inputs stand for


def test_folders_and_patterns_stand_for_pictures_and_videos_in_natural_order(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.png").mkdir()
    flat = "x10.png x9.JPG x1.mp4 x01.png X2.tif notes.txt .hidden.png p[1].png"
    for name in (*flat.split(), "deep/er/y.webp", "deep/z.bmp"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    here = [Path(name) for name in ("p[1].png", "x1.mp4", "x01.png", "X2.tif", "x9.JPG", "x10.png")]
    assert expand(".") == here
    assert expand(tmp_path) == [tmp_path / path for path in here]
    assert expand("x*") == [path for path in here if path.name[0] == "x"]
    assert expand("**") == expand("**/*") == [Path("deep/er/y.webp"), Path("deep/z.bmp"), *here]
    assert expand("deep/**/*.webp") == [Path("deep/er/y.webp")]
    assert expand("p[1].png") == [Path("p[1].png")], "a file of that very name is meant"
    assert expand("notes.txt") == [Path("notes.txt")], "a file that is named is tried"
    assert expand("missing.png") == [Path("missing.png")]
    for name, words in (("*.gif", "no picture or video matches"), ("folder.png", "a folder without"), ("*.txt", "no picture or")):
        with pytest.raises(images.ImageError, match=f"^{re.escape(name)}: {words}"):
            expand(name)


def test_every_format_that_is_read_is_known_by_its_suffix() -> None:
    Image.init()
    suffixes = {suffix for suffix, name in Image.EXTENSION.items() if name in images._FORMATS}
    assert suffixes - {".apng", ".avifs", ".pfm"} <= set(PICTURE_SUFFIXES)


@given(st.lists(st.integers(0, 10**12), unique=True, max_size=6))
def test_numbers_in_names_count(numbers: list[int]) -> None:
    from accelerated.inputs import _natural

    paths = [Path(f"a{number}b{number}.png") for number in numbers]
    assert sorted(paths, key=_natural) == [Path(f"a{number}b{number}.png") for number in sorted(numbers)]


def test_inputs_that_stand_for_nothing_do_not_stop_the_others(files: Path, tmp_path: Path, capsys: Any) -> None:
    inputs = [files / "empty", files / "p*.png", files / "p2.png", files / "*.jpeg"]
    assert run(*inputs, "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out.startswith(f"{files / 'p2.png'} -> ") and out.count("\n") == 1
    first, second, count = err.splitlines()
    assert "a folder without pictures" in first and "no picture or video matches" in second
    assert count == "error: 2 of 3 inputs could not be predicted, or not in full"


# videos


def test_a_video_of_depth_holds_its_frames(files: Path, tmp_path: Path, depth_model: Any, capsys: Any) -> None:
    """Colours with limits that follow slowly, as of the formula; frames numbered; the longer video of before is gone."""
    (tmp_path / "film").mkdir()
    for name in ("000006.png", "000005.npy", "000006.txt", "000006.pfm", "x6.png"):
        (tmp_path / "film" / name).touch()
    options = ["--save", "color,png,side,npy", "--attention", "1", "--dtype", "float64", "--batch-size", "2"]
    assert run(files / "film.mp4", "--weights", files / "depth.safetensors", "--output", tmp_path, *options) == 0
    names = ["film-color.mp4", "film-side.mp4", "film-attention-1.mp4"]
    shown = ", ".join(str(tmp_path / name) for name in [*names, "film"])
    assert capsys.readouterr().out == f"{files / 'film.mp4'} -> {shown}/ (5 frames)\n"
    kept = {"000006.txt", "000006.pfm", "x6.png"}
    numbered = {f"{index:06}.{kind}" for index in range(1, 6) for kind in ("png", "npy")}
    assert {path.name for path in (tmp_path / "film").iterdir()} == numbered | kept
    for name in kept:
        (tmp_path / "film" / name).unlink()
    predictor = Predictor(depth_model, dtype="float64")
    with Video(files / "film.mp4") as video:
        frames, rate = list(video), video.rate
    found = read(tmp_path)
    low = high = None
    inferno = images.depth_to_color(np.arange(256.0, dtype=np.float32)[None])[0].astype(int)
    for index, frame in enumerate(frames):
        depth = predictor(frame)
        np.testing.assert_allclose(found[f"film/{index + 1:06}.npy"], depth, rtol=1e-10)
        np.testing.assert_array_equal(found[f"film/{index + 1:06}.png"], images.depth_to_uint16(depth))
        share = 1 if low is None else 1 - np.exp(-1 / 10)
        low = depth.min() if low is None else low + share * (depth.min() - low)
        high = depth.max() if high is None else high + share * (depth.max() - high)
        color = inferno[np.rint(np.clip((depth - low) / (high - low), 0, 1) * 255).astype(int)]
        for name, expected in (
            ("film-color.mp4", color),
            ("film-side.mp4", drawing.side_by_side(frame, color.astype(np.uint8))),
            ("film-attention-1.mp4", drawing.heat(frame, predictor.attention(frame, 1))),
        ):
            assert found[name][index].shape[0] == expected.shape[0]
            coded = found[name][index][:, : expected.shape[1]]
            assert np.abs(coded - expected.astype(float)).mean() < 12, (name, index)  # H.264 at a quality of 18, half the chroma
    assert len(frames) == len(found["film-color.mp4"]) == 5
    with Video(tmp_path / "film-color.mp4") as video:
        assert video.rate == rate == 10


def test_limits_follow_slowly_and_what_lies_outside_has_the_last_colours(files: Path) -> None:
    limits = SlowLimits(10)
    assert limits.follow(np.array([[1.0, 3.0]])) == (1, 3)
    for _ in range(10):
        low, high = limits.follow(np.array([[2.0, 13.0]]))
    assert low == pytest.approx(2 - np.exp(-1))
    assert high == pytest.approx(13 - 10 * np.exp(-1))
    products = kinds.Products(Predictor(files / "depth.safetensors", device="cpu"))
    dark, bright = images.depth_to_color(np.array([[0.0, 1.0]], np.float32))[0]
    np.testing.assert_array_equal(products.color(np.array([[0.0, 9.0]]), (1, 2))[0], [dark, bright])
    np.testing.assert_array_equal(products.color(np.array([[5.0, 5.0]]), (5, 5))[0], [dark, dark])


def test_a_video_of_classes_and_the_defaults(files: Path, tmp_path: Path, segmentation_model: Any) -> None:
    arguments = [files / "film.mp4", "--weights", files / "segmentation.safetensors", "--output"]
    assert run(*arguments, tmp_path / "plain") == 0
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["film-color.mp4"]
    assert run(*arguments, tmp_path / "both", "--save", "overlay,png") == 0
    found = read(tmp_path / "both")
    assert sorted(found) == ["film-overlay.mp4", *(f"film/{index:06}.png" for index in range(1, 6))]
    predictor, colors = Predictor(segmentation_model), drawing.class_palette(9)[0]
    with Video(files / "film.mp4") as video:
        for index, frame in enumerate(video):
            classes = predictor(frame)
            np.testing.assert_array_equal(found[f"film/{index + 1:06}.png"], classes)
            expected = drawing.overlay(frame, classes, colors).astype(float)
            assert np.abs(found["film-overlay.mp4"][index] - expected).mean() < 12


def test_inputs_are_predicted_in_their_order(files: Path, tmp_path: Path, capsys: Any) -> None:
    inputs = [files / name for name in ("p2.png", "film.mp4", "good.png")]
    assert run(*inputs, "--weights", files / "depth.safetensors", "--output", tmp_path, "--batch-size", 5) == 0
    assert [line.partition(" -> ")[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, inputs))


def test_a_damaged_video_is_predicted_as_far_as_it_goes(files: Path, tmp_path: Path, capsys: Any) -> None:
    film(tmp_path / "cut.mp4", 6)
    data = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "text.mp4").write_text("not a video")
    videos = [tmp_path / "cut.mp4", tmp_path / "text.mp4", tmp_path / "none.mp4", files / "film.mp4"]
    assert run(*videos, "--weights", files / "depth.safetensors", "--output", tmp_path / "out", "--save", "color,npy") == 1
    cut, text, none, count = capsys.readouterr().err.splitlines()
    whole = len(read(tmp_path / "out")["cut-color.mp4"])
    assert 0 < whole < 6
    assert re.fullmatch(r"error: .*cut\.mp4: (1 frame|[2-6] frames) could not be decoded and left out", cut)
    assert f": {6 - whole} frame" in cut
    assert text.startswith(f"error: {tmp_path / 'text.mp4'}: not a video") and "no such file" in none
    assert count == "error: 3 of 4 inputs could not be predicted, or not in full"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cut-color.mp4", "cut", "film-color.mp4", "film"}
    assert len(list((tmp_path / "out" / "cut").iterdir())) == whole


@pytest.mark.parametrize("kind", ["film.mp4", "good.png"])
def test_an_interruption_leaves_complete_files_only(kind: str, files: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked, scores = [], Predictor._scores

    def interrupted(self: Predictor, inputs: Any) -> Any:
        asked.append(inputs)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return scores(self, inputs)

    monkeypatch.setattr(Predictor, "_scores", interrupted)
    inputs = [files / kind] if kind == "film.mp4" else [files / "good.png", files / "deep.png", files / "p2.png"]
    with pytest.raises(KeyboardInterrupt):
        run(*inputs, "--weights", files / "depth.safetensors", "--output", tmp_path, "--save", "color,npy")
    found = read(tmp_path)
    if kind == "film.mp4":
        assert sorted(found) == ["film/000001.npy", "film/000002.npy"]
    else:
        assert sorted(found) == ["deep-color.png", "deep.npy", "good-color.png", "good.npy"]


def test_ctrl_c_ends_with_130(files: Path, tmp_path: Path) -> None:
    film(tmp_path / "long.mp4", 6, (480, 640))
    command = [sys.executable, "-m", "accelerated.predict", "long.mp4", "--weights", files / "depth.safetensors"]
    options = ["--size", "1024", "--save", "npy,color", "--output", "out", "--device", "cpu"]
    with subprocess.Popen(
        [*command, *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests run in the background inherit its being ignored
    ) as process:
        deadline = time.monotonic() + 100
        while not (tmp_path / "out" / "long" / "000001.npy").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["long"]
    for path in (tmp_path / "out" / "long").iterdir():
        assert path.suffix == ".part" or np.load(path).shape == (480, 640)
    assert not list((tmp_path / "out" / "long").glob("*.part"))


def test_bars_are_drawn_for_the_frames_of_a_video_on_a_terminal(
    files: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    arguments = [files / "film.mp4", "--weights", files / "depth.safetensors", "--output", tmp_path]
    assert run(*arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(*arguments) == 0
    assert "/5 [" in capsys.readouterr().err


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


def test_what_nobody_foresaw_costs_one_input(
    files: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture
) -> None:
    read = images.read_image

    def strange(path: Path) -> np.ndarray:
        if path.name == "good.png":
            raise KeyError("a bug")
        return read(path)

    monkeypatch.setattr(images, "read_image", strange)
    both = files / "good.png", files / "also good.jpg"
    assert run(*both, "--weights", files / "depth.safetensors", "--output", tmp_path) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: {both[0]}: cannot be predicted, for a reason that nobody foresaw (KeyError: 'a bug')"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["also good-color.png", "also good.pfm", "also good.png"]
