# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of differences.py: a row, its validity and the row below it at a time, instead of whole arrays of differences.

Where a pixel is invalid the loops choose 0, without a branch, so that the compiler vectorises them. Threads share the maps.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport uint8_t
from reference.nn.sums cimport total
from reference.nn.vectorised cimport VECTORISED

cdef Py_ssize_t FEW = 8192  # elements for which waking other threads does not pay


def absolute_differences(maps, valid):
    """Return the sum of |dR/dx| + |dR/dy| (B,) of maps, valid (B, H, W)."""
    sums, buffers = np.empty(len(maps), maps.dtype), np.empty((len(maps), maps.shape[2]), maps.dtype)
    _sums(np.ascontiguousarray(maps), np.ascontiguousarray(valid).view(np.uint8), buffers, sums)
    return sums


def absolute_differences_adjoint(dsum, maps, valid):
    """Return dmaps (B, H, W) of dsum (B,)."""
    dmaps, buffers = np.zeros(maps.shape, maps.dtype), np.empty((len(maps), maps.shape[2]), maps.dtype)
    valid = np.ascontiguousarray(valid).view(np.uint8)
    _adjoint(np.ascontiguousarray(dsum), np.ascontiguousarray(maps), valid, buffers, dmaps)
    return dmaps


def _sums(
    const floating[:, :, ::1] maps, const uint8_t[:, :, ::1] valid, floating[:, ::1] buffers, floating[::1] sums
):
    cdef Py_ssize_t b, height = maps.shape[1], width = maps.shape[2]
    for b in prange(maps.shape[0], nogil=True, schedule="static", use_threads_if=maps.shape[0] * height * width > FEW):
        _sum_of_map(&maps[b, 0, 0], &valid[b, 0, 0], height, width, &buffers[b, 0], &sums[b])


def _adjoint(
    const floating[::1] dsum,
    const floating[:, :, ::1] maps,
    const uint8_t[:, :, ::1] valid,
    floating[:, ::1] buffers,
    floating[:, :, ::1] dmaps,
):
    cdef Py_ssize_t b, height = maps.shape[1], width = maps.shape[2]
    for b in prange(maps.shape[0], nogil=True, schedule="static", use_threads_if=maps.shape[0] * height * width > FEW):
        _adjoint_of_map(dsum[b], &maps[b, 0, 0], &valid[b, 0, 0], height, width, &buffers[b, 0], &dmaps[b, 0, 0])


cdef VECTORISED _sum_of_map(
    const floating* x, const uint8_t* valid, Py_ssize_t height, Py_ssize_t width, floating* buffer, floating* sum
) noexcept nogil:
    cdef Py_ssize_t r, c
    cdef floating across = 0, down = 0, d
    for r in range(height):
        for c in range(width - 1):
            d = x[c + 1] - x[c]
            d = -d if d < 0 else d
            buffer[c] = d if valid[c] & valid[c + 1] else 0
        across += total(buffer, width - 1)
        if r + 1 < height:
            for c in range(width):
                d = x[c + width] - x[c]
                d = -d if d < 0 else d
                buffer[c] = d if valid[c] & valid[c + width] else 0
            down += total(buffer, width)
        x += width
        valid += width
    sum[0] = across + down


cdef VECTORISED _adjoint_of_map(
    floating dsum,
    const floating* x,
    const uint8_t* valid,
    Py_ssize_t height,
    Py_ssize_t width,
    floating* buffer,
    floating* dx,
) noexcept nogil:
    cdef Py_ssize_t r, c
    for r in range(height):
        for c in range(width - 1):
            buffer[c] = _slope(x[c + 1] - x[c], valid[c] & valid[c + 1], dsum)
        for c in range(width - 1):
            dx[c + 1] += buffer[c]
        for c in range(width - 1):
            dx[c] -= buffer[c]
        if r + 1 < height:
            for c in range(width):
                buffer[c] = _slope(x[c + width] - x[c], valid[c] & valid[c + width], dsum)
            for c in range(width):
                dx[c + width] += buffer[c]
                dx[c] -= buffer[c]
        x += width
        valid += width
        dx += width


cdef inline floating _slope(floating d, uint8_t valid, floating dsum) noexcept nogil:
    """Return dsum times the sign of d, which is 0 where the difference does not count; NaN stays NaN."""
    cdef floating sign = 1 if d > 0 else d
    sign = -1 if d < 0 else sign
    sign = sign if valid else 0
    return dsum * sign
