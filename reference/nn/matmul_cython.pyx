# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of matmul.py: every product of matrices that the reference makes, with the bias added as the result is written.

First b is copied into panels of WIDTH columns. Then the result's rows are shared out, CHUNK panels of ROWS rows at a time: of TERMS
terms at a time those rows of a are packed, which keeps them in the second-level cache, and meet every panel of b, whose piece
stays in the first. The sums leave that core's cache once, when they are complete.

Copying takes each element of a and b once, so it may be slow where an operand is transposed; in all it is some percent. Which of
the two is b is free, since y^T = b^T a^T: the smaller operand, if that is the one whose columns are not adjacent in memory.

Tasks share nothing, and every element is summed in the same order however they are cut, so the result does not depend on how many
threads run them.
"""

import math

import numpy as np

from cython cimport floating
from cython.parallel cimport prange, threadid

from reference.nn.packing cimport fetch, pack_columns, pack_rows, zero
from reference.nn.product cimport ROWS, WIDTH, aligned, multiply, omp_get_max_threads
from reference.nn.transpose cimport riffle
from reference.nn.vectorised cimport VECTORISED

from reference.nn.memory import empty, workspace

cdef enum:
    PART = 4  # panels of rows that are written together, so that whole lines of the cache are
    TERMS = 256
    CHUNK = 32  # panels of rows
    GROUP = 16  # panels of columns whose sums one task holds

cdef Py_ssize_t FEW = 32768  # products of two numbers for which waking other threads does not pay


def product(a, b, bias):
    """Return a b + bias of a (..., N, K), b (..., K, M) and bias (M,) or None: (..., N, M)."""
    *stack, rows, terms = a.shape
    a, b = stacked(a), stacked(b)
    y = empty((len(a), rows, b.shape[2]), a.dtype)
    bias = np.zeros(b.shape[2], a.dtype) if bias is None else np.ascontiguousarray(bias)
    swapped = b.strides[1] < b.strides[2] and b.shape[2] > rows
    left, right = (b.transpose(0, 2, 1), a.transpose(0, 2, 1)) if swapped else (a, b)
    scratch = CHUNK * ROWS * (TERMS + GROUP * WIDTH)
    packed = len(y) * terms * ((right.shape[2] + WIDTH - 1) // WIDTH * WIDTH)
    _multiply(left, right, bias, y, workspace("product", omp_get_max_threads() * scratch + packed + 16, y.dtype), scratch, swapped)
    return y.reshape(*stack, rows, b.shape[2])


def stacked(array):
    """Return array (..., rows, columns) as (S, rows, columns): a view where that is possible."""
    *stack, rows, columns = array.shape
    if any(stride % array.itemsize for stride in array.strides):  # a field of a structure, say
        array = np.ascontiguousarray(array)
    return array.reshape(math.prod(stack), rows, columns)


def _multiply(
    const floating[:, :, :] a,
    const floating[:, :, :] b,
    const floating[::1] bias,
    floating[:, :, ::1] y,
    floating[::1] space,
    Py_ssize_t scratch,
    bint swapped,
):
    cdef Py_ssize_t rows = a.shape[1], terms = a.shape[2], columns = b.shape[2], stack = y.shape[0], task
    cdef Py_ssize_t panels = (columns + WIDTH - 1) // WIDTH, groups = (panels + GROUP - 1) // GROUP
    cdef Py_ssize_t height = CHUNK * ROWS, chunks = (rows + height - 1) // height
    cdef Py_ssize_t size = sizeof(floating), down = a.strides[1] // size, along = a.strides[2] // size
    cdef Py_ssize_t b_down = b.strides[1] // size, b_along = b.strides[2] // size
    cdef bint shared = rows * columns * terms * stack > FEW
    cdef floating* panel = aligned(&space[0]) + omp_get_max_threads() * scratch
    if rows == 0 or columns == 0:
        return
    while stack * groups * chunks < 4 * omp_get_max_threads() and height > ROWS:
        height //= 2
        chunks = (rows + height - 1) // height
    for task in prange(stack * panels if terms else 0, nogil=True, use_threads_if=shared):
        pack_columns(
            &b[task // panels, 0, task % panels * WIDTH],
            b_down,
            b_along,
            panel + task * terms * WIDTH,
            terms,
            min(WIDTH, columns - task % panels * WIDTH),
        )
    for task in prange(stack * groups * chunks, schedule="dynamic", nogil=True, use_threads_if=shared):
        run(
            &a[task // groups // chunks, task // groups % chunks * height, 0] if terms else NULL,
            down,
            along,
            panel + (task // groups // chunks * panels + task % groups * GROUP) * terms * WIDTH,
            &bias[0],
            &y[task // groups // chunks, 0, 0],
            aligned(&space[0]) + threadid() * scratch,
            task // groups % chunks * height,
            min(height, rows - task // groups % chunks * height),
            task % groups * GROUP * WIDTH,
            min(GROUP * WIDTH, columns - task % groups * GROUP * WIDTH),
            terms,
            rows if swapped else columns,
            swapped,
        )


cdef void run(
    const floating* a,
    Py_ssize_t down,
    Py_ssize_t along,
    const floating* b,
    const floating* bias,
    floating* y,
    floating* scratch,
    Py_ssize_t row,
    Py_ssize_t rows,
    Py_ssize_t column,
    Py_ssize_t columns,
    Py_ssize_t terms,
    Py_ssize_t apart,
    bint swapped,
) noexcept nogil:
    """Compute `rows` rows of a, from `row` on, times `columns` columns of b, from `column` on, and write them.

    b is (panels, terms, WIDTH); total, after the packed rows in `scratch`, is (panels of columns, rows, WIDTH). The next terms of
    a are asked for while these are multiplied.
    """
    cdef Py_ssize_t high = (rows + ROWS - 1) // ROWS, wide = (columns + WIDTH - 1) // WIDTH, size = high * ROWS * WIDTH
    cdef Py_ssize_t block, first, count, p, q, r, least = (rows + high * wide - 1) // (high * wide)
    cdef floating* total = scratch + CHUNK * ROWS * TERMS
    cdef const floating* piece
    zero(total, wide * size)
    for block in range((terms + TERMS - 1) // TERMS):
        first = block * TERMS
        count = min(TERMS, terms - first)
        for p in range(high):
            pack_rows(
                a + p * ROWS * down + first * along, down, along, scratch + p * ROWS * TERMS, min(ROWS, rows - p * ROWS), count
            )
        for q in range(wide):
            piece = b + (q * terms + first) * WIDTH
            for p in range(high):
                for r in range(least * (q * high + p), min(least * (q * high + p + 1), rows)):
                    fetch(a + r * down + (first + TERMS) * along, along, min(TERMS, terms - first - TERMS))
                multiply(scratch + p * ROWS * TERMS, piece, total + q * size + p * ROWS * WIDTH, count, columns - q * WIDTH)
    for q in range(wide):
        if swapped:
            write_swapped(
                total + q * size, bias + row, y + (column + q * WIDTH) * apart + row, apart, rows, min(WIDTH, columns - q * WIDTH)
            )
        else:
            write(
                total + q * size,
                bias + column + q * WIDTH,
                y + row * apart + column + q * WIDTH,
                apart,
                rows,
                min(WIDTH, columns - q * WIDTH),
            )


cdef VECTORISED write(
    const floating* total, const floating* bias, floating* y, Py_ssize_t apart, Py_ssize_t rows, Py_ssize_t columns
) noexcept nogil:
    """y (rows, columns), whose rows begin `apart` entries after each other, = total (rows, WIDTH) + bias (columns,)."""
    cdef Py_ssize_t i, n
    for i in range(rows):
        for n in range(columns):
            y[i * apart + n] = total[i * WIDTH + n] + bias[n]


cdef VECTORISED write_swapped(
    const floating* total, const floating* bias, floating* y, Py_ssize_t apart, Py_ssize_t rows, Py_ssize_t columns
) noexcept nogil:
    """y (columns, rows), whose rows begin `apart` entries after each other, = total (rows, WIDTH)^T + bias (rows,)."""
    cdef floating x[PART][ROWS * WIDTH]
    cdef floating z[ROWS * WIDTH]
    cdef Py_ssize_t block, first, part, i, n
    for block in range((rows + PART * ROWS - 1) // (PART * ROWS)):
        first = block * PART * ROWS
        for part in range(min(PART, (rows - first + ROWS - 1) // ROWS)):
            riffle(total + (first + part * ROWS) * WIDTH, x[part], ROWS * WIDTH // 2)
            riffle(x[part], z, ROWS * WIDTH // 2)
            riffle(z, x[part], ROWS * WIDTH // 2)
        if rows - first >= PART * ROWS:
            for n in range(columns):
                for part in range(PART):
                    for i in range(ROWS):
                        y[n * apart + first + part * ROWS + i] = x[part][n * ROWS + i] + bias[first + part * ROWS + i]
        else:
            for n in range(columns):
                for i in range(rows - first):
                    y[n * apart + first + i] = x[i // ROWS][n * ROWS + i % ROWS] + bias[first + i]
