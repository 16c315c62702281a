"""Training goes on after whatever ended it: snapshots that are whole, kills at random moments, signals, a full disk."""

from __future__ import annotations

import functools
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from accelerated import engine
from accelerated.recipe import Recipe
from accelerated.signals import StopSignal
from accelerated.snapshots import Snapshots
from accelerated.tasks import Depth
from tests.processes import ended, in_child
from tests.test_train import assert_same_weights, contents, drawn_scenes, run

STEPS = "--steps 12 --validations 3 --smallest_window 0.7"
KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(autouse=True)
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "load_scenes", drawn_scenes)


# ---- a run ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(task: str, tmp_path: Path) -> None:
    """Snapshots after every step, so that kills fall into them too. KILLS=20 in the environment asks for as many."""
    arguments = f"{STEPS} --task {task} --snapshot_seconds 0"
    began = time.monotonic()
    assert ended(in_child(lambda: run(tmp_path, f"--name undisturbed {arguments}"))) == 0
    whole = time.monotonic() - began
    moments, kills, anew = random.Random(task), 0, ""
    while kills < KILLS:
        child = in_child(functools.partial(run, tmp_path, f"--name killed {arguments}{anew}"))
        time.sleep(moments.uniform(0.02, 0.4) * whole)
        os.kill(child, signal.SIGKILL)
        status = ended(child)
        assert status in (0, -signal.SIGKILL)
        kills += status == -signal.SIGKILL
        anew = " --overwrite true" if status == 0 else ""  # it was faster than the kills
    assert ended(in_child(functools.partial(run, tmp_path, f"--name killed {arguments}"))) == 0
    assert_same_weights(tmp_path / "killed", tmp_path / "undisturbed")
    killed, undisturbed = contents_of(tmp_path / "killed"), contents_of(tmp_path / "undisturbed")
    assert killed["metrics.csv"].count(b"\n") == undisturbed["metrics.csv"].count(b"\n") == 13
    assert columns(killed["metrics.csv"]) == columns(undisturbed["metrics.csv"])
    assert not (tmp_path / "killed" / "snapshots").exists()
    assert not [name for name in killed if "partial" in name]


