"""Recycled memory: what is in use, however it is held, keeps its memory to itself, and what is dead gives it to the next."""

from __future__ import annotations

import gc
import importlib
import math
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import nn
from reference.implementation import use
from reference.nn import memory
from tests.primitives import PRIMITIVES, WITHOUT_A_TWIN, Call, normal_arrays

F4, F8 = np.dtype(np.float32), np.dtype(np.float64)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """No test finds what another left, and none leaves anything."""
    memory.release()
    yield
    memory.release()


def pooled_from(size: int) -> Any:
    """Recycle arrays from `size` bytes on, so that many small ones can be tried."""
    return mock.patch.object(memory, "LARGE", size)


def megabytes(n: int) -> np.ndarray:
    return memory.empty((n * MIB // 4,), F4)


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def traced() -> int:
    return tracemalloc.get_traced_memory()[0]


@pytest.fixture
def tracing() -> Iterator[None]:
    """Count the bytes that Python and NumPy hold, from now on."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


# What an array is


@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    dtype=st.sampled_from([F4, F8, np.dtype(np.int32)]),
    large=st.booleans(),
)
def test_an_array_is_as_numpys(shape: tuple[int, ...], dtype: np.dtype, large: bool) -> None:
    with pooled_from(1 if large else MIB):
        for array in (memory.empty(shape, dtype), memory.empty_like(np.zeros(shape, dtype, order="F"))):
            assert (array.shape, array.dtype) == (shape, dtype)
            assert array.flags.c_contiguous
            assert array.flags.writeable
            assert array.flags.aligned
            array[...] = 3
            np.testing.assert_array_equal(array, np.full(shape, 3, dtype))


# Ways to hold on to an array, of which nothing else is left.
HOLDERS: dict[str, Callable[[np.ndarray], Any]] = {
    "itself": lambda array: array,
    "a slice": lambda array: array[1:, ::2],
    "a number": lambda array: array[-1:, -1],
    "a transposed slice": lambda array: array.T[1:, ::-1],
    "a slice of a slice": lambda array: array[1:][:, 1:].T[1:],
    "another shape": lambda array: array.reshape(-1)[3:],
    "another dtype": lambda array: array.view(np.uint8),
    "another class": lambda array: array.view(np.recarray),
    "an array of another class": lambda array: np.asarray(array.view(np.recarray)[1:]),
    "a memoryview": lambda array: memoryview(array),
    "a slice of a memoryview": lambda array: memoryview(array)[1:],
    "an array of a memoryview": lambda array: np.asarray(memoryview(array)),
    "an array of its bytes": lambda array: np.frombuffer(array, np.uint8),
    "an iterator": lambda array: array.flat,
    "a tensor": lambda array: torch.from_numpy(array),
    "a row of a tensor": lambda array: torch.from_numpy(array)[1],
    "an array of a tensor": lambda array: torch.from_numpy(array).T.numpy(),
    "an array by DLPack": lambda array: np.from_dlpack(array)[2:],
    "windows": lambda array: np.lib.stride_tricks.sliding_window_view(array, (2, 2)),
    "its base": lambda array: array.base,
    "a broadcast": lambda array: np.broadcast_to(array[:1], (3, array.shape[1])),
    "a split": lambda array: np.split(array, [1, 2])[1],
    "a function": lambda array: lambda: array[1:],
    "a cycle": lambda array: in_a_cycle(array),
}


def in_a_cycle(array: np.ndarray) -> list[Any]:
    cycle: list[Any] = [array]
    cycle.append(cycle)
    return cycle


def read(holder: Any) -> np.ndarray:
    """A copy of what a holder shows."""
    if isinstance(holder, np.flatiter):
        return holder.copy()
    if isinstance(holder, torch.Tensor):
        return holder.numpy().copy()
    return np.array(holder() if callable(holder) else holder[0] if isinstance(holder, list) else holder)


@pytest.mark.parametrize("way", HOLDERS)
def test_whatever_holds_an_array_keeps_its_memory_until_it_lets_go(way: str) -> None:
    with pooled_from(64):
        array = memory.empty((40, 50), F4)
        place = address(array)
        array[...] = np.arange(array.size).reshape(array.shape)
        holder = HOLDERS[way](array)
        before = read(holder)
        del array
        others = [memory.empty((40, 50), F4) for _ in range(3)]
        for other in others:
            other[...] = -1
        assert place not in map(address, others)
        np.testing.assert_array_equal(read(holder), before)
        del holder
        gc.collect()
        assert address(memory.empty((40, 50), F4)) == place


steps = st.lists(st.tuples(st.integers(20, 200), st.sampled_from(sorted(HOLDERS)), st.integers(0, 30)), max_size=60)


@settings(max_examples=100)
@given(steps=steps, kept=st.sampled_from([0, 500, 2000, 1 << 20]))
def test_nothing_in_use_changes_whatever_is_taken_and_dropped(steps: list[tuple[int, str, int]], kept: int) -> None:
    """Arrays of many sizes are made, held in some way and dropped in any order: each holder shows what it showed at first."""
    alive: list[tuple[Any, np.ndarray]] = []
    with pooled_from(64), mock.patch.object(memory, "KEPT", kept):
        for number, (rows, way, drop) in enumerate(steps):
            array = memory.empty((rows, 4), F4)
            array[...] = number
            holder = HOLDERS[way](array)
            alive.append((holder, read(holder)))
            del array, holder
            if drop < len(alive):
                alive.pop(drop)
            for holder, before in alive:
                np.testing.assert_array_equal(read(holder), before)
        memory.release()
        for holder, before in alive:
            np.testing.assert_array_equal(read(holder), before)


# What is given out again


@pytest.mark.parametrize("n", [4, 7, 30])
def test_memory_of_a_dead_array_is_given_out_again(n: int) -> None:
    array = megabytes(n)
    place = address(array)
    del array
    again = memory.empty_like(np.empty((n * MIB // 32, 4), F8))
    assert address(again) == place


def test_one_dead_array_serves_one_new_array() -> None:
    array = megabytes(5)
    place = address(array)
    del array
    first, second = megabytes(5), megabytes(5)
    assert address(first) == place != address(second)


@pytest.mark.parametrize(
    ("freed", "wanted", "taken"), [(12, 12, True), (12, 9, True), (12, 8, False), (12, 5, False), (12, 13, False), (5, 12, False)]
)
def test_a_block_is_taken_that_is_large_enough_and_less_than_half_too_large(freed: int, wanted: int, taken: bool) -> None:
    array = megabytes(freed)
    place = address(array)
    del array
    array = megabytes(wanted)
    array[...] = 0
    assert (address(array) == place) == taken


def test_of_those_that_fit_the_smallest_is_taken() -> None:
    for order in ((12, 10, 11), (11, 12, 10), (10, 11, 12)):
        memory.release()
        arrays = {n: megabytes(n) for n in order}
        places = {n: address(array) for n, array in arrays.items()}
        for n in order:
            del arrays[n]
        taken = [megabytes(9) for _ in range(3)]
        assert [address(array) for array in taken] == [places[n] for n in (10, 11, 12)]
        del taken


@pytest.mark.usefixtures("tracing")
def test_no_more_is_kept_than_allowed() -> None:
    with mock.patch.object(memory, "KEPT", 17 * MIB):
        arrays = [megabytes(5) for _ in range(7)]
        assert traced() > 35 * MIB
        while arrays:
            arrays.pop()
            assert traced() - 5 * MIB * len(arrays) < 17.1 * MIB
        assert traced() > 15 * MIB
        memory.release()
        assert traced() < MIB


@pytest.mark.usefixtures("tracing")
def test_an_array_larger_than_all_that_may_be_kept_is_not() -> None:
    with mock.patch.object(memory, "KEPT", 9 * MIB):
        array = megabytes(10)
        del array
        assert traced() < MIB


@pytest.mark.usefixtures("tracing")
def test_small_arrays_are_not_kept() -> None:
    arrays = [memory.empty(((memory.LARGE - 4) // 4,), F4) for _ in range(3)]
    del arrays
    assert traced() < MIB
    array = memory.empty((memory.LARGE // 4,), F4)
    del array
    assert traced() > 3 * MIB


@pytest.mark.usefixtures("tracing")
def test_release_leaves_what_is_in_use() -> None:
    used, dropped = megabytes(6), megabytes(7)
    used[...] = 1
    del dropped
    memory.release()
    assert 6 * MIB < traced() < 7 * MIB
    other = megabytes(6)
    other[...] = 2
    assert (used == 1).all()
    del used, other
    assert traced() > 11 * MIB  # they are kept as ever
    memory.release()
    assert traced() < MIB


def test_threads_share_memory_but_never_an_array() -> None:
    """Each fills its arrays with its own number, waits for the others to do the same, and looks whether it is still there."""
    wrong, interval = [], sys.getswitchinterval()

    def work(number: int) -> None:
        rng, alive = np.random.default_rng(number), []
        for turn in range(300):
            array = memory.empty((int(rng.integers(20, 300)), 4), F4)
            array[...] = mark = 1000 * number + turn
            alive.append((array[1:], mark))
            del array
            if len(alive) > 4:
                view, mark = alive.pop(int(rng.integers(4)))
                if not (view == mark).all():
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    try:
        sys.setswitchinterval(1e-6)
        with pooled_from(64), mock.patch.object(memory, "KEPT", 20_000):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_thread_frees_what_another_made() -> None:
    array = [megabytes(5)]
    place = address(array[0])
    thread = threading.Thread(target=array.clear)
    thread.start()
    thread.join()
    assert address(megabytes(5)) == place


def test_arrays_may_die_at_any_moment_of_a_request_for_another() -> None:
    """As the collector may free them, which runs when it likes, within the functions of this module too."""

    def freeing(at: int, arrays: list[np.ndarray]) -> Callable:
        seen = 0

        def trace(frame: Any, event: str, argument: Any) -> Callable:
            nonlocal seen
            if frame.f_code.co_filename == memory.__file__:
                seen += 1
                if seen == at:
                    arrays.clear()
            return trace

        return trace

    for at in range(1, 60):
        memory.release()
        with pooled_from(64), mock.patch.object(memory, "KEPT", 400):
            dead = [memory.empty((n,), F4) for n in (30, 20, 33)]
            dying = [memory.empty((n,), F4) for n in (17, 18, 19)]
            alive = memory.empty((33,), F4)
            alive[...] = 1
            del dead
            sys.settrace(freeing(at, dying))
            try:
                array = memory.empty((30,), F4)
            finally:
                sys.settrace(None)
            array[...] = 2
            assert array.size == 30
            assert (alive == 1).all()


def test_what_the_collector_runs_in_the_midst_of_a_request_may_make_one_too() -> None:
    """In a process of its own: one that waits for itself cannot be stopped from within."""
    code = """
import gc
import numpy as np
from reference.nn import memory

class Cycle:
    def __init__(self): self.me = self
    def __del__(self): memory.empty((100,), np.dtype(np.float32))

memory.LARGE = 64
for later in range(1, 40):  # allocations until the next collection, which so comes anywhere within the request
    gc.disable()
    gc.collect()
    Cycle()
    gc.set_threshold(gc.get_count()[0] + later)
    gc.enable()
    memory.empty((50,), np.dtype(np.float32))
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True, timeout=10)


# Workspaces


def in_another_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@given(use=st.sampled_from(["one", "another"]), entries=st.integers(1, 40_000_000), dtype=st.sampled_from([F4, F8]))
def test_a_workspace_has_room_for_what_is_asked(use: str, entries: int, dtype: np.dtype) -> None:
    space = memory.workspace(use, entries, dtype)
    assert space.dtype == dtype
    assert space.ndim == 1
    assert space.size >= entries
    assert space.flags.c_contiguous
    assert space.flags.writeable
    assert space.flags.aligned
    space[[0, entries - 1]] = 1


def test_a_workspace_is_used_again_and_grows() -> None:
    first = memory.workspace("grows", 10, F4)
    place, size = address(first), first.nbytes
    assert address(memory.workspace("grows", size // 4, F4)) == place
    assert address(memory.workspace("grows", size // 8, F8)) == place
    first[...] = 1
    larger = memory.workspace("grows", size // 4 + 1, F4)
    assert larger.nbytes > size
    assert not np.may_share_memory(first, larger)  # what was given before stays whole for who still has it
    larger[...] = 2
    assert (first == 1).all()
    assert address(memory.workspace("grows", 10, F8)) == address(larger)


def test_a_workspace_is_one_uses_and_one_threads() -> None:
    mine = memory.workspace("mine", 1000, F4)
    mine[...] = 1
    for other in (memory.workspace("other", 1000, F4), in_another_thread(lambda: memory.workspace("mine", 1000, F4))):
        assert not np.may_share_memory(mine, other)
        other[...] = 2
    assert (mine == 1).all()


def test_the_largest_workspaces_are_not_kept() -> None:
    for kept, entries in ((True, memory.WORKSPACE // 4), (False, memory.WORKSPACE // 4 + 1)):
        first = in_another_thread(lambda n=entries: (memory.workspace("large", n, F4), memory.workspace("large", n, F4)))
        assert np.may_share_memory(*first) == kept


@pytest.mark.usefixtures("tracing")
def test_a_threads_workspaces_go_with_it() -> None:
    in_another_thread(lambda: memory.workspace("brief", 2 * MIB, F4).fill(1))
    assert traced() < MIB


# In the operations


OPERATIONS = PRIMITIVES | {
    "conv2d of many positions": Call(lambda x, w, b: nn.conv2d(x, w, b), ((1, 3, 81, 82), (9, 3, 2, 2), (9,))),
    "conv2d by Winograd's way": Call(lambda x, w, b: nn.conv2d(x, w, b, 1, 1), ((1, 3, 40, 41), (9, 3, 3, 3), (9,))),
    "conv2d of a 1x1 kernel": Call(lambda x, w, b: nn.conv2d(x, w, b), ((2, 10, 12, 13), (20, 10, 1, 1), (20,))),
    "linear of more columns": Call(nn.linear, ((30, 40), (90, 40), (90,))),
}
names = st.sampled_from(sorted(OPERATIONS))


def inputs_of(name: str) -> list[np.ndarray]:
    """The same each time, in arrays that are recycled where that is asked for."""
    arrays = []
    for values in normal_arrays(np.random.default_rng(0), *OPERATIONS[name].shapes):
        arrays.append(memory.empty(values.shape, F4))
        arrays[-1][...] = values
    return arrays


def gradients_of(vjp: Callable, y: np.ndarray) -> list[np.ndarray]:
    gradients = vjp(np.cos(y))
    return [g for g in (gradients if isinstance(gradients, tuple) else (gradients,)) if g is not None]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[np.ndarray]]:
    """Every operation's result and gradients, nothing recycled."""
    outcomes = {}
    with use("cython"), pooled_from(1 << 40):
        for name, call in OPERATIONS.items():
            y, vjp = call.operation(*inputs_of(name))
            outcomes[name] = [y, *gradients_of(vjp, y)]
    return outcomes


def twins() -> list[Any]:
    folder = Path(nn.__file__).parent
    return [importlib.import_module(f"reference.nn.{path.stem}") for path in sorted(folder.glob("*_cython.pyx"))]


@contextmanager
def guarded(value: float) -> Iterator[None]:
    """Give the twins memory that is full of `value`, no more than they ask for: what lies around it must survive."""
    given: list[tuple[np.ndarray, int]] = []
    guard, margin = -12345.0, 1 << 16

    def array(entries: int, dtype: np.dtype) -> np.ndarray:
        around = np.full(entries + 2 * margin, guard, dtype)
        around[margin:-margin] = value
        given.append((around, entries))
        return around[margin:-margin]

    def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return array(math.prod(shape), dtype).reshape(shape)

    instead = {
        "empty": empty,
        "empty_like": lambda array: empty(array.shape, array.dtype),
        "workspace": lambda use, entries, dtype: array(entries, dtype),
    }
    with ExitStack() as patches:
        for module in twins():
            for name in instead.keys() & vars(module).keys():
                patches.enter_context(mock.patch.object(module, name, instead[name]))
        yield
    assert given, "no twin asked for memory"
    for around, _ in given:
        assert (around[:margin] == guard).all(), "written before an array's beginning"
        assert (around[-margin:] == guard).all(), "written past an array's end"


@pytest.mark.parametrize("dtype", [F4, F8])
@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - WITHOUT_A_TWIN))
def test_twins_stay_within_their_memory_and_do_not_see_what_was_in_it(name: str, dtype: np.dtype) -> None:
    """Found full of NaN, or of a number, it makes no difference."""
    inputs = [array.astype(dtype) for array in inputs_of(name)]
    outcomes = []
    for value in (math.nan, 1e9):
        with use("cython"), guarded(value):
            y, vjp = OPERATIONS[name].operation(*inputs)
            outcomes.append([y, *gradients_of(vjp, y)])
    for first, second in zip(*outcomes, strict=True):
        assert np.isfinite(first).all()
        np.testing.assert_array_equal(first, second)


@settings(max_examples=100)
@given(calls=st.lists(st.tuples(names, st.integers(0, 9)), max_size=25))
def test_results_never_change_nor_does_what_a_vjp_keeps(
    expected: dict[str, list[np.ndarray]], calls: list[tuple[str, int]]
) -> None:
    """Results and vjps outlive their inputs, and each other in any order: what they show and return stays what it was."""
    alive: list[tuple[str, np.ndarray, Callable]] = []
    with use("cython"), pooled_from(64):
        for name, drop in calls:
            y, vjp = OPERATIONS[name].operation(*inputs_of(name))
            alive.append((name, y[..., :-1], vjp))
            del y, vjp
            for was, view, _ in alive:
                np.testing.assert_array_equal(view, expected[was][0][..., :-1])
            if drop < len(alive):
                was, _, vjp = alive.pop(drop)
                for have, want in zip(gradients_of(vjp, expected[was][0]), expected[was][1:], strict=True):
                    np.testing.assert_array_equal(have, want)
                del vjp


def test_large_results_never_change() -> None:
    x, alive = np.random.default_rng(0).standard_normal((5, 512, 512)).astype(np.float32), []
    places = set()
    with use("cython"):
        for turn in range(12):
            y, _ = nn.relu(x + turn)
            places.add(address(y))
            alive.append((turn, (y, y[1:, ::7], y.T, memoryview(y))[turn % 4]))
            del y
            if turn % 3 == 2:
                alive.pop(turn // 3)
            for when, view in alive:
                y = np.maximum(x + when, 0)
                np.testing.assert_array_equal(np.asarray(view), (y, y[1:, ::7], y.T, y)[when % 4])
    assert len(places) < 12  # or nothing was used again


def test_threads_compute_side_by_side(expected: dict[str, list[np.ndarray]]) -> None:
    """Each at another operation at any time, each with its own workspaces."""
    wrong, interval = [], sys.getswitchinterval()

    def work(first: int) -> None:
        with use("cython"):
            for turn in range(3 * len(OPERATIONS)):
                name = sorted(OPERATIONS)[(first + turn) % len(OPERATIONS)]
                y, vjp = OPERATIONS[name].operation(*inputs_of(name))
                outcome = [y, *gradients_of(vjp, y)]
                if not all((have == want).all() for have, want in zip(outcome, expected[name], strict=True)):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(5 * number,)) for number in range(5)]
    try:
        sys.setswitchinterval(1e-6)
        with pooled_from(64):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
