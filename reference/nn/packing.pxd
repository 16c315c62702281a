"""Operands copied into the order in which `multiply` (product.pxd) reads them, whatever theirs is."""

from cython cimport floating

from reference.nn.product cimport ROWS, WIDTH
from reference.nn.transpose cimport deal, riffle
from reference.nn.vectorised cimport VECTORISED

cdef enum:
    LINE = 16  # elements that are transposed at a time


cdef extern from *:
    """
    #if defined(__GNUC__) || defined(__clang__)
    #define dpt_prefetch(address) __builtin_prefetch(address)
    #else
    #define dpt_prefetch(address)
    #endif
    """
    void prefetch "dpt_prefetch"(const void* address) nogil


cdef inline void fetch(const floating* a, Py_ssize_t along, Py_ssize_t n) noexcept nogil:
    """Ask for n elements, `along` apart, before they are needed; only where they are adjacent, as they else lie in too many lines."""
    cdef Py_ssize_t i
    if along == 1:
        for i in range((n + LINE - 1) // LINE):
            prefetch(a + i * LINE)


cdef inline VECTORISED pack_columns(
    const floating* b, Py_ssize_t down, Py_ssize_t along, floating* packed, Py_ssize_t terms, Py_ssize_t columns
) noexcept nogil:
    """packed (terms, WIDTH) = b (terms, columns); zeros in the columns past the last."""
    cdef floating x[WIDTH * LINE]
    cdef floating y[WIDTH * LINE]
    cdef Py_ssize_t whole = 0, block, k, n
    if along == 1:
        for k in range(terms):
            for n in range(columns):
                packed[k * WIDTH + n] = b[k * down + n]
    else:
        if down == 1 and columns == WIDTH:
            whole = terms // LINE * LINE
            for block in range(whole // LINE):
                for n in range(WIDTH):
                    for k in range(LINE):
                        x[n * LINE + k] = b[n * along + block * LINE + k]
                deal(x, y, WIDTH * LINE // 2)
                deal(y, x, WIDTH * LINE // 2)
                deal(x, y, WIDTH * LINE // 2)
                deal(y, packed + block * LINE * WIDTH, WIDTH * LINE // 2)
        for k in range(whole, terms):
            for n in range(columns):
                packed[k * WIDTH + n] = b[k * down + n * along]
    for k in range(terms):
        for n in range(columns, WIDTH):
            packed[k * WIDTH + n] = 0


cdef inline VECTORISED pack_rows(
    const floating* a, Py_ssize_t down, Py_ssize_t along, floating* packed, Py_ssize_t rows, Py_ssize_t terms
) noexcept nogil:
    """packed (terms, ROWS) = a (rows, terms)^T; zeros for the rows past the last."""
    cdef floating x[ROWS * LINE]
    cdef floating y[ROWS * LINE]
    cdef Py_ssize_t whole = 0, block, i, k
    if rows == ROWS and down == 1:
        whole = terms
        for k in range(terms):
            for i in range(ROWS):
                packed[k * ROWS + i] = a[k * along + i]
    elif rows == ROWS and along == 1:
        whole = terms // LINE * LINE
        for block in range(whole // LINE):
            for i in range(ROWS):
                for k in range(LINE):
                    x[i * LINE + k] = a[i * down + block * LINE + k]
            riffle(x, y, ROWS * LINE // 2)
            riffle(y, x, ROWS * LINE // 2)
            riffle(x, packed + block * LINE * ROWS, ROWS * LINE // 2)
    for k in range(whole, terms):
        for i in range(ROWS):
            packed[k * ROWS + i] = a[i * down + k * along] if i < rows else 0


cdef inline VECTORISED zero(floating* total, Py_ssize_t n) noexcept nogil:
    """Set n sums to 0."""
    cdef Py_ssize_t i
    for i in range(n):
        total[i] = 0
