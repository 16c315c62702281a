# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of relu.py: one pass each way, without NumPy's array of booleans. Threads share parts of fixed length."""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty_like

cdef Py_ssize_t PART = 16384  # elements that one thread takes at a time


def rectify(x):
    """Return max(x, 0) of x (n,)."""
    x = np.ascontiguousarray(x)
    y = empty_like(x)
    _rectify(x, y)
    return y


def rectify_adjoint(dy, y):
    """Return dy where y > 0 and 0 elsewhere, of dy, y (n,)."""
    y = np.ascontiguousarray(y)
    dx = empty_like(y)
    _adjoint(np.ascontiguousarray(dy), y, dx)
    return dx


def _rectify(const floating[::1] x, floating[::1] y):
    cdef Py_ssize_t n = x.shape[0], part
    for part in prange((n + PART - 1) // PART, nogil=True, schedule="static", use_threads_if=n > 4 * PART):
        _rectify_part(&x[part * PART], &y[part * PART], min(PART, n - part * PART))


def _adjoint(const floating[::1] dy, const floating[::1] y, floating[::1] dx):
    cdef Py_ssize_t n = y.shape[0], part
    for part in prange((n + PART - 1) // PART, nogil=True, schedule="static", use_threads_if=n > 4 * PART):
        _adjoint_part(&dy[part * PART], &y[part * PART], &dx[part * PART], min(PART, n - part * PART))


cdef VECTORISED _rectify_part(const floating* x, floating* y, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = 0 if x[i] <= 0 else x[i]  # NaN stays


cdef VECTORISED _adjoint_part(const floating* dy, const floating* y, floating* dx, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] if y[i] > 0 else 0
