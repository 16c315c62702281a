# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of batch_norm.py: each of its sums and its maps is one pass over the batch, where NumPy makes one per operation.

Threads share the channels of the sums and the planes of the maps.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from reference.nn.sums cimport total, total_of_products, total_of_squares
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty_like

cdef Py_ssize_t FEW = 32768  # elements for which waking other threads does not pay


def moments(x):
    """Return mean and variance (C,) of x (B, C, H * W) per channel."""
    mean, var = np.empty((2, x.shape[1]), x.dtype)
    _moments(np.ascontiguousarray(x), mean, var)
    return mean, var


def affine(x, mean, scale, bias):
    """Return (x - mean) * scale + bias of x (B, C, H * W), the others (C,)."""
    x = np.ascontiguousarray(x)
    y = empty_like(x)
    _affine(x, *(np.ascontiguousarray(part) for part in (mean, scale, bias)), y)
    return y


def channel_sums(dy, x, mean):
    """Return the sums (C,) of dy and of dy (x - mean) of dy, x (B, C, H * W)."""
    plain, along = np.empty((2, x.shape[1]), x.dtype)
    _channel_sums(np.ascontiguousarray(dy), np.ascontiguousarray(x), np.ascontiguousarray(mean), plain, along)
    return plain, along


def combine(dy, x, mean, direct, constant, slope):
    """Return direct * dy + constant + slope * (x - mean) of dy, x (B, C, H * W), the others (C,)."""
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx = empty_like(x)
    _combine(dy, x, *(np.ascontiguousarray(part) for part in (mean, direct, constant, slope)), dx)
    return dx


def _moments(const floating[:, :, ::1] x, floating[::1] mean, floating[::1] var):
    cdef Py_ssize_t c, n = x.shape[2]
    for c in prange(x.shape[1], nogil=True, schedule="static", use_threads_if=x.shape[0] * x.shape[1] * n > FEW):
        _channel_moments(&x[0, c, 0], x.shape[0], x.shape[1] * n, n, &mean[c], &var[c])


def _affine(
    const floating[:, :, ::1] x,
    const floating[::1] mean,
    const floating[::1] scale,
    const floating[::1] bias,
    floating[:, :, ::1] y,
):
    cdef Py_ssize_t i, b, c, channels = x.shape[1], n = x.shape[2]
    for i in prange(x.shape[0] * channels, nogil=True, schedule="static", use_threads_if=x.shape[0] * channels * n > FEW):
        b, c = i // channels, i % channels
        _affine_plane(&x[b, c, 0], n, mean[c], scale[c], bias[c], &y[b, c, 0])


def _channel_sums(
    const floating[:, :, ::1] dy, const floating[:, :, ::1] x, const floating[::1] mean, floating[::1] plain, floating[::1] along
):
    cdef Py_ssize_t c, n = x.shape[2]
    for c in prange(x.shape[1], nogil=True, schedule="static", use_threads_if=x.shape[0] * x.shape[1] * n > FEW):
        _sums_of_channel(&dy[0, c, 0], &x[0, c, 0], mean[c], x.shape[0], x.shape[1] * n, n, &plain[c], &along[c])


def _combine(
    const floating[:, :, ::1] dy,
    const floating[:, :, ::1] x,
    const floating[::1] mean,
    const floating[::1] direct,
    const floating[::1] constant,
    const floating[::1] slope,
    floating[:, :, ::1] dx,
):
    cdef Py_ssize_t i, b, c, channels = x.shape[1], n = x.shape[2]
    for i in prange(x.shape[0] * channels, nogil=True, schedule="static", use_threads_if=x.shape[0] * channels * n > FEW):
        b, c = i // channels, i % channels
        _combine_plane(&dy[b, c, 0], &x[b, c, 0], n, mean[c], direct[c], constant[c], slope[c], &dx[b, c, 0])


cdef VECTORISED _channel_moments(
    const floating* x, Py_ssize_t batch, Py_ssize_t stride, Py_ssize_t n, floating* mean, floating* var
) noexcept nogil:
    """The planes of a channel are `stride` elements apart and of n elements each."""
    cdef floating sum = 0, squares = 0, centre
    cdef Py_ssize_t b
    for b in range(batch):
        sum += total(x + b * stride, n)
    centre = sum / (batch * n)
    for b in range(batch):
        squares += total_of_squares(x + b * stride, centre, n)
    mean[0] = centre
    var[0] = squares / (batch * n)


cdef VECTORISED _sums_of_channel(
    const floating* dy,
    const floating* x,
    floating mean,
    Py_ssize_t batch,
    Py_ssize_t stride,
    Py_ssize_t n,
    floating* plain,
    floating* along,
) noexcept nogil:
    cdef floating sum = 0, products = 0
    cdef Py_ssize_t b
    for b in range(batch):
        sum += total(dy + b * stride, n)
        products += total_of_products(x + b * stride, mean, dy + b * stride, n)
    plain[0] = sum
    along[0] = products


cdef VECTORISED _affine_plane(
    const floating* x, Py_ssize_t n, floating mean, floating scale, floating bias, floating* y
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        y[i] = (x[i] - mean) * scale + bias


cdef VECTORISED _combine_plane(
    const floating* dy,
    const floating* x,
    Py_ssize_t n,
    floating mean,
    floating direct,
    floating constant,
    floating slope,
    floating* dx,
) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        dx[i] = direct * dy[i] + constant + slope * (x[i] - mean)
