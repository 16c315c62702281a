"""The emulation of a GPU on the host: orders of threads, races, misuse of the warp, and what the sanitizers see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import host
from kernels.source import Source

PLANTED = Source(
    str(Path(__file__).parent / "planted" / "planted.cu"),
    (
        *(f"{name}<{{}}, {mistake}>" for name in ("block_sum", "divergent") for mistake in (0, 1)),
        *(
            f"{name}<{{}}, {mistake}>"
            for name in ("reverse_warp", "accumulate", "warp_sum", "same_in_warp", "shift")
            for mistake in (0, 1, 2)
        ),
        "unwritten<{}>",
        "warp_functions<{}>",
    ),
)
X = np.arange(512, dtype=np.float32) % 37


def run(name: str, mistake: int, x: np.ndarray, out: np.ndarray, blocks: int = 1, threads: int = 64) -> np.ndarray:
    arguments = (x, out, np.int32(x.size))
    host.launch(PLANTED, f"{name}<{{}}, {mistake}>", "float32", (blocks, 1, 1), (threads, 1, 1), arguments)
    return out


def block_sum(mistake: int) -> bool:
    out = run("block_sum", mistake, X, np.zeros(4, np.float32), blocks=4, threads=128)
    return bool((out == X.reshape(4, 128).sum(1)).all())


def reverse_warp(mistake: int) -> bool:
    out = run("reverse_warp", mistake, X[:64], np.zeros(64, np.float32))
    return bool((out == X[:64].reshape(2, 32)[:, ::-1].ravel()).all())


def accumulate(mistake: int) -> bool:
    return bool(run("accumulate", mistake, X, np.zeros(1, np.float32), blocks=4, threads=128)[0] == X.sum())


@pytest.mark.parametrize("right", [block_sum, reverse_warp, accumulate])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**64 - 1))
def test_kernel_without_a_mistake_is_right_under_every_order_and_has_no_race(right, seed):
    with host.schedule(seed):
        assert right(0)
    with host.schedule(seed, races=True):
        assert right(0)


@pytest.mark.parametrize("wrong", [block_sum, reverse_warp])
def test_kernel_without_its_barrier_is_wrong_under_some_orders(wrong):
    outcomes = set()
    for seed in range(20):
        with host.schedule(seed):
            outcomes.add(wrong(1))
    assert False in outcomes


@pytest.mark.parametrize(
    ("wrong", "mistake"), [(block_sum, 1), (reverse_warp, 1), (reverse_warp, 2), (accumulate, 1), (accumulate, 2)]
)
@pytest.mark.parametrize("seed", range(5))
def test_kernel_that_races_is_found_under_any_order(wrong, mistake, seed):
    """Also a lost update, which gives the right sum as long as whole threads follow each other."""
    with (
        host.schedule(seed, races=True),
        pytest.raises(RuntimeError, match=r"race: thread \d+ of block \d+ .* nothing orders them"),
    ):
        wrong(mistake)


def test_kernel_that_loses_updates_is_right_without_the_watch():
    for seed in range(5):
        with host.schedule(seed):
            assert accumulate(1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("name", "mistake", "words"),
    [
        ("warp_sum", 1, r"calls __shfl_xor_sync for the value of lane \d+, which is not in its mask"),
        ("warp_sum", 2, r"waits at __shfl_xor_sync with mask 0xffffffff for lane 31, which has ended"),
        ("same_in_warp", 1, r"calls __match_any_sync with mask 0xffffffdf, which leaves itself out"),
        ("same_in_warp", 2, r"waits at __match_any_sync with mask 0xffffffff for lane \d+, which waits at __syncthreads"),
        ("divergent", 1, r"waits at __shfl_sync with mask 0xffffffff for lane \d+, which waits at __syncthreads"),
    ],
)
def test_kernel_that_misuses_its_warp_is_told(name, mistake, words, seed):
    x = X[:32] % 5
    right = {"warp_sum": x.sum(), "divergent": x, "same_in_warp": (x[:, None] == x).sum(1)}[name]
    out = np.zeros(32, np.float32)
    np.testing.assert_array_equal(run(name, 0, x, out, threads=32), right)
    with host.schedule(seed), pytest.raises(RuntimeError, match=rf"{name}<float32, {mistake}>, seed {seed}: thread \(.* {words}"):
        run(name, mistake, x, out, threads=32)
    np.testing.assert_array_equal(run(name, 0, x, out, threads=32), right)


def test_kernel_shared_memory_is_nan_until_it_is_written():
    out = np.zeros(8, np.float32)
    arguments = (out, np.int32(8))
    host.launch(PLANTED, "unwritten<{}>", "float32", (1, 1, 1), (32, 1, 1), arguments, shared=32)
    assert np.isnan(out).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_kernel_warp_functions_are_cudas(seed):
    lanes = np.arange(32)
    x = (lanes**2).astype(np.float32)
    of_eight = lanes % 8
    expected = [
        x[np.full(32, 5)],
        x[lanes - of_eight + (of_eight + 3) % 8],
        x[np.where(lanes < 3, lanes, lanes - 3)],
        x[np.where(of_eight < 3, lanes, lanes - 3)],
        x[np.where(lanes > 28, lanes, lanes + 3)],
        x[np.where(of_eight > 4, lanes, lanes + 3)],
        x[lanes ^ 5],
        x[np.where(lanes < 16, lanes, lanes ^ 16)],  # beyond the segment: the lane's own; before it: the other's
        np.full(32, 11),
        np.ones(32),
        np.zeros(32),
    ]
    out = np.zeros((11, 32), np.float32)
    with host.schedule(seed):
        arguments = (x, out, np.int32(11))
        host.launch(PLANTED, "warp_functions<{}>", "float32", (1, 1, 1), (32, 1, 1), arguments)
    np.testing.assert_array_equal(out, np.array(expected, np.float32))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, None])
def test_kernel_schedules_are_named_by_whole_numbers(seed):
    with pytest.raises(ValueError, match="seed is .*: expected a whole number from 0"), host.schedule(seed):
        pass


def sanitized(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizers' libraries loaded before it, as a build under them needs."""
    compiler = host.compiler()
    libraries = [
        subprocess.run([*compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "KERNELS_SANITIZE": "address",
    }
    root = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("mistake", "words"), [(0, ""), (1, "heap-buffer-overflow.*READ of size 4"), (2, "heap-buffer-overflow.*WRITE of size 4")]
)
def test_kernel_that_leaves_its_arrays_is_found_by_the_sanitizers(mistake, words):
    done = sanitized(f"""
import numpy as np
from tests.test_kernels_host import run, host
x, out = np.ones(100, np.float32), np.zeros(100, np.float32)
with host.schedule(3):
    run("block_sum", 0, x, np.zeros(1, np.float32), threads=128)
    run("shift", {mistake}, x, out, blocks=2)
print("survived")
""")
    if mistake == 0:
        assert done.stdout == "survived\n", done.stderr
    else:
        assert done.returncode != 0
        assert "survived" not in done.stdout
        assert "heap-buffer-overflow" in done.stderr
        assert words.split(".*")[1] in done.stderr


def test_kernel_launches_of_several_threads_take_turns():
    """Of kernels with different parameters too: a source's kernels share one emulated device. In a child, which may crash."""
    done = subprocess.run(
        [sys.executable, "-c", IN_THREADS], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "all alike\n"), done.stderr


IN_THREADS = """
import threading
import numpy as np
from kernels.losses import depth_loss
rng = np.random.default_rng(0)
maps = rng.random((2, 32, 32), np.float32), rng.random((2, 32, 32), np.float32), np.ones((2, 32, 32), bool)
expected, found = depth_loss(*maps)[0][0], []
threads = [threading.Thread(target=lambda: found.extend(depth_loss(*maps)[0][0] for _ in range(10))) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("all alike" if found == [expected] * 40 else "they differ")
"""
