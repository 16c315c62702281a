"""The product of a few rows by a panel of columns, small enough for the registers: where the convolutions spend their time."""

from cython cimport floating

from reference.nn.vectorised cimport VECTORISED

cdef enum:
    ROWS = 8  # ROWS x WIDTH sums take 24 of AVX-512's 32 registers, which keeps its two multipliers busy
    WIDTH = 48


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


cdef inline VECTORISED multiply(const floating* a, const floating* b, floating* y, Py_ssize_t terms) noexcept nogil:
    """Add to y (ROWS, WIDTH) the sum over k < terms of a (terms, ROWS) times b (terms, WIDTH)."""
    cdef floating total[ROWS][WIDTH]
    cdef Py_ssize_t i, k, n
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
