# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of layer_norm.py: mean, variance and result of a row while the first-level cache holds it.

x is read from memory once, where NumPy passes over it for every step. Threads share the rows; what the vjp sums over rows it sums
in parts of a length that does not depend on the threads.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport sqrt
from reference.nn.sums cimport total, total_of_products, total_of_squares
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty_like

cdef Py_ssize_t FEW = 32768  # elements for which waking other threads does not pay


def standardize_rows(x, weight, bias, eps):
    """Return y (n, D), mean (n, 1) and scale (n, 1) = 1 / sqrt(var + eps) of x (n, D)."""
    x = np.ascontiguousarray(x)
    y, mean, scale = empty_like(x), np.empty((len(x), 1), x.dtype), np.empty((len(x), 1), x.dtype)
    _rows(x, np.ascontiguousarray(weight), np.ascontiguousarray(bias), eps, y, mean, scale)
    return y, mean, scale


def standardize_rows_adjoint(dy, x, mean, scale, weight):
    """Return dx (n, D), dweight and dbias (D,)."""
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx, length = empty_like(x), max(16, len(x) // 16)
    sums = np.zeros((2, (len(x) + length - 1) // length, x.shape[1]), x.dtype)
    _adjoint(dy, x, mean, scale, np.ascontiguousarray(weight), dx, sums, length)
    return dx, *sums.sum(axis=1)


def _rows(
    const floating[:, ::1] x,
    const floating[::1] weight,
    const floating[::1] bias,
    floating eps,
    floating[:, ::1] y,
    floating[:, ::1] mean,
    floating[:, ::1] scale,
):
    cdef Py_ssize_t r, n = x.shape[1]
    for r in prange(x.shape[0], nogil=True, schedule="static", use_threads_if=x.shape[0] * n > FEW):
        _row(&x[r, 0], &weight[0], &bias[0], eps, n, &y[r, 0], &mean[r, 0], &scale[r, 0])


def _adjoint(
    const floating[:, ::1] dy,
    const floating[:, ::1] x,
    const floating[:, ::1] mean,
    const floating[:, ::1] scale,
    const floating[::1] weight,
    floating[:, ::1] dx,
    floating[:, :, ::1] sums,
    Py_ssize_t length,
):
    cdef Py_ssize_t part, r, n = x.shape[1]
    for part in prange(sums.shape[1], nogil=True, schedule="static", use_threads_if=x.shape[0] * n > FEW):
        for r in range(part * length, min((part + 1) * length, x.shape[0])):
            _adjoint_row(
                &dy[r, 0], &x[r, 0], mean[r, 0], scale[r, 0], &weight[0], n, &dx[r, 0], &sums[0, part, 0], &sums[1, part, 0]
            )


cdef VECTORISED _row(
    const floating* x,
    const floating* weight,
    const floating* bias,
    floating eps,
    Py_ssize_t n,
    floating* y,
    floating* mean,
    floating* scale,
) noexcept nogil:
    cdef floating centre = total(x, n) / n, factor
    cdef Py_ssize_t i
    factor = 1 / sqrt(total_of_squares(x, centre, n) / n + eps)
    for i in range(n):
        y[i] = (x[i] - centre) * factor * weight[i] + bias[i]
    mean[0] = centre
    scale[0] = factor


cdef VECTORISED _adjoint_row(
    const floating* dy,
    const floating* x,
    floating mean,
    floating scale,
    const floating* weight,
    Py_ssize_t n,
    floating* dx,
    floating* dweight,
    floating* dbias,
) noexcept nogil:
    cdef floating centre, along, normal
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = dy[i] * weight[i]
    centre = total(dx, n) / n
    along = total_of_products(x, mean, dx, n) * scale / n
    for i in range(n):
        normal = (x[i] - mean) * scale
        dx[i] = scale * (dx[i] - centre - normal * along)
        dweight[i] += dy[i] * normal
        dbias[i] += dy[i]
