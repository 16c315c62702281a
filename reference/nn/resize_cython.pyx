# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of resize.py: the columns of a source row are blended once, and then serve every output row that reads it.

Upsampling reads most source rows several times, and blending columns, which picks neighbours by index, is the slow part; blending
two rows of the result is not. The adjoint gathers where NumPy scatters: a source row is the weighted sum of the output rows that
read it, and each of its columns that of the output columns that read it, whose indices and weights are tabulated once. So no
two threads, which share the planes, ever write to one place.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport int32_t
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty

cdef Py_ssize_t FEW = 32768  # elements for which waking other threads does not pay
PARTS = 64  # at most so many threads share the planes; each has a buffer


def interpolate(x, rows, columns):
    """Return x (B, C, H, W) read at `rows` and `columns`: (B, C, h, w)."""
    planes = np.ascontiguousarray(x).reshape(-1, *x.shape[2:])
    y = empty((len(planes), len(rows.weight), len(columns.weight)), x.dtype)
    index = np.stack([columns.before, columns.after]).astype(np.int32)
    weight = np.stack([1 - columns.weight, columns.weight])
    buffers = np.empty((min(len(planes), PARTS), 2, y.shape[2]), x.dtype)
    _interpolate(planes, y, buffers, rows.before, rows.after, rows.weight, index, weight)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def interpolate_adjoint(dy, rows, columns, size):
    """Return dx (B, C, *size) of dy (B, C, h, w)."""
    planes = np.ascontiguousarray(dy).reshape(-1, *dy.shape[2:])
    dx = empty((len(planes), *size), dy.dtype)
    buffers = np.zeros((min(len(planes), PARTS), dy.shape[3] + 1), dy.dtype)
    _adjoint(planes, dx, buffers, *_readers(rows, size[0]), *_readers(columns, size[1]))
    return dx.reshape(*dy.shape[:2], *size)


def _readers(axis, n):
    """Return the output positions that read each of n source positions, and their weights: two arrays (most, n).

    Where a position has fewer readers than another, the table names position len(axis.weight), behind the last, with weight 0.
    """
    source, out = np.concatenate([axis.before, axis.after]), len(axis.weight)
    order = np.argsort(source, kind="stable")
    count = np.bincount(source, minlength=n)
    place = np.arange(2 * out) - np.repeat(np.cumsum(count) - count, count)
    index, weight = np.full((count.max(), n), out, np.int32), np.zeros((count.max(), n), axis.weight.dtype)
    index[place, source[order]] = order % out
    weight[place, source[order]] = np.concatenate([1 - axis.weight, axis.weight])[order]
    return index, weight


def _interpolate(
    const floating[:, :, ::1] x,
    floating[:, :, ::1] y,
    floating[:, :, ::1] buffers,
    const Py_ssize_t[::1] before,
    const Py_ssize_t[::1] after,
    const floating[::1] row_weight,
    const int32_t[:, ::1] index,
    const floating[:, ::1] weight,
):
    cdef Py_ssize_t part, p, planes = x.shape[0], parts = buffers.shape[0]
    for part in prange(parts, nogil=True, schedule="static", use_threads_if=planes * y.shape[1] * y.shape[2] > FEW):
        for p in range(part * planes // parts, (part + 1) * planes // parts):
            _plane(
                &x[p, 0, 0],
                x.shape[2],
                &y[p, 0, 0],
                y.shape[1],
                y.shape[2],
                &buffers[part, 0, 0],
                &before[0],
                &after[0],
                &row_weight[0],
                &index[0, 0],
                &weight[0, 0],
            )


def _adjoint(
    const floating[:, :, ::1] dy,
    floating[:, :, ::1] dx,
    floating[:, ::1] buffers,
    const int32_t[:, ::1] row_index,
    const floating[:, ::1] row_weight,
    const int32_t[:, ::1] index,
    const floating[:, ::1] weight,
):
    cdef Py_ssize_t part, p, planes = dy.shape[0], parts = buffers.shape[0]
    for part in prange(parts, nogil=True, schedule="static", use_threads_if=planes * dy.shape[1] * dy.shape[2] > FEW):
        for p in range(part * planes // parts, (part + 1) * planes // parts):
            _adjoint_plane(
                &dy[p, 0, 0],
                dy.shape[1],
                dy.shape[2],
                &dx[p, 0, 0],
                dx.shape[1],
                dx.shape[2],
                &buffers[part, 0],
                &row_index[0, 0],
                &row_weight[0, 0],
                row_index.shape[0],
                &index[0, 0],
                &weight[0, 0],
                index.shape[0],
            )


cdef VECTORISED _plane(
    const floating* x,
    Py_ssize_t source_width,
    floating* y,
    Py_ssize_t height,
    Py_ssize_t width,
    floating* buffer,
    const Py_ssize_t* before,
    const Py_ssize_t* after,
    const floating* row_weight,
    const int32_t* index,
    const floating* weight,
) noexcept nogil:
    cdef floating* upper = buffer
    cdef floating* lower = buffer + width
    cdef floating* swapped
    cdef Py_ssize_t r, c, in_upper = -1, in_lower = -1  # the source rows whose columns are blended there
    cdef floating s, t
    for r in range(height):
        if before[r] != in_upper:
            if before[r] == in_lower:
                swapped = upper
                upper = lower
                lower = swapped
                in_lower = in_upper
            else:
                _blend_columns(x + before[r] * source_width, upper, width, index, weight)
            in_upper = before[r]
        if after[r] != in_lower:
            _blend_columns(x + after[r] * source_width, lower, width, index, weight)
            in_lower = after[r]
        t = row_weight[r]
        s = 1 - t
        for c in range(width):
            y[c] = upper[c] * s + lower[c] * t
        y += width


cdef inline void _blend_columns(
    const floating* x, floating* y, Py_ssize_t width, const int32_t* index, const floating* weight
) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(width):
        y[c] = x[index[c]] * weight[c] + x[index[width + c]] * weight[width + c]


cdef VECTORISED _adjoint_plane(
    const floating* dy,
    Py_ssize_t height,
    Py_ssize_t width,
    floating* dx,
    Py_ssize_t source_height,
    Py_ssize_t source_width,
    floating* buffer,
    const int32_t* row_index,
    const floating* row_weight,
    Py_ssize_t row_readers,
    const int32_t* index,
    const floating* weight,
    Py_ssize_t readers,
) noexcept nogil:
    cdef const floating* reader
    cdef Py_ssize_t r, k, c
    cdef floating t
    for r in range(source_height):
        for c in range(width):  # what stands behind the last column stays 0
            buffer[c] = 0
        for k in range(row_readers):
            if row_index[k * source_height + r] == height:
                break
            reader, t = dy + row_index[k * source_height + r] * width, row_weight[k * source_height + r]
            for c in range(width):
                buffer[c] += reader[c] * t
        for c in range(source_width):
            dx[c] = buffer[index[c]] * weight[c]
        for k in range(1, readers):
            for c in range(source_width):
                dx[c] += buffer[index[k * source_width + c]] * weight[k * source_width + c]
        dx += source_width
