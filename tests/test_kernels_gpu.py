"""Every rung on a GPU against the same rung on the host, from one table; and the comparison itself, which needs no GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tests.kernel_cases import CASES, DTYPES, exists, run

RUNS = [(name, dtype) for name in CASES for dtype in DTYPES if exists(name, dtype)]
SUMS = 64 * 2.0**-23  # see assert_near


def assert_near(ours: list[np.ndarray], theirs: list[np.ndarray], handed_on: bool) -> None:
    """Whole numbers and NaNs alike; other numbers apart by what two ways of rounding may do to them.

    Both sides compute the same sums in the same order, in float32. A GPU fuses a product with the sum it is added to where the
    host rounds twice, adds the products of a matrix in its own way, and its exponential errs by some units in the last place: a
    term may differ by a few eps of its size. Such errors of n terms, n at most 2^12 here, add up to about sqrt(n) eps of the
    largest partial sum, which is of the size of the largest result: 64 eps of float32, times that (SUMS).

    A result rounded to 16 bits may then fall on the next number: one eps of its dtype, of itself, or a subnormal number. Where
    an operation hands such numbers on to further sums (attention: its weights on tensor cores, and `out` to the gradients),
    one of the terms there may differ so: one eps of the dtype, times the largest result.
    """
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype.kind in "iub":
            np.testing.assert_array_equal(a, b)
            continue
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        np.testing.assert_array_equal(np.isnan(wide_a), np.isnan(wide_b))
        size = np.abs(wide_b)
        largest = np.nanmax(size, initial=0)
        allowed = SUMS * largest
        if a.dtype.itemsize == 2:
            kind = ml_dtypes.finfo(a.dtype)
            allowed = allowed + float(kind.eps) * (size + handed_on * largest) + float(kind.smallest_subnormal)
        excess = np.nanmax(np.abs(wide_a - wide_b) - allowed, initial=-np.inf)
        assert excess <= 0, f"apart by {excess:.3g} more than allowed, among numbers up to {largest:.3g}"


def hands_on(name: str) -> bool:
    """Whether 16-bit results of this operation go into further sums."""
    return name.startswith("attention")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_kernel_on_the_gpu_gives_what_it_gives_on_the_host(name, dtype):
    import cupy

    with cupy.cuda.Stream(non_blocking=True):
        found, again = run(name, dtype, cupy.asarray), run(name, dtype, cupy.asarray)
    assert [array.tobytes() for array in found] == [array.tobytes() for array in again]
    assert_near(found, run(name, dtype), hands_on(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_comparison_sees_a_result_that_is_off(dtype):
    """In the largest number of any result, by little more than is allowed; and by the least of a whole number."""
    for name in CASES:
        if not exists(name, dtype):
            continue
        found = run(name, dtype, np.asarray)
        assert_near(found, run(name, dtype), hands_on(name))
        for k, array in enumerate(found):
            wrong = array.copy()
            flat = wrong.reshape(-1)
            place = int(np.nanargmax(np.abs(flat.astype(np.float64))))
            if wrong.dtype.kind in "iub":
                flat[place] ^= 1
            else:
                assert flat[place] != 0, name
                eps = float(ml_dtypes.finfo(wrong.dtype).eps)
                flat[place] = float(flat[place]) * (1 + (4 * eps if wrong.dtype.itemsize == 2 else 2 * SUMS))
            for others in ([wrong], [array.reshape(-1, 1, 1)], [array.astype(np.complex64)]):
                with pytest.raises(AssertionError):
                    assert_near([*found[:k], *others, *found[k + 1 :]], found, hands_on(name))


def test_kernel_comparison_sees_a_nan_and_lets_pass_what_rounding_may_do():
    one = np.ones(3, np.float32)
    with pytest.raises(AssertionError):
        assert_near([np.array([1, np.nan, 1], np.float32)], [one], False)
    assert_near([one * np.float32(1 + SUMS / 2)], [one], False)
    small = np.array([1, 2**-6, 0], np.float16)
    moved = np.array([1, 2**-6 * (1 + 2**-9), 0], np.float16)
    assert_near([np.nextafter(small, np.float16(2))], [small], False)
    assert_near([moved], [small], True)
    with pytest.raises(AssertionError):
        assert_near([moved], [small], False)
