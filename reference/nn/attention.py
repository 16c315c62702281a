"""Scaled dot-product attention (Vaswani et al. 2017, equation 1): what every token gathers from all the others.

    y = A v,    A = softmax(q k^T / sqrt(d))            q, k, v (..., N, d), A (..., N, N)

It equals two products with a softmax between, and is one primitive because A is large: N = 577 tokens in 16 heads make 5 million
numbers of a megabyte's result. So A is not kept for the vjp, which computes it again, and the compiled twin never has more of it
than a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from reference.implementation import twinned

from .checks import Array, check_arrays, check_gradient
from .differentiable import differentiable
from .matmul import product
from .softmax import proportions, proportions_adjoint

Vjp = Callable[[Array], tuple[Array, Array, Array]]


@differentiable
def scaled_dot_product_attention(q: Array, k: Array, v: Array) -> tuple[Array, Vjp]:
    """Return A v of q (..., N, d), k (..., M, d) and v (..., M, e), of one float dtype: (..., N, e); vjp(dy) -> dq, dk, dv.

    Raises TypeError for dtypes, ValueError for shapes.
    """
    _check("scaled_dot_product_attention", q=q, k=k, v=v)
    scale = 1 / math.sqrt(q.shape[-1])
    shape = (*q.shape[:-1], v.shape[-1])

    def vjp(dy: Array) -> tuple[Array, Array, Array]:
        check_gradient("scaled_dot_product_attention", dy, shape, q.dtype)
        attention = attention_weights(q, k)
        dscores = proportions_adjoint(product(dy, v.swapaxes(-1, -2), None), attention, -1)
        dscores *= scale
        dk, dv = (product(scores.swapaxes(-1, -2), right, None) for scores, right in ((dscores, q), (attention, dy)))
        return product(dscores, k, None), dk, dv

    return attend(q, k, v, scale), vjp


def attention_weights(q: Array, k: Array) -> Array:
    """Return A of q (..., N, d) and k (..., M, d), of one float dtype: (..., N, M), whose rows sum to 1.

    Raises TypeError for dtypes, ValueError for shapes.
    """
    _check("attention_weights", q=q, k=k)
    return proportions(product(q * (1 / math.sqrt(q.shape[-1])), k.swapaxes(-1, -2), None), -1)


@twinned
def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """Return softmax(scale q k^T) v."""
    return product(proportions(product(q * scale, k.swapaxes(-1, -2), None), -1), v, None)


def _check(op: str, q: Array, k: Array, **v: Array) -> None:
    check_arrays(op, q=q, k=k, **v)
    of_q, of_k, of_v = q.shape, k.shape, v.get("v", k).shape
    if q.ndim < 2 or of_k != (*of_q[:-2], *of_k[-2:-1], of_q[-1]) or of_v[:-1] != of_k[:-1]:
        expected = {"q": "(..., N, d)", "k": "(..., M, d)", "v": "(..., M, e)"}
        others = "".join(f", {name} {x.shape}" for name, x in {"k": k, **v}.items())
        raise ValueError(f"{op}: q has shape {q.shape}{others}: expected {', '.join(expected[name] for name in ('q', 'k', *v))}")
