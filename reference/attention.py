"""Multi-head self-attention (Vaswani et al. 2017, section 3.2; what the paper's transformer blocks are made of).

q, k, v = x W_qkv + b          each (B, heads, N, d), d = D / heads
y = softmax(q k^T / sqrt(d)) v           (B, heads, N, d), heads side by side again: (B, N, D)
output = y W_proj + b
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import layers, nn
from .parameters import Grads, Params, merge


def attention(
    params: Params, prefix: str, x: np.ndarray, num_heads: int, observe: Callable[[np.ndarray], None] | None = None
) -> tuple[np.ndarray, Callable]:
    """Self-attention of tokens x (B, N, D) in `num_heads` heads. Returns y (B, N, D), and `vjp(dy) -> (dx, grads)`.

    Parameters `{prefix}.qkv.{weight,bias}` (3D, D), (3D,) - queries, keys, values, each head by head - and
    `{prefix}.proj.{weight,bias}` (D, D), (D,). `observe` is called with the attention map (B, heads, N, N): row i says where
    token i looks, and sums to one. Raises ValueError where D is no multiple of `num_heads`.
    """
    batch, length, width = x.shape
    if width % num_heads:
        raise ValueError(f"tokens of width {width} cannot be split into {num_heads} heads")
    qkv, qkv_vjp = layers.linear(params, f"{prefix}.qkv", x)
    q, k, v = qkv.reshape(batch, length, 3, num_heads, width // num_heads).transpose(2, 0, 3, 1, 4)
    heads, heads_vjp = nn.scaled_dot_product_attention(q, k, v)
    if observe is not None:
        observe(nn.attention_weights(q, k))
    joined = heads.transpose(0, 2, 1, 3).reshape(batch, length, width)
    y, proj_vjp = layers.linear(params, f"{prefix}.proj", joined)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        djoined, proj_grads = proj_vjp(dy)
        dheads = djoined.reshape(batch, length, num_heads, width // num_heads).transpose(0, 2, 1, 3)
        dqkv = np.stack(heads_vjp(dheads))  # (3, B, heads, N, d)
        dx, qkv_grads = qkv_vjp(dqkv.transpose(1, 3, 0, 2, 4).reshape(batch, length, 3 * width))
        return dx, merge(qkv_grads, proj_grads)

    return y, vjp


def attention_map(
    attention: np.ndarray, grid: tuple[int, int], query: tuple[int, int] | None = None, prefix_tokens: int = 1
) -> np.ndarray:
    """Where one token looks, per head: (B, heads, h, w), from an attention map (B, heads, N, N) as `observe` is given it.

    `query`: a patch by its row and column in the grid (h, w), or None, the readout token. N = prefix_tokens + h w. What the token
    spends on the prefix tokens is left out, so a map sums to one less that. Raises ValueError for shapes, a grid or a query that
    do not fit.
    """
    height, width = grid
    tokens = prefix_tokens + height * width
    if attention.ndim != 4 or attention.shape[2:] != (tokens, tokens):
        raise ValueError(
            f"attention has shape {attention.shape}: expected (B, heads, {tokens}, {tokens}), for {prefix_tokens} prefix tokens "
            f"and a grid of {height} x {width} patches"
        )
    if query is None:
        token = 0
    elif 0 <= query[0] < height and 0 <= query[1] < width:
        token = prefix_tokens + query[0] * width + query[1]
    else:
        raise ValueError(f"query is {query}: expected the row and column of a patch in a grid of {height} x {width}, or None")
    return attention[:, :, token, prefix_tokens:].reshape(*attention.shape[:2], height, width)
