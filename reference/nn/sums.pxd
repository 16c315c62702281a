"""Sums along a row that the compiler vectorises: the one reordering of additions that it may not make itself, written out.

A sum in one variable is a chain, each addition waiting for the last. Here 32 partial sums run side by side, in two arrays of 16,
which the compiler keeps in registers, and are added pairwise at the end: that is faster and rounds less. The order depends on
the length alone.
"""

from cython cimport floating


cdef inline void _clear(floating* a, floating* b) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(16):
        a[j] = 0
        b[j] = 0


cdef inline floating _folded(floating* a, floating* b) noexcept nogil:
    """Return the sum of both arrays, halving the number of partial sums again and again."""
    cdef Py_ssize_t j
    for j in range(16):
        a[j] += b[j]
    for j in range(8):
        a[j] += a[j + 8]
    for j in range(4):
        a[j] += a[j + 4]
    return (a[0] + a[2]) + (a[1] + a[3])


cdef inline floating total(const floating* x, Py_ssize_t n) noexcept nogil:
    """Return the sum of x[0 .. n)."""
    cdef floating a[16]
    cdef floating b[16]
    cdef Py_ssize_t i, j, whole = n & -32
    _clear(a, b)
    for i in range(0, whole, 32):
        for j in range(16):
            a[j] += x[i + j]
        for j in range(16):
            b[j] += x[i + 16 + j]
    for i in range(whole, n):
        a[i & 15] += x[i]
    return _folded(a, b)


cdef inline floating total_of_squares(const floating* x, floating centre, Py_ssize_t n) noexcept nogil:
    """Return the sum of (x[i] - centre)^2."""
    cdef floating a[16]
    cdef floating b[16]
    cdef Py_ssize_t i, j, whole = n & -32
    _clear(a, b)
    for i in range(0, whole, 32):
        for j in range(16):
            a[j] += (x[i + j] - centre) * (x[i + j] - centre)
        for j in range(16):
            b[j] += (x[i + 16 + j] - centre) * (x[i + 16 + j] - centre)
    for i in range(whole, n):
        a[i & 15] += (x[i] - centre) * (x[i] - centre)
    return _folded(a, b)


cdef inline floating total_of_products(const floating* x, floating centre, const floating* y, Py_ssize_t n) noexcept nogil:
    """Return the sum of (x[i] - centre) y[i]."""
    cdef floating a[16]
    cdef floating b[16]
    cdef Py_ssize_t i, j, whole = n & -32
    _clear(a, b)
    for i in range(0, whole, 32):
        for j in range(16):
            a[j] += (x[i + j] - centre) * y[i + j]
        for j in range(16):
            b[j] += (x[i + 16 + j] - centre) * y[i + 16 + j]
    for i in range(whole, n):
        a[i & 15] += (x[i] - centre) * y[i]
    return _folded(a, b)


cdef inline floating greatest(const floating* x, Py_ssize_t n) noexcept nogil:
    """Return the largest of x[0 .. n), n >= 1; NaN is passed over, or returned."""
    cdef floating lanes[32]  # one array: the compiler does not vectorise a choice in a loop as short as 16
    cdef floating best = x[0]
    cdef Py_ssize_t i, j, whole = n & -32
    for j in range(32):
        lanes[j] = best
    for i in range(0, whole, 32):
        for j in range(32):
            lanes[j] = x[i + j] if x[i + j] > lanes[j] else lanes[j]
    for i in range(whole, n):
        best = x[i] if x[i] > best else best
    for j in range(16):
        lanes[j] = lanes[j + 16] if lanes[j + 16] > lanes[j] else lanes[j]
    for j in range(8):
        lanes[j] = lanes[j + 8] if lanes[j + 8] > lanes[j] else lanes[j]
    for j in range(8):
        best = lanes[j] if lanes[j] > best else best
    return best
