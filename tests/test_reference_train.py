"""`python -m reference.train`: what it reads, what each option does, what it leaves behind, and what it says."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import accelerated
import reference
from accelerated.data import scene_cache
from accelerated.data.scenes import CLASSES, GENERATOR_VERSION, TRAIN_SEED
from accelerated.recipe import Recipe
from reference import scenes as stored
from reference import train
from tests.models import small

ROOT = Path(__file__).parents[1]
LAYOUT = scene_cache.Layout(GENERATOR_VERSION, TRAIN_SEED, stored.SIZE)
NAME = f"seed-{stored.SEED}-size-{stored.SIZE}"


def scene(i):
    """A scene whose depth and classes can be read off its colours: image, depth (0 where there is none), label."""
    rng, side = np.random.default_rng(i), stored.SIZE
    rows, columns = np.mgrid[:side, :side] / side
    blob = np.hypot(rows - rng.uniform(0.2, 0.8), columns - rng.uniform(0.2, 0.8)) < 0.25
    near = np.where(blob, 0.9, 0.2 + 0.5 * rows)
    image = np.stack([near, 1 - near, rng.random((side, side))], axis=-1)
    depth = np.where(rows < 0.05, 0, 1 / near)
    return (255 * image).astype(np.uint8), depth.astype(np.float32), np.where(blob, 6, 1 + (rows > 0.5)).astype(np.uint8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Six scenes, written by the accelerated form."""
    folder = tmp_path_factory.mktemp("cache")
    with scene_cache.opened(folder / NAME, LAYOUT, 6) as store:
        store.allocate()
        with store.writer() as writer:
            for i in range(6):
                writer.put(i, scene(i))
            writer.record()
    return folder


@pytest.fixture
def reduced(monkeypatch):
    """A smaller dpt_tiny, where what is trained does not matter."""
    monkeypatch.setattr(train, "configuration", lambda _, task, num_classes: small("dpt_tiny", task) | classes(num_classes))


def classes(num_classes):
    return {} if num_classes is None else {"num_classes": num_classes}


def run(cache, folder, *options, steps=4, batch=2, crop=32, scenes=4):
    """Run the command in this process: its exit status."""
    numbers = {"--steps": steps, "--batch": batch, "--crop": crop, "--scenes": scenes}
    arguments = [str(part) for pair in numbers.items() for part in pair]
    return train.main([*arguments, "--cache", str(cache), "--folder", str(folder), *options])


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(folder):
    return reference.load(folder / "weights.safetensors")[0]


def test_the_scenes_are_those_that_the_accelerated_form_trains_on(cache):
    assert (TRAIN_SEED, Recipe().size, len(CLASSES)) == (stored.SEED, stored.SIZE, stored.CLASSES)
    scenes = stored.load_scenes(cache, 5)
    for i in range(5):
        for have, want in zip(scenes, scene(i), strict=True):
            assert have.dtype == want.dtype
            assert (have[i] == want).all()
    assert all(len(array) == 5 for array in scenes)


# ---- a run ---------------------------------------------------------------------------------------------------------------------


def test_a_run_from_the_command_line_learns_and_its_weights_open_in_pytorch(cache, tmp_path):
    command = [sys.executable, "-m", "reference.train", "--cache", str(cache), "--folder", str(tmp_path / "a" / "b")]
    options = ["--steps", "10", "--batch", "2", "--crop", "48", "--scenes", "6"]
    result = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("depth: dpt_tiny, 3.1 M parameters, 6 scenes; into ")
    assert lines[-3].startswith("step 10/10  loss ") and lines[-3].endswith(" images/s  0:00 left")
    assert lines[-2].startswith("correlation ")
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "weights.safetensors"]
    model = accelerated.load(folder / "weights.safetensors")
    assert model.config == reference.configuration("dpt_tiny")
    # On whole scenes, the trained model is much nearer to the truth than the one that it began as.
    scenes = stored.load_scenes(cache, 6)
    image = stored.normalized(scenes.image, model.config)
    inverse, known = train.inverse_depth(scenes.depth)
    began = reference.initialize(model.config, np.random.default_rng(0))
    before, _ = reference.losses.correlation_loss(reference.apply(began, image, model.config)[0], inverse, known)
    with torch.no_grad():
        after, _ = reference.losses.correlation_loss(model(torch.tensor(image)).numpy(), inverse, known)
    assert after < before / 2, f"{after}, {before}"


