# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of attention.py: a few rows of A at a time, from their scores to their part of the result, in a core's own cache.

A task is CHUNK panels of ROWS queries of one head. It multiplies them with all keys, takes the softmax of each row, and multiplies
that with all values. Tasks share nothing, so the result does not depend on how many threads run them.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange, threadid

from reference.nn.exponential cimport exponential
from reference.nn.packing cimport pack_columns, pack_rows, zero
from reference.nn.product cimport ROWS, WIDTH, aligned, multiply, omp_get_max_threads
from reference.nn.sums cimport greatest, total
from reference.nn.vectorised cimport VECTORISED

from reference.nn.matmul_cython import stacked
from reference.nn.memory import empty, workspace

cdef enum:
    CHUNK = 8


def attend(q, k, v, scale):
    """Return softmax(scale q k^T) v of q (..., N, d), k (..., M, d) and v (..., M, e): (..., N, e)."""
    shape = q.shape
    *stack, queries, depth = shape
    q, k, v = stacked(q), stacked(k), stacked(v)
    keys, width = v.shape[1:]
    heads = stack.pop() if stack else 1
    y = empty((len(q) // heads, queries, heads, width), q.dtype)  # a token's heads side by side, as what follows wants them
    wide, out = (keys + WIDTH - 1) // WIDTH, (width + WIDTH - 1) // WIDTH
    scratch = (CHUNK * ROWS * (depth + (wide + out) * WIDTH) + 2 * keys * ROWS + 15) // 16 * 16
    packed = len(q) * (wide * depth + out * keys) * WIDTH
    _attend(q, k, v, scale, y, workspace("attention", omp_get_max_threads() * scratch + packed + 16, q.dtype), scratch)
    return y.swapaxes(1, 2).reshape(*shape[: len(shape) - 1], width)


def _attend(
    const floating[:, :, :] q,
    const floating[:, :, :] k,
    const floating[:, :, :] v,
    floating scale,
    floating[:, :, :, ::1] y,
    floating[::1] space,
    Py_ssize_t scratch,
):
    cdef Py_ssize_t stack = q.shape[0], queries = y.shape[1], heads = y.shape[2], width = y.shape[3]
    cdef Py_ssize_t keys = k.shape[1], depth = k.shape[2], task
    cdef Py_ssize_t wide = (keys + WIDTH - 1) // WIDTH, out = (width + WIDTH - 1) // WIDTH
    cdef Py_ssize_t chunks = (queries + CHUNK * ROWS - 1) // (CHUNK * ROWS), size = sizeof(floating)
    cdef floating* key_panels = aligned(&space[0]) + omp_get_max_threads() * scratch
    cdef floating* value_panels = key_panels + stack * wide * depth * WIDTH
    for task in prange(stack * wide, nogil=True):
        pack_columns(
            &k[task // wide, task % wide * WIDTH, 0],
            k.strides[2] // size,
            k.strides[1] // size,
            key_panels + task * depth * WIDTH,
            depth,
            min(WIDTH, keys - task % wide * WIDTH),
        )
    for task in prange(stack * out, nogil=True):
        pack_columns(
            &v[task // out, 0, task % out * WIDTH],
            v.strides[1] // size,
            v.strides[2] // size,
            value_panels + task * keys * WIDTH,
            keys,
            min(WIDTH, width - task % out * WIDTH),
        )
    for task in prange(stack * chunks, schedule="dynamic", nogil=True):
        run(
            &q[task // chunks, task % chunks * CHUNK * ROWS, 0],
            q.strides[1] // size,
            q.strides[2] // size,
            key_panels + task // chunks * wide * depth * WIDTH,
            value_panels + task // chunks * out * keys * WIDTH,
            scale,
            &y[task // chunks // heads, task % chunks * CHUNK * ROWS, task // chunks % heads, 0],
            heads * width,
            aligned(&space[0]) + threadid() * scratch,
            min(CHUNK * ROWS, queries - task % chunks * CHUNK * ROWS),
            keys,
            depth,
            width,
        )


cdef void run(
    const floating* q,
    Py_ssize_t down,
    Py_ssize_t along,
    const floating* key_panels,
    const floating* value_panels,
    floating scale,
    floating* y,
    Py_ssize_t apart,
    floating* scratch,
    Py_ssize_t rows,
    Py_ssize_t keys,
    Py_ssize_t depth,
    Py_ssize_t width,
) noexcept nogil:
    """Attend with `rows` queries: q (rows, depth), y (rows, width), whose rows begin `apart` entries after each other.

    scores is (panels of keys, panels of rows, ROWS, WIDTH), sums (panels of width, panels of rows, ROWS, WIDTH).
    """
    cdef Py_ssize_t wide = (keys + WIDTH - 1) // WIDTH, out = (width + WIDTH - 1) // WIDTH, tile = ROWS * WIDTH
    cdef Py_ssize_t high = (rows + ROWS - 1) // ROWS, p, i, panel
    cdef floating* row = scratch + CHUNK * ROWS * depth
    cdef floating* lines = row + keys * ROWS
    cdef floating* scores = lines + keys * ROWS
    cdef floating* sums = scores + wide * high * tile
    zero(scores, (wide + out) * high * tile)
    for p in range(high):
        pack_rows(q + p * ROWS * down, down, along, scratch + p * ROWS * depth, min(ROWS, rows - p * ROWS), depth)
    multiply_by(scratch, scale, high * ROWS * depth)
    for panel in range(wide):
        for p in range(high):
            multiply(
                scratch + p * ROWS * depth,
                key_panels + panel * depth * WIDTH,
                scores + (panel * high + p) * tile,
                depth,
                keys - panel * WIDTH,
            )
    for p in range(high):
        for i in range(ROWS):
            softmax(scores + p * tile + i * WIDTH, high * tile, lines + i * keys, keys)
        pack_rows(lines, keys, 1, row, ROWS, keys)
        for panel in range(out):
            multiply(
                row, value_panels + panel * keys * WIDTH, sums + (panel * high + p) * tile, keys, width - panel * WIDTH
            )
            write(
                sums + (panel * high + p) * tile,
                y + p * ROWS * apart + panel * WIDTH,
                apart,
                min(ROWS, rows - p * ROWS),
                min(WIDTH, width - panel * WIDTH),
            )


cdef VECTORISED multiply_by(floating* x, floating scale, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] *= scale


cdef VECTORISED softmax(const floating* scores, Py_ssize_t apart, floating* y, Py_ssize_t keys) noexcept nogil:
    """y (keys,) = the softmax of a row of scores, whose panels begin `apart` entries after each other."""
    # NaN, which the maximum passes over, and inf - inf make the sum NaN, and with it the row.
    cdef floating most, share
    cdef Py_ssize_t panel, n
    for panel in range((keys + WIDTH - 1) // WIDTH):
        for n in range(min(WIDTH, keys - panel * WIDTH)):
            y[panel * WIDTH + n] = scores[panel * apart + n]
    most = greatest(y, keys)
    for n in range(keys):
        y[n] = exponential(y[n] - most)
    share = 1 / total(y, keys)
    for n in range(keys):
        y[n] *= share


cdef VECTORISED write(
    const floating* sums, floating* y, Py_ssize_t apart, Py_ssize_t rows, Py_ssize_t columns
) noexcept nogil:
    """y (rows, columns), whose rows begin `apart` entries after each other, = sums (ROWS, WIDTH)."""
    cdef Py_ssize_t i, n
    for i in range(rows):
        for n in range(columns):
            y[i * apart + n] = sums[i * WIDTH + n]
