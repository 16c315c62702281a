"""Every rung under orders of threads drawn from seeds: the same bits as in the order of their indices, and no race."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import alignment, attention, confusion, cross_entropy, fusion, host, losses, reassemble
from kernels.source import HOST_ELEMENTS, Source
from tests.kernel_cases import BFLOAT16, CASES, FLOAT16, FLOAT32, FLOAT64, exists, run
from tests.test_kernels_host import sanitized

MODULES = (alignment, attention, confusion, cross_entropy, fusion, losses, reassemble)
# Two orders of each rung in a plain run; `make schedules` asks for fifty, through its profile.
DRAWN = settings(max_examples=2) if settings().max_examples < 50 else settings()


@functools.cache
def expected(name: str, dtype: np.dtype) -> list[bytes]:
    return [array.tobytes() for array in run(name, dtype)]


@pytest.mark.parametrize("name", CASES)
def test_kernel_schedules_change_no_bit_and_meet_no_race(name):
    """One element type an example; a race ends its launch with an error."""
    dtypes = [dtype for dtype in (FLOAT32, FLOAT16, BFLOAT16, FLOAT64) if exists(name, dtype)]

    @DRAWN
    @given(seed=st.integers(1, 2**64 - 1), dtype=st.sampled_from(dtypes))
    def check(seed, dtype):
        for races in (False, True):
            with host.schedule(seed, races):
                assert [array.tobytes() for array in run(name, dtype)] == expected(name, dtype)

    check()


def test_kernel_cases_launch_every_kernel(monkeypatch):
    """A rung, or a form of one, that the table lacks would be drawn no order, watched for no race, and compared on no GPU."""
    launched = set()
    launch = host.launch

    def keep(source: Source, template: str, dtype: str, *rest: object) -> None:
        launched.add((source.file, template))
        launch(source, template, dtype, *rest)

    monkeypatch.setattr(host, "launch", keep)
    for name in CASES:
        for dtype in (FLOAT32, FLOAT16):
            if exists(name, dtype):
                run(name, dtype)
    sources = [value for module in MODULES for value in vars(module).values() if isinstance(value, Source)]
    assert launched == {(source.file, template) for source in sources for template in source.templates}
    assert set(HOST_ELEMENTS) >= {"float32", "float16", "bfloat16", "float64"}


def test_kernel_cases_stay_within_their_arrays():
    """Under the address and undefined-behaviour sanitizers, on arrays without a margin."""
    done = sanitized("""
import numpy as np
from tests.kernel_cases import CASES, DTYPES, exists, run
for name in CASES:
    for dtype in DTYPES:
        if exists(name, dtype):
            run(name, dtype)
print("survived")
""")
    assert done.stdout == "survived\n", done.stderr