def test_segmentation_learns_with_statistics_and_a_decaying_rate(cache, tmp_path, reduced, capsys):
    assert run(cache, tmp_path, "--task", "segmentation", steps=30, crop=48) == 0
    log = rows(tmp_path)
    assert np.mean([row["loss"] for row in log[-5:]]) < 0.7 * np.mean([row["loss"] for row in log[:5]])
    assert np.mean([row["score"] for row in log[-5:]]) > np.mean([row["score"] for row in log[:5]])
    factors = [(1 - step / 30) ** 0.9 for step in range(30)]
    for group, rate in zip(("backbone_rate", "decoder_rate"), train.RATES["segmentation"], strict=True):
        np.testing.assert_allclose([row[group] for row in log], [rate * factor for factor in factors], rtol=1e-5)
    trained, config = reference.load(tmp_path / "weights.safetensors")
    assert config["num_classes"] == len(CLASSES)
    assert all(value.any() for key, value in trained.items() if key.endswith("running_mean"))
    assert accelerated.load(tmp_path / "weights.safetensors").segments
    assert capsys.readouterr().out.splitlines()[-2].startswith("accuracy ")


def test_the_log_has_a_row_per_step(cache, tmp_path, reduced):
    assert run(cache, tmp_path, "--backbone-rate", "0.001", "--decoder-rate", "0.02") == 0
    log = rows(tmp_path)
    assert tuple(log[0]) == train.COLUMNS
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(b["seconds"] > a["seconds"] for a, b in zip([{"seconds": 0.0}, *log], log, strict=False))
    assert all(row["backbone_rate"] == 0.001 and row["decoder_rate"] == 0.02 for row in log), "constant for depth"
    # The first step's loss is what the first crops of the first scenes say: the correlation alone.
    assert log[0]["loss"] == pytest.approx(1 - log[0]["score"], abs=1e-5)
    np.testing.assert_allclose([row["images_per_second"] for row in log], [2 * r["step"] / r["seconds"] for r in log], rtol=1e-4)


def test_every_option_has_its_effect(cache, tmp_path, reduced):
    def trained(name, *options, **numbers):
        assert run(cache, tmp_path / name, *options, **numbers) == 0
        return weights(tmp_path / name)

    def differing(a, b):
        return {key.partition(".")[0] for key in a if (a[key] != b[key]).any()}

    every = {"backbone", "reassemble", "fusion", "head"}
    first = trained("first")
    assert differing(first, trained("again")) == set(), "the same command, the same weights"
    assert differing(first, trained("seed", "--seed", "1")) == every
    for name in ("batch", "crop", "steps", "scenes"):
        numbers = {"batch": 3, "crop": 48, "steps": 5, "scenes": 3}
        assert differing(first, trained(name, **{name: numbers[name]})) == every, name
    began = reference.initialize(small("dpt_tiny"), np.random.default_rng(0))
    assert differing(began, first) == every
    assert differing(began, trained("backbone", "--decoder-rate", "0")) == {"backbone"}
    assert differing(began, trained("decoder", "--backbone-rate", "0")) == every - {"backbone"}
    assert "head.conv3.weight" in first
    assert "auxiliary.classifier.weight" in trained("task", "--task", "segmentation")


