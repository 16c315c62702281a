# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of selection.py: the k-th smallest value by its digits, in time linear in the number of values.

The bits of a float, read as a whole number, ascend with its value once those of negative ones are inverted. From the leading
digit of 11 bits to the last, the values are counted by digit; the digit of the k-th is then known, and only the values that have
it go on to the next. Threads share the rows.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

cdef Py_ssize_t FEW = 8192  # elements for which waking other threads does not pay
cdef enum:
    DIGIT = 11
    DIGITS = 2048

cdef union Bits32:
    float value
    uint32_t bits

cdef union Bits64:
    double value
    uint64_t bits


def lower_median(values, valid):
    """Return median (B,) and its first position (B,) of values, valid (B, N)."""
    median, first = np.zeros(len(values), values.dtype), np.zeros(len(values), np.intp)
    keys = np.empty(values.shape, np.uint64)
    counts = np.empty((len(values), DIGITS), np.int32)
    _lower_median(np.ascontiguousarray(values), np.ascontiguousarray(valid).view(np.uint8), keys, counts, median, first)
    return median, first


def smallest(values, valid, count):
    """Return which are the count[b] smallest of the valid values (B, N): bool (B, N)."""
    chosen = np.zeros(values.shape, bool)
    keys = np.empty(values.shape, np.uint64)
    counts = np.empty((len(values), DIGITS), np.int32)
    valid = np.ascontiguousarray(valid).view(np.uint8)
    _smallest(np.ascontiguousarray(values), valid, count.astype(np.intp), keys, counts, chosen.view(np.uint8))
    return chosen


def _lower_median(
    const floating[:, ::1] values,
    const uint8_t[:, ::1] valid,
    uint64_t[:, ::1] keys,
    int32_t[:, ::1] counts,
    floating[::1] median,
    Py_ssize_t[::1] first,
):
    cdef Py_ssize_t b, n = values.shape[1]
    for b in prange(values.shape[0], nogil=True, schedule="static", use_threads_if=values.shape[0] * n > FEW):
        _median_of_row(&values[b, 0], &valid[b, 0], n, &keys[b, 0], &counts[b, 0], &median[b], &first[b])


def _smallest(
    const floating[:, ::1] values,
    const uint8_t[:, ::1] valid,
    const Py_ssize_t[::1] count,
    uint64_t[:, ::1] keys,
    int32_t[:, ::1] counts,
    uint8_t[:, ::1] chosen,
):
    cdef Py_ssize_t b, n = values.shape[1]
    for b in prange(values.shape[0], nogil=True, schedule="static", use_threads_if=values.shape[0] * n > FEW):
        _smallest_of_row(&values[b, 0], &valid[b, 0], n, count[b], &keys[b, 0], &counts[b, 0], &chosen[b, 0])


cdef void _median_of_row(
    const floating* values,
    const uint8_t* valid,
    Py_ssize_t n,
    uint64_t* keys,
    int32_t* counts,
    floating* median,
    Py_ssize_t* first,
) noexcept nogil:
    cdef Py_ssize_t i, m = _collect(values, valid, n, keys), less = 0
    cdef uint64_t middle
    if m == 0:
        return
    middle = _select(keys, m, (m - 1) // 2, 8 * sizeof(floating), counts, &less)
    for i in range(n):
        if valid[i] and _key(values[i]) == middle:
            median[0] = values[i]
            first[0] = i
            return


cdef void _smallest_of_row(
    const floating* values,
    const uint8_t* valid,
    Py_ssize_t n,
    Py_ssize_t count,
    uint64_t* keys,
    int32_t* counts,
    uint8_t* chosen,
) noexcept nogil:
    cdef Py_ssize_t i, m = _collect(values, valid, n, keys), less = 0, equal
    cdef uint64_t last, own
    if count == 0:
        return
    last = _select(keys, m, count - 1, 8 * sizeof(floating), counts, &less)
    equal = count - less  # so many of those equal to the last one that is taken
    for i in range(n):
        if valid[i]:
            own = _key(values[i])
            if own < last:
                chosen[i] = 1
            elif own == last and equal > 0:
                chosen[i] = 1
                equal -= 1


cdef Py_ssize_t _collect(const floating* values, const uint8_t* valid, Py_ssize_t n, uint64_t* keys) noexcept nogil:
    """Write the keys of the valid values and return how many there are."""
    cdef Py_ssize_t i, m = 0
    for i in range(n):
        keys[m] = _key(values[i])
        m += valid[i]
    return m


cdef uint64_t _select(
    uint64_t* keys, Py_ssize_t m, Py_ssize_t k, int shift, int32_t* counts, Py_ssize_t* less
) noexcept nogil:
    """Return the k-th smallest of m keys of `shift` bits, k < m, which it overwrites, and how many are less than it."""
    cdef Py_ssize_t i, kept
    cdef uint64_t digit = 0
    while shift > 0 and m > 1:
        shift = shift - DIGIT if shift > DIGIT else 0
        for i in range(DIGITS):
            counts[i] = 0
        for i in range(m):
            counts[(keys[i] >> shift) & (DIGITS - 1)] += 1
        digit = 0
        while k >= counts[digit]:
            k -= counts[digit]
            less[0] += counts[digit]
            digit += 1
        kept = 0
        for i in range(m):
            keys[kept] = keys[i]
            kept += ((keys[i] >> shift) & (DIGITS - 1)) == digit
        m = kept
    return keys[0]


cdef inline uint64_t _key(floating value) noexcept nogil:
    """Return a whole number, of as many bits, that ascends with the value; -0 counts as 0, and NaN as more than everything."""
    cdef Bits32 single
    cdef Bits64 double_
    value = value + 0  # -0 becomes 0
    if floating is float:
        single.value = value
        if value != value:
            return <uint32_t>0xFFFFFFFF
        return ~single.bits if single.bits >> 31 else single.bits | (<uint32_t>1 << 31)
    else:
        double_.value = value
        if value != value:
            return ~(<uint64_t>0)
        return ~double_.bits if double_.bits >> 63 else double_.bits | (<uint64_t>1 << 63)
