"""Every rung on a GPU against the same rung on the host, from one table; and the comparison itself, which needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.ladder import accumulator
from tests.kernel_cases import BFLOAT16, CASES, DTYPES, FLOAT16, FLOAT32, exists, run

RUNS = [(name, dtype) for name in CASES for dtype in DTYPES if exists(name, dtype)]


def assert_near(ours: list[np.ndarray], theirs: list[np.ndarray], dtype: np.dtype) -> None:
    """Whole numbers alike; the others apart by what two orders of rounding may do to them.

    A GPU fuses a product with a sum where the host rounds twice, and its exponential errs by a few units in the last place. A sum
    of n terms, n at most 2^12 here, each of which errs by e times its size, errs by about sqrt(n) e times the largest partial
    sum: 64 e, of the type that is added in; and once more by what the result is rounded to.
    """
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b)
            continue
        a, b, kind = a.astype(np.float64), b.astype(np.float64), a.dtype
        stored = max(eps(kind), eps(accumulator(np.empty(0, dtype))))
        if kind == FLOAT32 and dtype != FLOAT32:
            stored = max(stored, eps(dtype) if dtype in (FLOAT16, BFLOAT16) else 0)  # products take weights rounded to dtype
        allowed = 64 * eps(np.dtype(np.float32)) * np.abs(b).max() + 2 * stored * np.maximum(np.abs(b), stored)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        worst = np.nanmax(np.abs(a - b) - allowed, initial=-np.inf)
        assert worst <= 0, f"apart by {worst:.3g} more than allowed"


def eps(dtype: np.dtype) -> float:
    """The distance from 1 to the next larger number."""
    return {FLOAT16: 2.0**-10, BFLOAT16: 2.0**-7, FLOAT32: 2.0**-23}.get(dtype, 2.0**-52)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=lambda value: str(value))
def test_kernel_on_the_gpu_gives_what_it_gives_on_the_host(name, dtype):
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        found, again = run(name, dtype, cupy.asarray), run(name, dtype, cupy.asarray)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in again]
    assert_near(found, run(name, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_comparison_sees_a_result_that_is_off(dtype):
    for name in CASES:
        if not exists(name, dtype):
            continue
        found = run(name, dtype)
        assert_near(found, found, dtype)
        for k, array in enumerate(found):
            wrong = array.copy()
            flat = wrong.reshape(-1)
            place = int(np.nanargmax(np.abs(flat.astype(np.float64))))
            flat[place] = not flat[place] if wrong.dtype == bool else flat[place] * 0.9 + 1
            with pytest.raises(AssertionError):
                assert_near([*found[:k], wrong, *found[k + 1 :]], found, dtype)
