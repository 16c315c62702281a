# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of softmax.py: a row at a time, which stays in the first-level cache from its maximum to its last quotient.

The exponential and the sums are written so that the compiler vectorises them (exponential.pxd, sums.pxd). Threads share the rows.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from reference.nn.exponential cimport exponential
from reference.nn.sums cimport greatest, total, total_of_products
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty_like

cdef Py_ssize_t FEW = 32768  # elements for which waking other threads does not pay


def proportions(x, axis):
    """Return exp(x) / sum exp(x) along `axis`."""
    rows = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    y = empty_like(rows)
    _proportions(rows.reshape(-1, x.shape[axis]), y.reshape(-1, x.shape[axis]))
    return np.ascontiguousarray(np.moveaxis(y, -1, axis))


def proportions_adjoint(dy, y, axis):
    """Return dx of dy and y = proportions(x)."""
    n = y.shape[axis]
    dy, y = (np.ascontiguousarray(np.moveaxis(array, axis, -1)) for array in (dy, y))
    dx = empty_like(y)
    _adjoint(*(array.reshape(-1, n) for array in (dy, y, dx)))
    return np.ascontiguousarray(np.moveaxis(dx, -1, axis))


def _proportions(const floating[:, ::1] x, floating[:, ::1] y):
    cdef Py_ssize_t r, n = x.shape[1]
    for r in prange(x.shape[0], nogil=True, schedule="static", use_threads_if=x.shape[0] * n > FEW):
        _row(&x[r, 0], &y[r, 0], n)


def _adjoint(const floating[:, ::1] dy, const floating[:, ::1] y, floating[:, ::1] dx):
    cdef Py_ssize_t r, n = y.shape[1]
    for r in prange(y.shape[0], nogil=True, schedule="static", use_threads_if=y.shape[0] * n > FEW):
        _adjoint_row(&dy[r, 0], &y[r, 0], &dx[r, 0], n)


cdef VECTORISED _row(const floating* x, floating* y, Py_ssize_t n) noexcept nogil:
    # NaN, which the maximum passes over, and inf - inf make the sum NaN, and with it the row.
    cdef floating most = greatest(x, n), share
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = exponential(x[i] - most)
    share = 1 / total(y, n)
    for i in range(n):
        y[i] *= share


cdef VECTORISED _adjoint_row(const floating* dy, const floating* y, floating* dx, Py_ssize_t n) noexcept nogil:
    cdef floating along = total_of_products(dy, <floating>0, y, n)
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = (dy[i] - along) * y[i]
