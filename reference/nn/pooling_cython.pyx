# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of pooling.py: the windows of one output row side by side, tap by tap, without an array of all that they see.

The row's maxima and winners stay in the first-level cache meanwhile. Threads share the planes.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from libc.stdint cimport int32_t
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty

cdef Py_ssize_t FEW = 32768  # elements for which waking other threads does not pay


def window_maxima(x, kernel, stride, out):
    """Return y (B, C, *out) and the winning tap of each window of x (B, C, H, W), which is padded."""
    planes = np.ascontiguousarray(x).reshape(-1, *x.shape[2:])
    y, winner = empty((len(planes), *out), x.dtype), np.empty((len(planes), *out), np.int32)
    _maxima(planes, y, winner, kernel, stride)
    return y.reshape(*x.shape[:2], *out), winner.reshape(*x.shape[:2], *out)


def window_maxima_adjoint(dy, winner, kernel, stride, size):
    """Return dx (B, C, *size) of dy (B, C, h, w)."""
    dx = np.zeros((*dy.shape[:2], *size), dy.dtype)
    planes = (np.ascontiguousarray(array).reshape(-1, *dy.shape[2:]) for array in (dy, winner))
    _adjoint(*planes, dx.reshape(-1, *size), kernel, stride)
    return dx


def _maxima(const floating[:, :, ::1] x, floating[:, :, ::1] y, int32_t[:, :, ::1] winner, Py_ssize_t kernel, Py_ssize_t stride):
    cdef Py_ssize_t p, r
    for p in prange(x.shape[0], nogil=True, schedule="static", use_threads_if=x.shape[0] * x.shape[1] * x.shape[2] > FEW):
        for r in range(y.shape[1]):
            _row(&x[p, r * stride, 0], x.shape[2], &y[p, r, 0], &winner[p, r, 0], y.shape[2], kernel, stride)


def _adjoint(
    const floating[:, :, ::1] dy, const int32_t[:, :, ::1] winner, floating[:, :, ::1] dx, Py_ssize_t kernel, Py_ssize_t stride
):
    cdef Py_ssize_t p, r, c
    for p in prange(dx.shape[0], nogil=True, schedule="static", use_threads_if=dx.shape[0] * dx.shape[1] * dx.shape[2] > FEW):
        for r in range(dy.shape[1]):
            for c in range(dy.shape[2]):
                dx[p, r * stride + winner[p, r, c] // kernel, c * stride + winner[p, r, c] % kernel] += dy[p, r, c]


cdef VECTORISED _row(
    const floating* x,
    Py_ssize_t width,
    floating* y,
    int32_t* winner,
    Py_ssize_t windows,
    Py_ssize_t kernel,
    Py_ssize_t stride,
) noexcept nogil:
    """x is the first of the rows that this row of windows sees, each `width` elements."""
    cdef Py_ssize_t i, j, c
    for c in range(windows):
        y[c] = x[c * stride]
        winner[c] = 0
    for i in range(kernel):
        for j in range(kernel):
            # The usual strides, as numbers that the compiler knows: it loads them many at a time.
            if stride == 1:
                _tap(x + i * width + j, y, winner, windows, i * kernel + j, 1)
            elif stride == 2:
                _tap(x + i * width + j, y, winner, windows, i * kernel + j, 2)
            else:
                _tap(x + i * width + j, y, winner, windows, i * kernel + j, stride)


cdef inline void _tap(
    const floating* seen, floating* y, int32_t* winner, Py_ssize_t windows, int32_t tap, Py_ssize_t stride
) noexcept nogil:
    """Let what one tap sees win where it is larger, or the first NaN."""
    cdef Py_ssize_t c
    cdef bint wins
    for c in range(windows):
        wins = (not seen[c * stride] <= y[c]) & (y[c] == y[c])
        winner[c] = tap if wins else winner[c]
        y[c] = seen[c * stride] if wins else y[c]
