"""Training, end to end on small scenes: what a run leaves behind, what stops it, that what the recipe says is what happens."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import accelerated
from accelerated import engine
from accelerated.data.scenes import CLASSES, SceneArrays, load_scenes
from accelerated.parallel import World
from accelerated.recipe import Recipe
from accelerated.run_folder import COLUMNS, RunFolder
from accelerated.tasks import Depth, Segment
from accelerated.train import main
from tests.equality import assert_same

SMALL = (
    "--size 32 --crops 32,48 --crop_shares 1,1 "
    "--training_scenes 8 --validation_scenes 2 --held_out_scenes 3 --batch_size 4 --threads 1"
)
FILES = {"recipe.yaml", "weights.safetensors", "metrics.csv", "learning_curve.png", "panels.png", "results.json"}


def drawn_scenes(seed: int, count: int, size: int, cache: Path) -> SceneArrays:
    """Stands in for the renderer: a floor and a box before a sky; the nearer, the darker. One scene has no known depth."""
    rng = np.random.default_rng(seed)
    rows = np.arange(size)[:, None] + np.zeros((1, size))
    depth, label = np.zeros((2, count, size, size), np.float32)
    for z, classes in zip(depth, label, strict=True):
        horizon = rng.uniform(0.2, 0.5) * size
        z[:] = np.where(rows > horizon, np.minimum(2 * size / np.maximum(rows - horizon, 1), 30), 0)
        classes[:] = z > 0
        left, top, side = (int(v) for v in rng.integers([0, size // 3, size // 4], [size // 2, size // 2, size // 2]))
        z[top : top + side, left : left + side] = rng.uniform(1, 3)
        classes[top : top + side, left : left + side] = 2
    image = np.repeat(np.where(depth > 0, 20 + 6 * depth, 250)[..., None], 3, axis=-1)
    depth[0] = 0
    return SceneArrays(image.astype(np.uint8), depth, label.astype(np.uint8))


@pytest.fixture(autouse=True)
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "load_scenes", drawn_scenes)


def run(runs: Path, arguments: str = "") -> int:
    """Run one small recipe to its end; where it promises nothing, the exit status says only that it came there."""
    bars = "--baseline_bar None --permuted_bar None"
    return main(f"demo --runs {runs} --cache {runs}/scenes {SMALL} {bars} {arguments}".split())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_weights(first: Path, second: Path) -> None:
    """Bit for bit; the files may differ, since nothing fixes the order of their metadata."""
    a, b = (accelerated.to_numpy(accelerated.load(run / "weights.safetensors")) for run in (first, second))
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] == b[key]).all(), f"{key} differs between two runs of one recipe on one CPU"


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_run_leaves_everything_and_the_same_again(task: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run(tmp_path, f"--name {name} --task {task} --steps 4 --validations 2") == 0
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    events = {name for name in first if name.startswith("events.out.tfevents.")}
    assert first.keys() - events == FILES and events
    assert first["recipe.yaml"] == second["recipe.yaml"]
    assert_same_weights(tmp_path / "first", tmp_path / "second")

    recipe = Recipe(**yaml.safe_load(first["recipe.yaml"]))
    assert (recipe.task, recipe.steps, recipe.size) == (task, 4, 32)
    rows = list(csv.DictReader(first["metrics.csv"].decode().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["validation"] != "" for row in rows] == [False, True, False, True]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    for name in ("learning_curve.png", "panels.png"):
        assert min(Image.open(tmp_path / "first" / name).size) > 200

    results = json.loads(first["results.json"])
    model = accelerated.load(tmp_path / "first" / "weights.safetensors")
    assert model.config["task"] == task and not model.training
    assert results["metric"] == {"depth": "AbsRel", "segmentation": "mIoU"}[task]
    held_out = drawn_scenes(engine.HELD_OUT_SEED, 3, 32, tmp_path)
    job = {"depth": Depth, "segmentation": Segment}[task](recipe)
    cpu = engine.Device(torch.device("cpu"), torch.float32, "")
    whole = engine.Run(recipe, job, cpu, RunFolder(tmp_path), World(cpu.device))
    again = job.score(engine.predict(whole, model, torch.tensor(held_out.image)), job.targets(held_out))
    assert results["model"] == pytest.approx(again, rel=1e-5), "the saved weights are not those that were judged"


def test_a_finished_run_is_reused_and_another_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--steps 2") == 0
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "demo")
    with monkeypatch.context() as patch:
        patch.delattr(engine, "load_scenes")  # any attempt to train would fail
        assert run(tmp_path, "--steps 2") == 0
        assert "not repeated" in capsys.readouterr().out
        assert run(tmp_path, "--steps 3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--overwrite" in error and str(tmp_path / "demo") in error
    assert contents(tmp_path / "demo") == before

    assert run(tmp_path, "--steps 3 --overwrite true") == 0
    after = contents(tmp_path / "demo")
    assert after.pop("notes.txt") == b"mine"
    assert after["weights.safetensors"] != before["weights.safetensors"]
    assert sum(name.startswith("events.") for name in after) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finished", lambda self, recipe: pytest.fail("--overwrite true looked for a finished run"))
        assert run(tmp_path, "--steps 3 --overwrite true") == 0


def at_call(number: int, action: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The depth loss, with something happening at its call `number`."""
    calls = 0
    loss = Depth.loss

    def replaced(self: Depth, *arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = loss(self, *arguments)  # type: ignore[arg-type]
        return action(value) if calls == number else value

    return replaced


@pytest.mark.parametrize(
    "action",
    [lambda loss: loss * torch.nan, lambda loss: torch.sqrt(loss - loss.detach())],
    ids=["loss", "gradient"],
)
def test_a_value_that_is_not_finite_stops_the_run_with_the_last_good_weights(
    action: Callable[[torch.Tensor], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Depth, "loss", at_call(3, action))
    assert run(tmp_path, "--steps 5") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "step 3" in error and "scenes [" in error
    weights = accelerated.to_numpy(accelerated.load(tmp_path / "demo" / "weights.safetensors"))
    assert all(np.isfinite(value).all() for value in weights.values())
    assert not (tmp_path / "demo" / "results.json").exists()


def test_a_run_that_is_interrupted_before_its_first_snapshot_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(loss: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Depth, "loss", at_call(3, interrupt))
        assert run(tmp_path, "--steps 4 --validations 2") == 130
    assert capsys.readouterr().err.count("\n") == 1
    accelerated.load(tmp_path / "demo" / "weights.safetensors")  # of the validation at step 2
    assert run(tmp_path, "--steps 4 --validations 2") == 0
    assert run(tmp_path, "--name undisturbed --steps 4 --validations 2") == 0
    assert_same_weights(tmp_path / "demo", tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ("--model dpt_huge", 2, "'dpt_huge'"),
        ("--crops 32,40 --crop_shares 1,1", 2, "crops = 40"),  # a list that is given twice is one list
        ("--crops 16 --crop_shares 1", 2, "crops = 16"),
        ("--crops 32", 2, "crop_shares has 2 numbers for 3 crops"),
        ("--accumulation 2", 2, "accumulation = 2 does not fit anchor = 0.1"),
        ("--size 40", 2, "size = 40"),
        ("--runs /dev/null/runs", 1, "/dev/null/runs"),
    ],
)
def test_what_cannot_run_is_said_in_one_sentence(
    arguments: str, status: int, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, f"--steps 1 {arguments}") == status
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and expected in printed.err
    assert not (tmp_path / "demo").exists()


def test_promises_decide_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promise = "--steps 1 --permuted_bar None --baseline_bar"
    assert run(tmp_path, f"{promise} 1e6") == 0
    assert "met" in capsys.readouterr().out
    for _ in ("trained", "reused"):
        assert run(tmp_path, f"--name missed {promise} 1e-6") == 3
        assert "MISSED" in capsys.readouterr().out


def test_a_model_learns_what_it_is_shown(tmp_path: Path) -> None:
    """Eight scenes, many steps: the loss falls far below what a predictor that does not look could reach."""
    arguments = "--steps 100 --warmup 0.1 --average_decay 0.9 --color_jitter 0 --weight_decay 0 --smallest_window 1"
    assert run(tmp_path, f"{arguments} --correlation 0 --untrimmed 0.3") == 0
    rows = list(csv.DictReader((tmp_path / "demo" / "metrics.csv").open()))
    losses = [float(row["loss"]) for row in rows]
    assert np.mean(losses[-10:]) < 0.35 * np.mean(losses[:10])


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1))
def test_the_learning_rate_rises_then_falls_to_nothing(steps: int, warmup: float) -> None:
    recipe = Recipe(steps=steps, warmup=warmup)
    factors = np.array([engine.learning_rate_factor(step, recipe) for step in range(steps)])
    top = round(warmup * steps)
    assert (factors > 0).all() and factors.max() == pytest.approx(1)
    assert (np.diff(factors[:top]) > 0).all() and (np.diff(factors[top:]) < 0).all()
    assert_same(factors[:top], np.arange(1, top + 1) / max(top, 1))
    assert engine.learning_rate_factor(steps, recipe) == pytest.approx(0, abs=1e-12) or top == steps