def test_the_default_folder_is_named_after_the_task(cache, tmp_path, reduced, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--steps", "1", "--batch", "1", "--crop", "32", "--scenes", "1", "--cache", str(cache)]) == 0
    assert (tmp_path / "runs" / "reference-depth" / "weights.safetensors").is_file()
    assert train.parse(["--task", "segmentation"]).folder == Path("runs/reference-segmentation")


# ---- what a batch is -----------------------------------------------------------------------------------------------------------


def test_batches_pass_over_all_scenes_before_any_comes_again():
    drawn = list(stored.batches(5, 3, 10, np.random.default_rng(0)))
    assert [len(batch) for batch in drawn] == [3] * 10
    order = np.concatenate(drawn)
    passes = order.reshape(6, 5)
    assert (np.sort(passes, axis=1) == np.arange(5)).all()
    assert len({tuple(one) for one in passes}) > 1
    large = list(stored.batches(2, 5, 2, np.random.default_rng(0)))
    assert np.bincount(np.concatenate(large)).tolist() == [5, 5]


def test_crops_are_aligned_squares_from_anywhere_mirrored_half_the_time():
    side = stored.SIZE
    place = np.arange(side * side).reshape(1, side, side)
    scenes = stored.Scenes(np.stack([place] * 3, axis=-1), place.astype(np.float32), place)
    rng, seen = np.random.default_rng(0), []
    for _ in range(200):
        image, depth, label = stored.random_crops(scenes, np.array([0, 0]), 64, rng)
        assert (image[..., 0] == label).all() and (depth == label).all()
        assert label.shape == (2, 64, 64)
        for one in label:
            step = one[0, 1] - one[0, 0]
            left = min(one[0, 0], one[0, -1])
            top, left = divmod(left, side)
            assert (one[:, ::step] == place[0, top : top + 64, left : left + 64]).all()
            seen.append((top, left, step))
    tops, lefts, steps = np.array(seen).T
    assert (tops.min(), tops.max()) == (lefts.min(), lefts.max()) == (0, side - 64)
    assert set(steps) == {-1, 1} and abs(np.mean(steps)) < 6 / np.sqrt(len(steps))


def test_images_are_normalised_as_the_configuration_says():
    image = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 2.0]}
    y = stored.normalized(image, config)
    assert y.shape == (2, 3, 4, 5) and y.dtype == np.float32 and y.flags.c_contiguous
    expected = (image[1, 2, 3] / 255 - config["image_mean"]) / config["image_std"]
    np.testing.assert_allclose(y[1, :, 2, 3], expected, rtol=1e-5)


# ---- words ---------------------------------------------------------------------------------------------------------------------


