"""Training by several processes (gloo, on the CPU): the steps of one process, up to rounding, and none waits for ever."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import accelerated
from accelerated import engine
from accelerated.dpt import DPT
from accelerated.run_folder import RunFolder
from accelerated.snapshots import Snapshots
from accelerated.tasks import Depth, Segment
from tests.equality import assert_same
from tests.processes import ended, in_child
from tests.test_train import drawn_scenes, run

STEPS = "--steps 6 --validations 2 --smallest_window 0.7 --validation_scenes 5 --held_out_scenes 5 --gradient_clip 1e9"
# AdamW divides by the root of a mean square: where a gradient is nothing but rounding, a step of full length goes anywhere.
STEADY = "--warmup 0 --backbone_learning_rate 1e-4 --decoder_learning_rate 1e-4"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No renderer, no autocast, no dropout, and batch norm by its first statistics: those of a share are not the batch's."""
    monkeypatch.setattr(engine, "load_scenes", drawn_scenes)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    create = Segment.create_model

    def frozen(self: Segment) -> DPT:
        model = create(self)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = FrozenBatchNorm
                module.eval()
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    monkeypatch.setattr(Segment, "create_model", frozen)


class FrozenBatchNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> FrozenBatchNorm:
        return super().train(False)


def by_processes(size: int, runs: Path, arguments: str, before: Callable[[int], object] = lambda rank: None) -> list[int]:
    """Run one recipe by `size` processes, in each of which `before` is called with its rank; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> int:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_default_dtype(torch.float64)
        before(rank)
        return run(runs, arguments)

    children = [in_child(lambda rank=rank: work(rank)) for rank in range(size)]  # type: ignore[misc]
    return [ended(child) for child in children]


def assert_equal_weights(first: Path, second: Path) -> None:
    a, b = (accelerated.to_numpy(accelerated.load(folder / "weights.safetensors")) for folder in (first, second))
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == "float64"
        assert_same(a[key], b[key], rtol=1e-9)


@pytest.mark.parametrize(("task", "anchor"), [("depth", 0), ("depth", 0.1), ("segmentation", 0)])
def test_two_and_four_processes_take_the_steps_of_one(task: str, anchor: float, tmp_path: Path) -> None:
    """Batches of 6: one of four processes has one scene where another has two. Accumulation changes nothing either."""
    arguments = f"--task {task} {STEPS} {STEADY} --batch_size 6 --anchor {anchor}"
    parts = 2 if anchor == 0 else 1
    assert by_processes(1, tmp_path, f"{arguments} --name one") == [0]
    assert by_processes(2, tmp_path, f"{arguments} --name two") == [0] * 2
    assert by_processes(4, tmp_path, f"{arguments} --name four --accumulation {parts}") == [0] * 4
    assert by_processes(1, tmp_path, f"{arguments} --name parts --accumulation {2 * parts - 1}") == [0]
    rows = [row.split(",") for row in (tmp_path / "one" / "metrics.csv").read_text().splitlines()]
    for name in ("two", "four", "parts"):
        assert_equal_weights(tmp_path / "one", tmp_path / name)
        others = [row.split(",") for row in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        for row, other in zip(rows, others, strict=True):  # steps, losses and scores as written, in six digits
            assert row[0] == other[0]
            for k in (2, 3):
                assert row[k] == other[k] or float(row[k]) == pytest.approx(float(other[k]), rel=2e-6)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(sizes: tuple[int, int], tmp_path: Path) -> None:
    """The signal reaches the last process alone; all stop after the same step."""
    arguments = f"{STEPS} {STEADY}"
    loss = Depth.loss

    def signalled(rank: int) -> None:
        calls = 0

        def heard(self: Depth, *given: object) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3 and rank == sizes[0] - 1:
                signal.raise_signal(signal.SIGTERM)
            return loss(self, *given)  # type: ignore[arg-type]

        Depth.loss = heard  # type: ignore[method-assign, assignment]

    assert by_processes(sizes[0], tmp_path, arguments, signalled) == [143] * sizes[0]
    assert Snapshots(tmp_path / "demo" / "snapshots").steps() == [3]
    assert by_processes(sizes[1], tmp_path, arguments) == [0] * sizes[1]
    assert by_processes(1, tmp_path, f"{arguments} --name undisturbed") == [0]
    assert_equal_weights(tmp_path / "demo", tmp_path / "undisturbed")


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path: Path) -> None:
    loss = Depth.loss

    def spoilt(rank: int) -> None:
        if rank == 1:
            Depth.loss = lambda self, *given: loss(self, *given) * torch.nan  # type: ignore[method-assign]

    assert by_processes(2, tmp_path, STEPS, spoilt) == [1, 1]
    weights = accelerated.to_numpy(accelerated.load(tmp_path / "demo" / "weights.safetensors"))
    assert all((value == value).all() for value in weights.values())
    assert RunFolder(tmp_path / "demo").results.exists() is False


def test_more_processes_than_scenes_in_a_batch_are_refused(tmp_path: Path) -> None:
    assert by_processes(2, tmp_path, f"{STEPS} --batch_size 1") == [2, 2]
    assert not (tmp_path / "demo").exists()


def test_torchrun_starts_it(tmp_path: Path) -> None:
    """As the help says, up to a recipe that two processes cannot share: one of them says why, both leave with its status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "accelerated.train"]
    arguments = f"demo --runs {tmp_path} --batch_size 1 --threads 1".split()
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("error: batch_size = 1 does not fit 2 processes: expected at least one scene each") == 1
