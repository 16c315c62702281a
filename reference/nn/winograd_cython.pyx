# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Convolution with a 3x3 kernel at stride 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, section 4.1).

A tile of 2 x 2 outputs sees 4 x 4 pixels d of x. With the 3 x 3 kernel g and the matrices

            1  0 -1  0           1    0    0             1  1  1  0
    B^T  =  0  1  1  0     G  =  1/2  1/2  1/2    A^T =  0  1 -1 -1
            0 -1  1  0           1/2 -1/2  1/2
            0  1  0 -1           0    0    1

its outputs are A^T [(G g G^T) * (B^T d B)] A, where * multiplies entry by entry: 16 products where the sum over taps has 36.
The sum over channels moves inside, since A is the same for all of them, and makes each of the 16 entries f a product of
matrices,

    M_f (outputs, tiles) = sum over channels of U_f (outputs, channels) V_f (channels, tiles),    U = G g G^T,    V = B^T d B.

A task is WIDTH tiles: their V, and their M for GROUP panels of outputs at a time, stay in a core's second-level cache. Tasks
share only x and U, which they read, so the result does not depend on how many threads run them. A tile that sees a NaN or an
infinity has four outputs that are NaN.

In memory, U is (panels of ROWS outputs, 16, channels, ROWS), V (16, channels, WIDTH), M (panels, 16, ROWS, WIDTH).
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange, threadid

from reference.nn.product cimport ROWS, WIDTH, aligned, multiply, omp_get_max_threads
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty, workspace

cdef enum:
    PIXELS = 2 * WIDTH + 2  # of one row of x that a row of tiles sees
    GROUP = 8  # panels of outputs that use V_f while it is in the first-level cache
    APART = 16  # entries between one V_f and the next, lest all 16 compete for the same lines of the cache


def correlate(x, weight, bias, padding, out):
    """Return y (B, O, *out) of x (B, C, H, W), weight (O, C, 3, 3) and bias (O,) or None, at stride 1."""
    outputs, channels = weight.shape[:2]
    y = empty((len(x), outputs, *out), x.dtype)
    panels, each = (outputs + ROWS - 1) // ROWS, 16 * channels * ROWS
    u = workspace("winograd.u", panels * each, x.dtype)[: panels * each].reshape(panels, 16, channels, ROWS)
    each = 16 * (channels * WIDTH + APART) + GROUP * 16 * ROWS * WIDTH + 64
    scratch = workspace("winograd", omp_get_max_threads() * each, x.dtype)[: omp_get_max_threads() * each].reshape(-1, each)
    bias = np.zeros(outputs, x.dtype) if bias is None else bias
    _correlate(np.ascontiguousarray(x), weight, bias, y, u, scratch, padding[0][0], padding[1][0])
    return y