def refused(capsys, status=2):
    """The one sentence on stderr."""
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("error: "), captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "normals"], "argument --task: invalid choice: 'normals'"),
        (["--steps", "0"], "argument --steps: '0' does not fit: expected a whole number of at least 1"),
        (["--batch", "two"], "argument --batch: 'two' does not fit: expected a whole number of at least 1"),
        (["--seed", "-1"], "argument --seed: '-1' does not fit: expected a whole number of at least 0"),
        (["--scenes", "1.5"], "argument --scenes: '1.5' does not fit"),
        (["--crop", "40"], "--crop is 40: expected a multiple of 16, at most 64, the size of the scenes"),
        (["--crop", "112"], "--crop is 112: expected a multiple of 16, at most 64"),
        (["--backbone-rate", "-1"], "argument --backbone-rate: '-1' does not fit: expected a number of at least 0"),
        (["--decoder-rate", "inf"], "argument --decoder-rate: 'inf' does not fit"),
        (["--decoder-rate", "fast"], "argument --decoder-rate: 'fast' does not fit"),
        (["--speed", "3"], "unrecognized arguments: --speed 3 (python -m reference.train --help lists the options)"),
        (["--task", "segmentation", "--batch", "1", "--crop", "32"], "--batch is 1: batch norm needs at least 2 where"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_sentence(options, message, capsys):
    assert train.main(options) == 2
    assert message in refused(capsys)


def test_one_image_is_enough_for_batch_norm_from_48_pixels_on(cache, tmp_path, reduced):
    assert run(cache, tmp_path, "--task", "segmentation", steps=1, batch=1, crop=48, scenes=1) == 0
    assert run(cache, tmp_path, "--task", "segmentation", steps=1, batch=2, crop=16, scenes=1) == 0


def damaged(cache, tmp_path, change):
    """A copy of the cache with `change(folder)` made to it."""
    folder = tmp_path / "cache" / NAME
    folder.mkdir(parents=True)
    for path in (cache / NAME).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder.parent


def rewrite(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def flip_a_byte(folder):
    image = np.load(folder / "image.npy")
    image[2, 5, 6, 1] ^= 1
    np.save(folder / "image.npy", image)


def forget(folder):
    rewrite(folder, scenes=[*json.loads((folder / "manifest.json").read_text())["scenes"][:3], None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "there is no .*manifest.json: .* renders the scenes"),
        (lambda folder: (folder / "depth.npy").unlink(), "there is no .*depth.npy: .* renders the scenes"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read .*: .* renders them anew"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "cannot be read .*: .* renders them anew"),
        (lambda folder: (folder / "manifest.json").write_text('{"seed": 1, "size": 64}'), "cannot be read .*'scenes'"),
        (lambda folder: (folder / "label.npy").write_bytes(b"half"), "cannot be read .*: .* renders them anew"),
        (lambda folder: (folder / "label.npy").write_bytes(b""), "cannot be read .*: .* renders them anew"),
        (lambda folder: np.save(folder / "depth.npy", np.zeros((6, 64, 64))), "does not hold scenes of seed 1 and size 64"),
        (lambda folder: np.save(folder / "image.npy", np.zeros((6, 64, 60, 3), np.uint8)), "does not hold scenes of seed 1 and"),
        (lambda folder: rewrite(folder, seed=2), "does not hold scenes of seed 1 and size 64: .* renders them"),
        (lambda folder: rewrite(folder, size=128), "does not hold scenes of seed 1 and size 64: .* renders them"),
        (forget, "does not hold 4 scenes: .* renders what is missing"),
        (lambda folder: rewrite(folder, scenes=[]), "does not hold 4 scenes: .* renders what is missing"),
        (flip_a_byte, "scene 2 in .* does not have its checksum: .* renders it anew"),
    ],
)
def test_scenes_that_cannot_be_used_are_refused_with_the_command_that_renders_them(cache, tmp_path, capsys, change, message):
    bad = damaged(cache, tmp_path, change)
    assert run(bad, tmp_path / "run") == 2
    sentence = refused(capsys)
    with pytest.raises(ValueError, match=message):
        raise ValueError(sentence)
    command = f"`python -c \"from accelerated.data.scenes import load_scenes; load_scenes(1, 4, 64, '{bad}')\"`"
    assert command in sentence
    assert not (tmp_path / "run").exists()


def test_the_command_that_renders_is_one(tmp_path, capsys, monkeypatch):
    """What stands between the backticks is Python that calls the accelerated form with these arguments."""
    assert run(tmp_path / "none", tmp_path / "run", scenes=7) == 2
    code = refused(capsys).split('"')[1]
    calls = []
    monkeypatch.setattr("accelerated.data.scenes.load_scenes", lambda *arguments: calls.append(arguments))
    exec(code, {})
    assert calls == [(1, 7, 64, str(tmp_path / "none"))]


def test_a_scene_beyond_those_asked_for_may_be_missing_or_damaged(cache, tmp_path, reduced):
    assert run(damaged(cache, tmp_path, forget), tmp_path / "run", steps=1, scenes=3) == 0
    assert run(damaged(cache, tmp_path / "other", flip_a_byte), tmp_path / "run", steps=1, scenes=2) == 0


def test_a_folder_that_cannot_be_is_refused(cache, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(cache, tmp_path / "file" / "run") == 2
    assert "run cannot be made: Not a directory" in refused(capsys)


def test_a_run_that_diverges_says_so_and_keeps_the_weights_of_before(cache, tmp_path, reduced, capsys):
    assert run(cache, tmp_path, "--backbone-rate", "1e30", "--decoder-rate", "1e30", steps=9) == 1
    assert "stopped at step 2: the model's output is no longer finite: lower the learning rates" in refused(capsys)
    assert weights(tmp_path).keys() == reference.parameter_shapes(small("dpt_tiny")).keys()
    assert len(rows(tmp_path)) == 1


def test_an_interrupted_run_keeps_its_weights(cache, tmp_path, reduced, capsys, monkeypatch):
    step, calls = train.depth_step, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train, "depth_step", interrupted)
    assert run(cache, tmp_path) == 130
    assert f"error: interrupted after step 2: {tmp_path} holds the weights so far" in capsys.readouterr().err
    kept, before = weights(tmp_path), calls[2][0]
    assert all((kept[key] == before[key]).all() for key in before)
    calls[:] = [None, None]
    assert run(cache, tmp_path) == 130
    assert "error: interrupted after step 0" in capsys.readouterr().err
    assert all((weights(tmp_path)[key] == kept[key]).all() for key in kept), "what an earlier run left is not replaced by nothing"
    monkeypatch.setattr(train, "load_scenes", interrupted_at_once)
    assert run(cache, tmp_path) == 130
    assert capsys.readouterr().err.endswith("error: interrupted before the first step\n")


def interrupted_at_once(*arguments):
    raise KeyboardInterrupt


def test_the_score_of_depth_is_the_correlation_and_0_where_there_is_none():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 5, (3, 4, 5))
    depth[0, 0] = 0
    prediction = 1 / np.maximum(depth, 1)
    assert train.correlation(3 * prediction + 1, depth) == pytest.approx(1)
    assert train.correlation(-prediction, depth) == pytest.approx(-1)
    prediction[0, 0] = 1e9  # where depth is unknown, nothing counts
    assert train.correlation(prediction, depth) == pytest.approx(1)
    prediction[1] = 0.3  # a dead model's
    depth[2] = 2
    assert train.correlation(prediction, depth) == pytest.approx(1 / 3)
    assert train.correlation(prediction, np.zeros_like(depth)) == 0


def test_labels_that_are_no_classes_are_refused(tmp_path, capsys):
    rows = list(scene(0))
    rows[2] = np.where(rows[2] == 6, stored.CLASSES, rows[2]).astype(np.uint8)
    with scene_cache.opened(tmp_path / NAME, LAYOUT, 1) as store:
        store.allocate()
        with store.writer() as writer:
            writer.put(0, rows)
            writer.record()
    assert run(tmp_path, tmp_path / "run", scenes=1) == 2
    assert "holds the label 18: expected classes from 0 to 17" in refused(capsys)


def test_on_a_terminal_one_line_is_rewritten(capsys, monkeypatch):
    monkeypatch.setattr(train.sys.stdout, "isatty", lambda: True, raising=False)
    for step in (1, 2, 3):
        train.report(step, 3, f"loss {step}", 4.0, 10.0 * step)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("\n")
    first, second, third = out[1:].split("\r")
    assert first.rstrip() == "step 1/3  loss 1  4.0 images/s  0:20 left"
    assert second.rstrip() == "step 2/3  loss 2  4.0 images/s  0:10 left"
    assert third.rstrip() == "step 3/3  loss 3  4.0 images/s  0:00 left"
    assert len(second) >= len(first.rstrip())


def test_elsewhere_some_twenty_lines_are_printed(capsys):
    for step in range(1, 1001):
        train.report(step, 1000, "", 1.0, 60.0 * step)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == train.LINES
    assert lines[-1].startswith("step 1000/1000")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_report_is_shown_at_once(capsys, monkeypatch, terminal):
    flushed = []
    monkeypatch.setattr(train.sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(train.sys.stdout, "flush", lambda: flushed.append(True), raising=False)
    train.report(1, 1, "loss 1", 4.0, 10.0)
    assert flushed


def test_the_help_says_what_it_is_and_what_each_option_is_unless_given(capsys):
    with pytest.raises(SystemExit):
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert " ".join(train.__doc__.partition("\n")[0].split()) in text
    for name, value in vars(train.parse([])).items():
        if name in ("task", "steps", "batch", "crop", "seed", "scenes", "cache"):
            assert re.search(rf"--{name} [^-]*\({value}\)", text), name


def test_the_rates_of_either_task():
    for task, rate in (("depth", 3e-4), ("segmentation", 2e-2)):
        options = train.parse(["--task", task])
        assert (options.backbone_rate, options.decoder_rate) == (rate, rate)


def test_the_score_shown_is_the_mean_of_the_last_ten(cache, tmp_path, reduced, capsys):
    assert run(cache, tmp_path / "run", steps=3) == 0
    shown = [float(number) for number in re.findall(r"correlation (-?[\d.]+)", capsys.readouterr().out)]
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        scores = [float(list(row.values())[3]) for row in csv.DictReader(file)]
    expected = [sum(scores[:k]) / k for k in (1, 2, 3)]
    assert shown[:3] == pytest.approx(expected, abs=6e-4)
