"""The exact GELU, x Phi(x) with Phi the standard normal distribution: the activation of the transformer's MLP and of Read.

Phi(x) = (1 + erf(x / sqrt 2)) / 2. NumPy has no erf, so Phi is computed here, from its upper tail for u = |x|:

    Phi(-u) = exp(-u^2 / 2) M(u),      Phi(u) = 1 - Phi(-u)

M(u) = exp(u^2 / 2) erfc(u / sqrt 2) / 2 (Mills' ratio over sqrt(2 pi)) falls smoothly from 1/2, in the end like
1 / (u sqrt(2 pi)), so one rational function P(u) / Q(u) of degrees n - 1 and n serves for all u; and the tail keeps its relative
accuracy, which 1 + erf would lose.

The coefficients interpolate M: with u = c (1 + t) / (1 - t), which maps [-1, 1) to [0, inf), P(u_k) = M(u_k) Q(u_k) is demanded
at the 2n Chebyshev nodes t_k of [-1, t(limit)], and Q is monic: a linear system, solved with 80 digits. Beyond `limit`
exp(-u^2 / 2) is 0. All coefficients are positive, so nothing cancels in either polynomial. A test computes them afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable

Vjp = Callable[[Array], Array]


class Mills(NamedTuple):
    """A rational approximation of M on [0, limit]; coefficients from the constant term up."""

    limit: float
    p: tuple[float, ...]
    q: tuple[float, ...]


# Relative error 7.9e-9 (n = 5, c = 3) and 1.8e-18 (n = 11, c = 4): well under one rounding of the dtype.
MILLS = {
    np.dtype(np.float32): Mills(
        15.0,
        (48.386156874402627, 42.4515226841819324, 17.7549964611403607, 3.93863910174635893, 0.398946590969777831),
        (96.772313327720305, 162.116213111356654, 116.47345639371257, 45.491145676519118, 9.87329833752485199, 1.0),
    ),
    np.dtype(np.float64): Mills(
        40.0,
        (
            *(904162.903248210122, 1495815.6470928596, 1226753.40232331697, 644421.506676919172, 237874.478134080744),
            *(64176.3986543756484, 12798.1556962897239, 1865.0332702304893, 190.783948709866991, 12.4564795705792604),
            0.398942280401515788,
        ),
        (
            *(1808325.80649642024, 4434466.5360906029, 5087536.28594207166, 3611821.48102113453, 1767154.14508163939),
            *(627396.649863637743, 165478.873547807679, 32556.4433558750258, 4706.16889253238772, 479.224440176554457),
            *(31.2237638940268645, 1.0),
        ),
    ),
}
_BLOCK = 16384  # elements at a time: the handful of temporaries then stay in the cache, which is several times faster


@differentiable
def gelu(x: Array) -> tuple[Array, Vjp]:
    """Return x Phi(x) for a float array of any shape; vjp(dy) -> dx = dy (Phi(x) + x phi(x)). Raises TypeError for dtypes."""
    check_arrays("gelu", x=x)
    flat, shape = x.reshape(-1), x.shape

    def vjp(dy: Array) -> Array:
        check_gradient("gelu", dy, shape, flat.dtype)
        return weigh_adjoint(dy.reshape(-1), flat).reshape(shape)

    return weigh(flat).reshape(shape), vjp


@twinned
def weigh(x: Array) -> Array:
    """Return x Phi(x) of x (n,)."""
    y = np.empty_like(x)
    for part in _blocks(x.size):
        distribution, _ = standard_normal(x[part])
        np.multiply(x[part], distribution, out=y[part])
    return y


@twinned
def weigh_adjoint(dy: Array, x: Array) -> Array:
    """Return dx = dy (Phi(x) + x phi(x)) of dy, x (n,)."""
    dx = np.empty_like(x)
    for part in _blocks(x.size):
        slope, density = standard_normal(x[part])
        density *= x[part]
        slope += density
        np.multiply(dy[part], slope, out=dx[part])
    return dx


def standard_normal(x: Array) -> tuple[Array, Array]:
    """Return the distribution Phi(x) and the density phi(x) of the standard normal law, in the dtype of x (n,).

    Both err by a few roundings plus the rounding of x^2 / 2 in the exponent: about (3 + x^2 / 2) eps of their value.
    """
    mills = MILLS[x.dtype]
    u = np.abs(x)
    np.minimum(u, mills.limit, out=u)
    distribution = _polynomial(mills.p, u)
    distribution /= _polynomial(mills.q, u)
    density = np.square(u, out=u)
    density *= -0.5
    np.exp(density, out=density)
    distribution *= density
    np.subtract(1, distribution, out=distribution, where=x > 0)
    density *= 1 / np.sqrt(2 * np.pi)
    return distribution, density


def _polynomial(coefficients: tuple[float, ...], u: Array) -> Array:
    value = np.full_like(u, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value *= u
        value += coefficient
    return value


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))
