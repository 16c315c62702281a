# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of group_norm.py: one group of channels after the other, small enough to stay in the second-level cache.

Its sums run over adjacent memory, and weight and bias are one number for a whole map. Threads share the groups.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from libc.math cimport sqrt
from reference.nn.sums cimport total, total_of_products, total_of_squares
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty_like

cdef Py_ssize_t FEW = 32768  # elements for which waking other threads does not pay


def standardize_groups(x, weight, bias, eps):
    """Return y, mean (B, G, 1, 1) and scale (B, G, 1, 1) of x (B, G, C / G, H * W), weight and bias (G, C / G)."""
    x = np.ascontiguousarray(x)
    y, mean, scale = empty_like(x), np.empty((*x.shape[:2], 1, 1), x.dtype), np.empty((*x.shape[:2], 1, 1), x.dtype)
    _groups(x, np.ascontiguousarray(weight), np.ascontiguousarray(bias), eps, y, mean, scale)
    return y, mean, scale


def standardize_groups_adjoint(dy, x, mean, scale, weight):
    """Return dx, dweight and dbias (G, C / G)."""
    dy, x = np.ascontiguousarray(dy), np.ascontiguousarray(x)
    dx, sums = empty_like(x), np.empty((2, *x.shape[:3]), x.dtype)
    _adjoint(dy, x, mean, scale, np.ascontiguousarray(weight), dx, sums)
    return dx, *sums.sum(axis=1)


def _groups(
    const floating[:, :, :, ::1] x,
    const floating[:, ::1] weight,
    const floating[:, ::1] bias,
    floating eps,
    floating[:, :, :, ::1] y,
    floating[:, :, :, ::1] mean,
    floating[:, :, :, ::1] scale,
):
    cdef Py_ssize_t i, b, g, groups = x.shape[1], channels = x.shape[2], area = x.shape[3]
    for i in prange(
        x.shape[0] * groups, nogil=True, schedule="static", use_threads_if=x.shape[0] * groups * channels * area > FEW
    ):
        b, g = i // groups, i % groups
        _group(
            &x[b, g, 0, 0], &weight[g, 0], &bias[g, 0], eps, channels, area, &y[b, g, 0, 0], &mean[b, g, 0, 0], &scale[b, g, 0, 0]
        )


def _adjoint(
    const floating[:, :, :, ::1] dy,
    const floating[:, :, :, ::1] x,
    const floating[:, :, :, ::1] mean,
    const floating[:, :, :, ::1] scale,
    const floating[:, ::1] weight,
    floating[:, :, :, ::1] dx,
    floating[:, :, :, ::1] sums,
):
    cdef Py_ssize_t i, b, g, groups = x.shape[1], channels = x.shape[2], area = x.shape[3]
    for i in prange(
        x.shape[0] * groups, nogil=True, schedule="static", use_threads_if=x.shape[0] * groups * channels * area > FEW
    ):
        b, g = i // groups, i % groups
        _adjoint_group(
            &dy[b, g, 0, 0],
            &x[b, g, 0, 0],
            mean[b, g, 0, 0],
            scale[b, g, 0, 0],
            &weight[g, 0],
            channels,
            area,
            &dx[b, g, 0, 0],
            &sums[0, b, g, 0],
            &sums[1, b, g, 0],
        )


cdef VECTORISED _group(
    const floating* x,
    const floating* weight,
    const floating* bias,
    floating eps,
    Py_ssize_t channels,
    Py_ssize_t area,
    floating* y,
    floating* mean,
    floating* scale,
) noexcept nogil:
    cdef Py_ssize_t c, i, n = channels * area
    cdef floating centre = total(x, n) / n, factor, slope, shift
    mean[0] = centre
    factor = 1 / sqrt(total_of_squares(x, centre, n) / n + eps)
    scale[0] = factor
    for c in range(channels):
        slope, shift = factor * weight[c], bias[c]
        for i in range(c * area, (c + 1) * area):
            y[i] = (x[i] - centre) * slope + shift


cdef VECTORISED _adjoint_group(
    const floating* dy,
    const floating* x,
    floating mean,
    floating scale,
    const floating* weight,
    Py_ssize_t channels,
    Py_ssize_t area,
    floating* dx,
    floating* dweight,
    floating* dbias,
) noexcept nogil:
    cdef Py_ssize_t c, i, n = channels * area
    cdef floating centre = 0, along = 0, direct, slope
    for c in range(channels):
        dbias[c] = total(dy + c * area, area)
        dweight[c] = total_of_products(x + c * area, mean, dy + c * area, area) * scale
        centre += weight[c] * dbias[c]
        along += weight[c] * dweight[c]
    centre, slope = scale * centre / n, scale * scale * along / n
    for c in range(channels):
        direct = scale * weight[c]
        for i in range(c * area, (c + 1) * area):
            dx[i] = direct * dy[i] - centre - slope * (x[i] - mean)
