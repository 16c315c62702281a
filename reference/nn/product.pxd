"""The product of a few rows by a panel of columns, small enough for the registers: where products and convolutions spend their time."""

from cython cimport floating

from reference.nn.vectorised cimport VECTORISED, has_avx512

cdef enum:
    ROWS = 8  # ROWS x WIDTH sums take 24 of AVX-512's 32 registers, which keeps its two multipliers busy
    WIDTH = 48
    HALF = 24
    FEW = 4  # columns that are faster one by one: of 577 tokens, 576 fill panels and one is left


cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #else
    #define omp_get_max_threads() 1
    #endif
    """
    int omp_get_max_threads() nogil


cdef inline floating* aligned(floating* address) noexcept nogil:
    """Return the next address that starts a line of the cache (of 64 bytes)."""
    return <floating*> ((<Py_ssize_t> address + 63) // 64 * 64)


cdef inline VECTORISED multiply(
    const floating* a, const floating* b, floating* y, Py_ssize_t terms, Py_ssize_t columns
) noexcept nogil:
    """Add to y (ROWS, WIDTH) the sum over k < terms of a (terms, ROWS) times b (terms, WIDTH), where only `columns` matter.

    Half a panel at a time where the registers hold no more: with AVX2, and in float64.
    """
    cdef floating total[ROWS][WIDTH]
    cdef Py_ssize_t i, k, n
    if columns <= FEW:
        for n in range(columns):
            column(a, b + n, y + n, terms)
        return
    if columns <= HALF or floating is double or not has_avx512():
        half(a, b, y, terms)
        if columns > HALF:
            half(a, b + HALF, y + HALF, terms)
        return
    for i in range(ROWS):
        for n in range(WIDTH):
            total[i][n] = 0
    for k in range(terms):
        for i in range(ROWS):
            for n in range(WIDTH):
                total[i][n] += a[k * ROWS + i] * b[k * WIDTH + n]
    for i in range(ROWS):
        for n in range(WIDTH):
            y[i * WIDTH + n] += total[i][n]


cdef inline void half(const floating* a, const floating* b, floating* y, Py_ssize_t terms) noexcept nogil:
    cdef floating total[ROWS][HALF]
    cdef Py_ssize_t i, k, n
    for i in range(ROWS):
        for n in range(HALF):
            total[i][n] = 0
    for k in range(terms):
        for i in range(ROWS):
            for n in range(HALF):
                total[i][n] += a[k * ROWS + i] * b[k * WIDTH + n]
    for i in range(ROWS):
        for n in range(HALF):
            y[i * WIDTH + n] += total[i][n]


cdef inline void column(const floating* a, const floating* b, floating* y, Py_ssize_t terms) noexcept nogil:
    """The same for the first column alone, whose sum over k is made in four parts side by side."""
    cdef floating total[4][ROWS]
    cdef Py_ssize_t i, j, k, whole = terms & -4
    for j in range(4):
        for i in range(ROWS):
            total[j][i] = 0
    for k in range(0, whole, 4):
        for j in range(4):
            for i in range(ROWS):
                total[j][i] += a[(k + j) * ROWS + i] * b[(k + j) * WIDTH]
    for k in range(whole, terms):
        for i in range(ROWS):
            total[0][i] += a[k * ROWS + i] * b[k * WIDTH]
    for i in range(ROWS):
        y[i * WIDTH] += (total[0][i] + total[1][i]) + (total[2][i] + total[3][i])
