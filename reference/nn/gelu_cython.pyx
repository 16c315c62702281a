# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of gelu.py: the same rational function and exponential, in registers from an element's read to its write.

The loop over a part has no branch and calls nothing, so that the compiler computes eight or sixteen elements at a time. Threads
share the parts, whose length does not depend on how many threads there are.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange
from reference.nn.exponential cimport exponential
from reference.nn.vectorised cimport VECTORISED

from reference.nn.gelu import MILLS
from reference.nn.memory import empty_like

cdef Py_ssize_t PART = 8192  # elements that one thread takes at a time


def weigh(x):
    """Return x Phi(x) of x (n,)."""
    x, mills = np.ascontiguousarray(x), MILLS[x.dtype]
    y = empty_like(x)
    _weigh(x, y, np.array([*mills.p, *mills.q], x.dtype), mills.limit)
    return y


def weigh_adjoint(dy, x):
    """Return dx (n,) of dy, x (n,)."""
    x, mills = np.ascontiguousarray(x), MILLS[x.dtype]
    dx = empty_like(x)
    _weigh_adjoint(np.ascontiguousarray(dy), x, dx, np.array([*mills.p, *mills.q], x.dtype), mills.limit)
    return dx


def _weigh(const floating[::1] x, floating[::1] y, const floating[::1] mills, floating limit):
    cdef Py_ssize_t n = x.shape[0], part
    for part in prange((n + PART - 1) // PART, nogil=True, schedule="static", use_threads_if=n > 4 * PART):
        _weigh_part(&x[part * PART], &y[part * PART], min(PART, n - part * PART), &mills[0], limit)


def _weigh_adjoint(
    const floating[::1] dy, const floating[::1] x, floating[::1] dx, const floating[::1] mills, floating limit
):
    cdef Py_ssize_t n = x.shape[0], part
    for part in prange((n + PART - 1) // PART, nogil=True, schedule="static", use_threads_if=n > 4 * PART):
        _adjoint_part(
            &dy[part * PART], &x[part * PART], &dx[part * PART], min(PART, n - part * PART), &mills[0], limit
        )


cdef VECTORISED _weigh_part(
    const floating* x, floating* y, Py_ssize_t n, const floating* mills, floating limit
) noexcept nogil:
    cdef floating c[23]
    cdef floating u, tail, upper
    cdef Py_ssize_t i
    _copy(mills, c)
    for i in range(n):
        u = -x[i] if x[i] < 0 else x[i]
        u = limit if u > limit else u
        tail = _mills(c, u) * exponential(<floating>-0.5 * (u * u))
        upper = 1 - tail
        y[i] = x[i] * (upper if x[i] > 0 else tail)


cdef VECTORISED _adjoint_part(
    const floating* dy, const floating* x, floating* dx, Py_ssize_t n, const floating* mills, floating limit
) noexcept nogil:
    cdef floating c[23]
    cdef floating u, density, tail, upper
    cdef Py_ssize_t i
    _copy(mills, c)
    for i in range(n):
        u = -x[i] if x[i] < 0 else x[i]
        u = limit if u > limit else u
        density = exponential(<floating>-0.5 * (u * u))
        tail = _mills(c, u) * density
        upper = 1 - tail
        dx[i] = dy[i] * ((upper if x[i] > 0 else tail) + x[i] * (density * <floating>0.39894228040143268))


cdef inline void _copy(const floating* mills, floating* c) noexcept nogil:
    """Copy the coefficients of P and Q to where no store can change them, so that they stay in registers."""
    cdef Py_ssize_t k
    for k in range(11 if floating is float else 23):
        c[k] = mills[k]


cdef inline floating _mills(const floating* c, floating u) noexcept nogil:
    """Return P(u) / Q(u): Horner's rule, of lengths the compiler knows."""
    cdef Py_ssize_t k
    cdef floating p, q = 1
    if floating is float:
        p = c[4]
        for k in range(3, -1, -1):
            p = p * u + c[k]
        for k in range(9, 4, -1):
            q = q * u + c[k]
    else:
        p = c[10]
        for k in range(9, -1, -1):
            p = p * u + c[k]
        for k in range(21, 10, -1):
            q = q * u + c[k]
    return p / q