def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def columns(metrics: bytes) -> list[list[str]]:
    """Everything that does not depend on the clock: step, loss, validation and both learning rates."""
    rows = [line.split(",") for line in metrics.decode().splitlines()]
    return [[row[0], row[2], row[3], *row[5:]] for row in rows]


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(
    kind: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[float] = []
    loss = Depth.loss

    def heard(self: Depth, *given: object) -> torch.Tensor:
        steps.append(float(given[2]))  # type: ignore[arg-type]
        if len(steps) == 5:
            os.kill(os.getpid(), kind)
        return loss(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Depth, "loss", heard)
    previous = signal.signal(kind, signal.default_int_handler)  # also where the tests' own parent ignores it
    try:
        assert run(tmp_path, STEPS) == status
    finally:
        signal.signal(kind, previous)
    said = capsys.readouterr().err
    assert f"stopped after step 5 of 12 by {kind.name}, all saved: the same command goes on from there" in said
    assert said.count("\n") == 1
    assert run(tmp_path, STEPS) == 0
    assert "going on after step 5 of 12" in capsys.readouterr().out
    assert len(steps) == 12
    assert run(tmp_path, f"{STEPS} --name undisturbed") == 0
    assert_same_weights(tmp_path / "demo", tmp_path / "undisturbed")


def test_a_run_may_be_told_to_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ("--resume never", "--overwrite true"):
        half_a_run(tmp_path)
        assert run(tmp_path, f"{STEPS} {arguments}") == 0
        assert "going on" not in capsys.readouterr().out


def half_a_run(runs: Path) -> None:
    """A run of 12 steps that a kill ended after the snapshot of step 7."""

    def die(step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> int:
        save = Snapshots.save

        def save_and_die(self: Snapshots, step: int, state: dict) -> Path:
            path = save(self, step, state)
            die(step)
            return path

        Snapshots.save = save_and_die  # type: ignore[method-assign]  # in the child alone
        return run(runs, f"{STEPS} --snapshot_seconds 0 --overwrite true")

    assert ended(in_child(work)) == -signal.SIGKILL


def test_a_damaged_snapshot_is_passed_over_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_a_run(tmp_path)
    snapshots = sorted((tmp_path / "demo" / "snapshots").iterdir())
    assert [path.name[:13] for path in snapshots] == ["step-00000006", "step-00000007"]
    spoilt = bytearray(snapshots[1].read_bytes())
    spoilt[len(spoilt) // 2] ^= 1
    snapshots[1].write_bytes(spoilt)
    assert run(tmp_path, STEPS) == 0
    said = capsys.readouterr().out
    assert f"{snapshots[1]} is damaged (its content is not what its name says): an older snapshot is looked for" in said
    assert "going on after step 6 of 12" in said
    assert run(tmp_path, f"{STEPS} --name undisturbed") == 0
    assert_same_weights(tmp_path / "demo", tmp_path / "undisturbed")


def test_where_no_snapshot_is_whole_the_run_says_that_it_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_a_run(tmp_path)
    for path in (tmp_path / "demo" / "snapshots").iterdir():
        path.write_bytes(b"")
    assert run(tmp_path, STEPS) == 0
    said = capsys.readouterr().out
    assert "an older snapshot is looked for" in said and "there is no older snapshot, so the run begins anew" in said
    assert "going on" not in said


def test_snapshots_whose_recipe_is_gone_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half_a_run(tmp_path)
    recipe = tmp_path / "demo" / "recipe.yaml"
    content, before = recipe.read_text(), contents(tmp_path / "demo" / "snapshots")
    recipe.unlink()
    assert run(tmp_path, STEPS) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "demo holds snapshots of a run, but not its recipe.yaml: put that back" in said
    assert contents(tmp_path / "demo" / "snapshots") == before
    recipe.write_text(content)
    assert run(tmp_path, STEPS) == 0
    assert "going on after step 7 of 12" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["lacks", "other"])
def test_a_snapshot_of_another_version_is_refused_and_kept(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half_a_run(tmp_path)
    snapshots = Snapshots(tmp_path / "demo" / "snapshots")
    found = snapshots.newest(print)
    assert found is not None
    if change == "lacks":
        del found.state["queue"]
    else:
        found.state["model"].popitem()
    snapshots.save(8, found.state)
    assert run(tmp_path, STEPS) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the snapshot of step 8 in" in said and "begin anew with --resume never" in said
    assert snapshots.steps() == [8, 7]
    assert run(tmp_path, f"{STEPS} --resume never") == 0


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a limit on the size of a file, which the weights keep and the snapshot, thrice as large, does not."""
    half_a_run(tmp_path)
    before = contents(tmp_path / "demo" / "snapshots")
    weights = (tmp_path / "demo" / "weights.safetensors").stat().st_size

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * weights, resource.RLIM_INFINITY))
        return run(tmp_path, f"{STEPS} --snapshot_seconds 0")

    assert ended(in_child(work)) == 1
    assert contents(tmp_path / "demo" / "snapshots") == before
    assert run(tmp_path, STEPS) == 0
    assert "going on after step 7 of 12" in capsys.readouterr().out


# ---- snapshots -----------------------------------------------------------------------------------------------------------------


def test_the_newest_whole_snapshot_is_found_and_old_ones_are_dropped(tmp_path: Path) -> None:
    snapshots, said = Snapshots(tmp_path / "s", keep=3), []
    assert snapshots.newest(said.append) is None
    for step in (1, 2, 9, 10, 100_000_000):
        snapshots.save(step, {"x": torch.full((3,), step), "text": "t", "rows": [{"a": float("nan")}]})
    names = sorted(path.name.split("-")[1] for path in (tmp_path / "s").iterdir())
    assert names == ["00000009", "00000010", "100000000"]
    (tmp_path / "s" / "step-00000011-notahash.pt").write_bytes(b"of somebody else")
    found = snapshots.newest(said.append)
    assert found is not None and found.step == 100_000_000 and found.state["x"].tolist() == [100_000_000] * 3
    assert not said


@pytest.mark.parametrize("damage", ["emptied", "cut", "changed", "renamed", "unreadable"])
def test_damage_of_any_kind_is_found(damage: str, tmp_path: Path) -> None:
    snapshots, said = Snapshots(tmp_path), []
    snapshots.save(1, {"x": torch.ones(50)})
    path = snapshots.save(2, {"x": torch.zeros(50)})
    data = path.read_bytes()
    if damage == "renamed":
        path.rename(path.with_name(path.name.replace("00000002", "00000003").replace(path.stem[-4:], "0000")))
    elif damage == "unreadable":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"emptied": b"", "cut": data[:-1], "changed": data[:99] + bytes([data[99] ^ 8]) + data[100:]}[damage])
    found = snapshots.newest(said.append)
    assert found is not None and found.step == 1 and found.state["x"].sum() == 50
    assert len(said) == 1 and "is damaged" in said[0] and "an older snapshot is looked for" in said[0]


def test_a_snapshot_that_cannot_be_written_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = Snapshots(tmp_path)
    kept = snapshots.save(1, {"x": 1})

    def fail(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space left on device"):
                snapshots.save(2, {"x": 2})
        assert list(tmp_path.iterdir()) == [kept]
    snapshots.clear()
    assert not tmp_path.exists()
    with pytest.raises(ValueError, match="keep is 0: expected at least 1"):
        Snapshots(tmp_path, keep=0)


# ---- what a run goes by --------------------------------------------------------------------------------------------------------


def test_an_order_goes_on_from_its_queue_and_generator() -> None:
    order = engine.Order(7, 4, torch.Generator().manual_seed(3))
    for _ in range(5):
        next(order)
    again = engine.Order(7, 4, torch.Generator())
    again.queue = order.queue.clone()
    again.generator.set_state(order.generator.get_state())
    for _ in range(9):
        assert torch.equal(next(order), next(again))


def test_a_second_signal_acts_at_once_and_handlers_come_back() -> None:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_snapshots_are_no_part_of_the_recipe() -> None:
    assert not {"resume", "snapshot_seconds"} & set(Recipe.model_fields)
