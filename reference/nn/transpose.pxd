"""Small transpositions in the registers' own way: by perfect shuffles, which the compiler turns into its vector permutations.

Riffle a row-major matrix of 2^s rows as one does a deck of cards, taking from its first and its second half in turn, and the
highest bit of every row's number becomes the lowest of its column's; after s riffles the matrix is transposed. To deal is the
inverse.
"""

from cython cimport floating


cdef inline void riffle(const floating* x, floating* y, Py_ssize_t half) noexcept nogil:
    """y (2 half,) = x (2 half,) with its halves interleaved."""
    cdef Py_ssize_t n
    for n in range(half):
        y[2 * n] = x[n]
        y[2 * n + 1] = x[half + n]


cdef inline void deal(const floating* x, floating* y, Py_ssize_t half) noexcept nogil:
    """y (2 half,) = what stands at even places of x (2 half,), then what stands at odd ones."""
    cdef Py_ssize_t n
    for n in range(half):
        y[n] = x[2 * n]
        y[half + n] = x[2 * n + 1]
