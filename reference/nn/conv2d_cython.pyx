# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of conv2d.py: the same three maps, each as one matrix product per block of output rows.

Column n of the matrix `columns` (C * kh * kw, rows * w) lists all that the kernel sees of one image at output position n. With it

    correlate                  y       = weight columns
    correlate_adjoint_weight   dweight = sum over blocks of dy columns^T
    correlate_adjoint_x        columns = weight^T dy, and every entry is added back to the pixel it came from

where weight is (O, C * kh * kw), dy (O, rows * w). The whole matrix of an image would be kh * kw times the size of the image, so
it is made for as many rows at a time as fit `_BLOCK` entries. The loops that fill it and spread it are the compiled part.
"""

import numpy as np

from cython cimport floating

_BLOCK = 1 << 20  # entries: a few MiB, which the second-level cache nearly holds between filling and multiplying


def correlate(x, weight, stride, padding, out):
    """Return y (B, O, *out) of x (B, C, H, W) and weight (O, C, kh, kw), without bias."""
    kernel, matrix, x = weight.shape[2:], weight.reshape(len(weight), -1), np.ascontiguousarray(x)
    y = np.empty((len(x), len(weight), out[0] * out[1]), x.dtype)
    for image, first, rows, positions, columns in _blocks(len(x), matrix.shape[1], out, x.dtype):
        _fill(x[image], columns, kernel, stride, padding, first, rows, out[1])
        np.matmul(matrix, columns, out=y[image, :, positions])
    return y.reshape(len(x), len(weight), *out)


def correlate_adjoint_x(dy, weight, stride, padding, size):
    """Return dx (B, C, *size) of dy (B, O, h, w) and weight (O, C, kh, kw)."""
    kernel, out, transposed = weight.shape[2:], dy.shape[2:], weight.reshape(len(weight), -1).T
    dx = np.zeros((len(dy), weight.shape[1], *size), dy.dtype)
    dy = dy.reshape(*dy.shape[:2], -1)
    for image, first, rows, positions, columns in _blocks(len(dy), len(transposed), out, dy.dtype):
        np.matmul(transposed, dy[image, :, positions], out=columns)
        _spread(columns, dx[image], kernel, stride, padding, first, rows, out[1])
    return dx


def correlate_adjoint_weight(dy, x, stride, padding, kernel):
    """Return dweight (O, C, *kernel) of dy (B, O, h, w) and x (B, C, H, W)."""
    out, taps, x = dy.shape[2:], x.shape[1] * kernel[0] * kernel[1], np.ascontiguousarray(x)
    dweight = np.zeros((dy.shape[1], taps), dy.dtype)
    dy = dy.reshape(*dy.shape[:2], -1)
    for image, first, rows, positions, columns in _blocks(len(x), taps, out, x.dtype):
        _fill(x[image], columns, kernel, stride, padding, first, rows, out[1])
        dweight += np.matmul(dy[image, :, positions], columns.T)
    return dweight.reshape(dy.shape[1], x.shape[1], *kernel)


def _blocks(batch, taps, out, dtype):
    """Yield (image, first row, number of rows, slice of positions, columns to use) for every block of output rows."""
    height, width = out
    most = min(max(_BLOCK // (taps * width), 1), height)
    buffer = np.empty(taps * most * width, dtype)
    for image in range(batch):
        for first in range(0, height, most):
            rows = min(most, height - first)
            positions = slice(first * width, (first + rows) * width)
            yield image, first, rows, positions, buffer[: taps * rows * width].reshape(taps, -1)


def _fill(
    const floating[:, :, ::1] x,
    floating[:, ::1] columns,
    kernel,
    Py_ssize_t stride,
    padding,
    Py_ssize_t first,
    Py_ssize_t rows,
    Py_ssize_t width,
):
    """Write what the kernel sees of the image x (C, H, W) from output row `first` on; zeros where it sees padding."""
    cdef Py_ssize_t kh = kernel[0], kw = kernel[1], top = padding[0][0], left = padding[1][0]
    cdef Py_ssize_t k, c, i, j, r, n, start, stop, row, offset, at
    with nogil:
        for k in range(columns.shape[0]):
            c, i, j = k // (kh * kw), k // kw % kh, k % kw
            offset = j - left
            start = _first_inside(offset, stride, width)
            stop = _first_inside(offset - x.shape[2], stride, width)
            for r in range(rows):
                row = (first + r) * stride + i - top
                at = r * width
                if row < 0 or row >= x.shape[1]:
                    for n in range(width):
                        columns[k, at + n] = 0
                    continue
                for n in range(start):
                    columns[k, at + n] = 0
                if stride == 1:  # said apart, so that the compiler makes it a copy of adjacent memory
                    for n in range(start, stop):
                        columns[k, at + n] = x[c, row, n + offset]
                else:
                    for n in range(start, stop):
                        columns[k, at + n] = x[c, row, n * stride + offset]
                for n in range(stop, width):
                    columns[k, at + n] = 0


def _spread(
    const floating[:, ::1] columns,
    floating[:, :, ::1] dx,
    kernel,
    Py_ssize_t stride,
    padding,
    Py_ssize_t first,
    Py_ssize_t rows,
    Py_ssize_t width,
):
    """Add every entry of `columns` to the pixel of dx (C, H, W) that `_fill` would have read it from; padding is dropped."""
    cdef Py_ssize_t kh = kernel[0], kw = kernel[1], top = padding[0][0], left = padding[1][0]
    cdef Py_ssize_t k, c, i, j, r, n, start, stop, row, offset, at
    with nogil:
        for k in range(columns.shape[0]):
            c, i, j = k // (kh * kw), k // kw % kh, k % kw
            offset = j - left
            start = _first_inside(offset, stride, width)
            stop = _first_inside(offset - dx.shape[2], stride, width)
            for r in range(rows):
                row = (first + r) * stride + i - top
                at = r * width
                if row < 0 or row >= dx.shape[1]:
                    continue
                if stride == 1:
                    for n in range(start, stop):
                        dx[c, row, n + offset] += columns[k, at + n]
                else:
                    for n in range(start, stop):
                        dx[c, row, n * stride + offset] += columns[k, at + n]


cdef inline Py_ssize_t _first_inside(Py_ssize_t offset, Py_ssize_t stride, Py_ssize_t width) noexcept nogil:
    """Return the first n in [0, width] with n * stride + offset >= 0."""
    if offset >= 0:
        return 0
    return min((stride - 1 - offset) // stride, width)
