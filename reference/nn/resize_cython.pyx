# cython: boundscheck=False, wraparound=False, initializedcheck=False
"""Compiled twin of resize.py: for every output row, blend two source rows into one buffer, then blend the buffer's columns.

The adjoint runs the same two steps backwards: columns into the buffer, then the buffer into two rows.
"""

import numpy as np

from cython cimport floating


def interpolate(x, rows, columns):
    """Return x (B, C, H, W) read at `rows` and `columns`: (B, C, h, w)."""
    planes = x.reshape(-1, *x.shape[2:])
    y = np.empty((len(planes), len(rows.weight), len(columns.weight)), x.dtype)
    _interpolate(planes, y, np.empty(x.shape[3], x.dtype), *rows, *columns)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def interpolate_adjoint(dy, rows, columns, size):
    """Return dx (B, C, *size) of dy (B, C, h, w)."""
    dx = np.zeros((dy.shape[0] * dy.shape[1], *size), dy.dtype)
    _adjoint(dy.reshape(-1, *dy.shape[2:]), dx, np.empty(size[1], dy.dtype), *rows, *columns)
    return dx.reshape(*dy.shape[:2], *size)


def _interpolate(
    const floating[:, :, :] x,
    floating[:, :, ::1] y,
    floating[::1] blend,
    const Py_ssize_t[::1] row_before,
    const Py_ssize_t[::1] row_after,
    const floating[::1] row_weight,
    const Py_ssize_t[::1] column_before,
    const Py_ssize_t[::1] column_after,
    const floating[::1] column_weight,
):
    cdef Py_ssize_t p, r, c, before, after
    cdef floating t
    with nogil:
        for p in range(y.shape[0]):
            for r in range(y.shape[1]):
                before, after, t = row_before[r], row_after[r], row_weight[r]
                for c in range(x.shape[2]):
                    blend[c] = x[p, before, c] * (1 - t) + x[p, after, c] * t
                for c in range(y.shape[2]):
                    t = column_weight[c]
                    y[p, r, c] = blend[column_before[c]] * (1 - t) + blend[column_after[c]] * t


def _adjoint(
    const floating[:, :, :] dy,
    floating[:, :, ::1] dx,
    floating[::1] blend,
    const Py_ssize_t[::1] row_before,
    const Py_ssize_t[::1] row_after,
    const floating[::1] row_weight,
    const Py_ssize_t[::1] column_before,
    const Py_ssize_t[::1] column_after,
    const floating[::1] column_weight,
):
    cdef Py_ssize_t p, r, c, before, after
    cdef floating t
    with nogil:
        for p in range(dy.shape[0]):
            for r in range(dy.shape[1]):
                for c in range(dx.shape[2]):
                    blend[c] = 0
                for c in range(dy.shape[2]):
                    t = column_weight[c]
                    blend[column_before[c]] += dy[p, r, c] * (1 - t)
                    blend[column_after[c]] += dy[p, r, c] * t
                before, after, t = row_before[r], row_after[r], row_weight[r]
                for c in range(dx.shape[2]):
                    dx[p, before, c] += blend[c] * (1 - t)
                    dx[p, after, c] += blend[c] * t