def test_two_learning_rates_reach_every_parameter_once() -> None:
    recipe = Recipe(backbone_learning_rate=1e-3, decoder_learning_rate=2e-3)
    model = Depth(recipe).create_model()
    rates = {id(p): group["lr"] for group in engine.make_optimizer(model, recipe).param_groups for p in group["params"]}
    expected = {id(p): 1e-3 if name.startswith("backbone.") else 2e-3 for name, p in model.named_parameters()}
    assert rates == expected


@given(decay=st.floats(0, 0.999), count=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_average_of_the_weights(decay: float, count: int, seed: int) -> None:
    """Against the recursion, written out."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((count + 1, 4))
    average, expected = [torch.tensor(values[0])], values[0]
    for n, value in enumerate(values[1:], start=1):
        engine.move_average(average, [torch.tensor(value)], n, decay)
        keep = min(decay, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * value
    assert_same(average[0].numpy(), expected)


@given(count=st.integers(1, 20), batch=st.integers(1, 30), steps=st.integers(1, 20), seed=st.integers(0, 99))
def test_every_pass_shows_every_scene_once(count: int, batch: int, steps: int, seed: int) -> None:
    order = engine.Order(count, batch, torch.Generator().manual_seed(seed))
    indices = [next(order) for _ in range(steps)]
    assert [len(part) for part in indices] == [batch] * steps
    shown = torch.cat(indices)
    for whole in shown[: len(shown) // count * count].view(-1, count):
        assert sorted(whole.tolist()) == list(range(count))


@given(steps=st.integers(1, 60), shares=st.lists(st.floats(0.05, 3), min_size=1, max_size=4))
def test_every_crop_gets_its_share_of_the_steps_in_order(steps: int, shares: list[float]) -> None:
    crops = [16 * (len(shares) - stage) for stage in range(len(shares))]  # the order is the recipe's, not that of size
    recipe = Recipe(steps=steps, crops=crops, crop_shares=shares)
    taken = [engine.crop_at(step, recipe) for step in range(steps)]
    assert taken == sorted(taken, reverse=True)
    for crop, share in zip(crops, shares, strict=True):
        assert abs(taken.count(crop) - steps * share / sum(shares)) <= 1


@given(height=st.integers(1, 12), width=st.integers(1, 12), side=st.integers(1, 16))
def test_validation_scenes_are_scaled_like_whole_windows(height: int, width: int, side: int) -> None:
    numbers = torch.arange(3 * height * width).view(3, height, width)
    got = engine.scaled(engine.Scenes(numbers[..., None].expand(-1, -1, -1, 3), numbers), side)
    assert got.target.shape == (3, side, side) and (got.image == got.target[..., None]).all()
    image, row, column = np.unravel_index(got.target.numpy(), (3, height, width))
    assert (image == np.arange(3)[:, None, None]).all()
    if height == width:  # the i-th pixel is the one in which the middle of the i-th of `side` equal parts lies
        expected = ((np.arange(side) + 0.5) / side * height).astype(int)
        assert (row == expected[:, None]).all() and (column == expected).all()
    assert np.ptp(row[0, :, 0]) <= min(height, width) and np.ptp(column[0, 0]) <= min(height, width)


@given(steps=st.integers(1, 500), marks=st.integers(1, 500))
def test_marks_are_evenly_spread_and_end_with_the_last_step(steps: int, marks: int) -> None:
    hit = [step for step in range(1, steps + 1) if engine.is_mark(step, steps, marks)]
    assert len(hit) == min(steps, marks) and hit[-1] == steps
    assert max(np.diff([0, *hit])) - min(np.diff([0, *hit])) <= 1


@pytest.mark.parametrize("correlation", [0.0, 0.25])
def test_the_correlation_blends_into_the_papers_loss_which_is_trimmed_late(
    correlation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With losses of 1, 100 and 1000, what comes out says how much of each went in."""
    kept = []

    def paper(*_: torch.Tensor, **options: float) -> torch.Tensor:
        kept.append(options["kept"])
        return torch.tensor(100.0)

    monkeypatch.setattr("accelerated.tasks.depth_loss", paper)
    monkeypatch.setattr("accelerated.tasks.correlation_loss", lambda *_: torch.tensor(1.0))
    monkeypatch.setattr("accelerated.tasks.anchor_loss", lambda *_: torch.tensor(1000.0))
    task = Depth(Recipe(kept=0.8, untrimmed=0.75, correlation=correlation, anchor=0.3))
    maps = torch.rand(1, 2, 2)
    values = [float(task.loss(maps, maps, progress)) - 300 for progress in (0.0, 0.25, 0.375, 0.5, 0.74, 0.75, 0.99)]
    if correlation:
        assert values == pytest.approx([1, 1, 50.5, 100, 100, 100, 100])
        assert kept == [1.0, 1.0, 1.0, 0.8, 0.8]
    else:
        assert values == pytest.approx([100] * 7)
        assert kept == [1.0] * 5 + [0.8] * 2


def test_the_precision_is_what_the_cpu_multiplies_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for amx, avx512, dtype, words in (
        (True, True, torch.bfloat16, "AMX"),
        (False, True, torch.bfloat16, "AVX512-BF16"),
        (False, False, torch.float32, "float32"),
    ):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda answer=amx: answer)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=avx512: answer)
        device = engine.choose_device(1)
        assert device.dtype == dtype and words in device.words
        with device.autocast():
            assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == dtype


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_results({"model": 1})

    def half(path: Path) -> None:
        path.write_text("{")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        folder.replace(folder.results, half)
    assert json.loads(folder.results.read_text()) == {"model": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_segmentation_has_every_class_of_the_scenes() -> None:
    model = Segment(Recipe(task="segmentation")).create_model()
    assert model.config["num_classes"] == len(CLASSES)


def test_the_whole_way_from_the_renderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stand-in: scenes are rendered, cached, learnt from, and reused by the next run."""
    monkeypatch.setattr(engine, "load_scenes", load_scenes)
    small = "--training_scenes 3 --validation_scenes 1 --held_out_scenes 2 --steps 1"
    assert run(tmp_path, small) == 0
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*.npy")}
    assert cached
    assert run(tmp_path, f"{small} --name again") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*.npy")} == cached