def _correlate(
    const floating[:, :, :, ::1] x,
    const floating[:, :, :, :] weight,
    const floating[:] bias,
    floating[:, :, :, ::1] y,
    floating[:, :, :, ::1] u,
    floating[:, ::1] scratch,
    Py_ssize_t top,
    Py_ssize_t left,
):
    cdef Py_ssize_t down = (y.shape[2] + 1) // 2, across = (y.shape[3] + 1) // 2
    cdef Py_ssize_t runs = (down * across + WIDTH - 1) // WIDTH, panel, task
    for panel in prange(u.shape[0], nogil=True):
        transform_weight(weight, &u[panel, 0, 0, 0], panel * ROWS)
    for task in prange(x.shape[0] * runs, schedule="dynamic", nogil=True):
        run(x[task // runs], u, bias, y[task // runs], aligned(&scratch[threadid(), 0]), task % runs * WIDTH, top, left)


cdef VECTORISED transform_weight(const floating[:, :, :, :] weight, floating* u, Py_ssize_t first) noexcept nogil:
    """u (16, channels, ROWS) = G g G^T of the ROWS outputs from `first` on; zeros for those past the last."""
    cdef Py_ssize_t channels = weight.shape[1], c, i, j, r, rows = min(ROWS, weight.shape[0] - first)
    cdef floating g[3][3][ROWS]
    cdef floating half[4][3][ROWS]
    cdef floating* at
    for i in range(3):
        for j in range(3):
            for r in range(ROWS):
                g[i][j][r] = 0
    for c in range(channels):
        for r in range(rows):
            for i in range(3):
                for j in range(3):
                    g[i][j][r] = weight[first + r, c, i, j]
        for j in range(3):
            for r in range(ROWS):
                half[0][j][r] = g[0][j][r]
                half[1][j][r] = (g[0][j][r] + g[1][j][r] + g[2][j][r]) / 2
                half[2][j][r] = (g[0][j][r] - g[1][j][r] + g[2][j][r]) / 2
                half[3][j][r] = g[2][j][r]
        for i in range(4):
            at = u + (4 * i * channels + c) * ROWS
            for r in range(ROWS):
                at[r] = half[i][0][r]
                at[channels * ROWS + r] = (half[i][0][r] + half[i][1][r] + half[i][2][r]) / 2
                at[2 * channels * ROWS + r] = (half[i][0][r] - half[i][1][r] + half[i][2][r]) / 2
                at[3 * channels * ROWS + r] = half[i][2][r]


cdef void run(
    const floating[:, :, ::1] x,
    const floating[:, :, :, ::1] u,
    const floating[:] bias,
    floating[:, :, ::1] y,
    floating* v,
    Py_ssize_t first,
    Py_ssize_t top,
    Py_ssize_t left,
) noexcept nogil:
    """Compute the outputs of WIDTH tiles (or as many as are left) from tile `first` on, in row-major order."""
    cdef Py_ssize_t channels = x.shape[0], across = (y.shape[2] + 1) // 2, apart = channels * WIDTH + APART
    cdef Py_ssize_t stop = min(first + WIDTH, (y.shape[1] + 1) // 2 * across)
    cdef Py_ssize_t tile, row, column, length, c, f, p, r, n, panel = 0, panels
    cdef floating* m = v + 16 * apart
    cdef floating* at
    tile = first
    while tile < stop:  # those that are neighbours in a row, together
        row, column = tile // across, tile % across
        length = min(across - column, stop - tile)
        for c in range(channels):
            at = v + c * WIDTH + tile - first
            transform_input(&x[c, 0, 0], at, apart, x.shape[1], x.shape[2], 2 * row - top, 2 * column - left, length)
        tile += length
    while panel < u.shape[0]:
        panels = min(GROUP, u.shape[0] - panel)
        for n in range(panels * 16 * ROWS * WIDTH):
            m[n] = 0
        for f in range(16):
            for p in range(panels):
                multiply(&u[panel + p, f, 0, 0], v + f * apart, m + (p * 16 + f) * ROWS * WIDTH, channels, WIDTH)
        tile = first
        while tile < stop:
            row, column = tile // across, tile % across
            length = min(across - column, stop - tile)
            for r in range(panel * ROWS, min((panel + panels) * ROWS, y.shape[0])):
                at = m + ((r // ROWS - panel) * 16 * ROWS + r % ROWS) * WIDTH + tile - first
                transform_output(at, bias[r], &y[r, 0, 0], y.shape[1], y.shape[2], 2 * row, 2 * column, length)
            tile += length
        panel += panels


cdef VECTORISED transform_input(
    const floating* x,
    floating* v,
    Py_ssize_t apart,
    Py_ssize_t height,
    Py_ssize_t width,
    Py_ssize_t row,
    Py_ssize_t column,
    Py_ssize_t length,
) noexcept nogil:
    """v (16, ...) = B^T d B of `length` tiles in a row, the first at pixel (row, column) of the plane x; it is zero outside."""
    cdef floating d[4][PIXELS]
    cdef floating b[4][PIXELS]
    cdef Py_ssize_t i, n, pixels = 2 * length + 2
    cdef Py_ssize_t start = min(max(-column, 0), pixels), stop = max(min(width - column, pixels), start)
    for i in range(4):
        if row + i < 0 or row + i >= height:
            for n in range(pixels):
                d[i][n] = 0
            continue
        for n in range(start):
            d[i][n] = 0
        for n in range(start, stop):
            d[i][n] = x[(row + i) * width + column + n]
        for n in range(stop, pixels):
            d[i][n] = 0
    for n in range(pixels):
        b[0][n] = d[0][n] - d[2][n]
        b[1][n] = d[1][n] + d[2][n]
        b[2][n] = d[2][n] - d[1][n]
        b[3][n] = d[1][n] - d[3][n]
    for i in range(4):
        for n in range(length):
            v[n] = b[i][2 * n] - b[i][2 * n + 2]
        v += apart
        for n in range(length):
            v[n] = b[i][2 * n + 1] + b[i][2 * n + 2]
        v += apart
        for n in range(length):
            v[n] = b[i][2 * n + 2] - b[i][2 * n + 1]
        v += apart
        for n in range(length):
            v[n] = b[i][2 * n + 1] - b[i][2 * n + 3]
        v += apart


cdef VECTORISED transform_output(
    const floating* m,
    floating bias,
    floating* y,
    Py_ssize_t height,
    Py_ssize_t width,
    Py_ssize_t row,
    Py_ssize_t column,
    Py_ssize_t length,
) noexcept nogil:
    """Write A^T m A + bias of `length` tiles in a row, m (16, ...), to the plane y from (row, column) on, inside it."""
    cdef floating a[4][WIDTH]
    cdef floating line[2 * WIDTH]
    cdef Py_ssize_t i, j, n, f = ROWS * WIDTH
    for i in range(min(2, height - row)):
        for j in range(4):
            if i == 0:
                for n in range(length):
                    a[j][n] = m[j * f + n] + m[(4 + j) * f + n] + m[(8 + j) * f + n]
            else:
                for n in range(length):
                    a[j][n] = m[(4 + j) * f + n] - m[(8 + j) * f + n] - m[(12 + j) * f + n]
        for n in range(length):
            line[2 * n] = a[0][n] + a[1][n] + a[2][n] + bias
            line[2 * n + 1] = a[1][n] - a[2][n] - a[3][n] + bias
        for n in range(min(2 * length, width - column)):
            y[(row + i) * width + column + n] = line[n]
