"""Every rung under orders of threads drawn from seeds: the same bits as in the order of their indices, and no race."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import host
from kernels.source import HOST_ELEMENTS, Source
from tests.kernel_cases import BFLOAT16, CASES, FLOAT16, FLOAT32, FLOAT64, exists, run
from tests.test_kernels_host import sanitized

DTYPES = (FLOAT32, FLOAT16, BFLOAT16, FLOAT64)  # those of the host
# Two orders of each rung in a plain run; `make schedules` asks for fifty, through its profile, and `make explore` for no more.
DRAWN = settings(max_examples=2) if settings().max_examples < 50 else settings(max_examples=50)


@functools.cache
def expected(name: str, dtype: np.dtype) -> list[bytes]:
    return [array.tobytes() for array in run(name, dtype)]


@pytest.mark.parametrize("name", CASES)
def test_kernel_schedules_change_no_bit_and_meet_no_race(name):
    """One element type an example; a race ends its launch with an error."""
    dtypes = [dtype for dtype in DTYPES if exists(name, dtype)]

    @DRAWN
    @given(number=st.integers(1, 2**64 - 1))
    def check(number):
        seed = (number + zlib.crc32(name.encode())) % 2**64  # other orders for each rung, whose examples are drawn alike
        dtype = dtypes[seed % len(dtypes)]
        for races in (False, True):
            with host.schedule(seed, races):
                found = [array.tobytes() for array in run(name, dtype)]
            assert found == expected(name, dtype), f"{name}, {dtype}: seed {seed} changes the result"

    check()


def sources() -> Iterator[Source]:
    """Every source of the package, in whichever module."""
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Source):
                yield value


def test_kernel_cases_launch_every_kernel(monkeypatch):
    """A rung, or a form of one, that the table lacks would be drawn no order, watched for no race, and compared on no GPU."""
    launched: dict[str, set[tuple[str, str, str]]] = {}
    launch = host.launch
    for name in CASES:
        for given_dtype in DTYPES:
            kept = launched.setdefault(name, set())

            def keep(source: Source, template: str, *rest: object, kept: set = kept, dtype: str = given_dtype.name) -> None:
                kept.add((source.file, template, dtype))  # a kernel that only adds up is found by the dtype of its sums
                launch(source, template, *rest)

            monkeypatch.setattr(host, "launch", keep)
            if exists(name, given_dtype):
                run(name, given_dtype)

    every = {
        (s.file, template, dtype)
        for s in sources()
        for template in s.templates
        for dtype in HOST_ELEMENTS
        if s.has(template, dtype)
    }
    assert set.union(*launched.values()) == every
    for operation in {name.partition(",")[0] for name in CASES}:  # and a table without one of its rungs is found out
        for rung in {name[-1] for name in CASES if name.startswith(operation)}:
            others = [kept for name, kept in launched.items() if not (name.startswith(operation) and name.endswith(rung))]
            assert set.union(*others) < every, f"{operation}, rung {rung}"


def test_kernel_cases_stay_within_their_arrays():
    """Under the address and undefined-behaviour sanitizers, on arrays without a margin.

    Then with each of the first four arrays, in turn, one element past a multiple of 16 bytes: what moves 16 bytes at a time
    must have looked at the address of every array.
    """
    done = sanitized("""
import numpy as np
from tests.kernel_cases import CASES, DTYPES, FLOAT16, exists, run
for name in CASES:
    for dtype in DTYPES:
        if exists(name, dtype):
            run(name, dtype)
    for k in range(4):
        turn = iter(range(-k, 9))
        def place(array):
            if next(turn) != 0:
                return array
            apart = np.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
            apart[...] = array
            return apart
        run(name, FLOAT16, place)
print("survived")
""")
    assert done.stdout == "survived\n", done.stderr
