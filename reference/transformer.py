"""The transformer encoder (paper section 3.1): L pre-norm blocks, and the taps that feed the decoder.

x = x + MHSA(LN(x));  x = x + MLP(LN(x))        tokens (B, P + N, D) in and out of every block
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import layers, nn
from .attention import attention
from .parameters import Grads, Observe, Params, merge


def mlp(params: Params, prefix: str, x: np.ndarray) -> tuple[np.ndarray, Callable]:
    """Two linear maps with an exact GELU between: (B, N, D) -> (B, N, 4D) -> (B, N, D); `vjp(dy) -> (dx, grads)`."""
    hidden, fc1_vjp = layers.linear(params, f"{prefix}.fc1", x)
    activated, gelu_vjp = nn.gelu(hidden)
    y, fc2_vjp = layers.linear(params, f"{prefix}.fc2", activated)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dactivated, fc2_grads = fc2_vjp(dy)
        dx, fc1_grads = fc1_vjp(gelu_vjp(dactivated))
        return dx, merge(fc1_grads, fc2_grads)

    return y, vjp


def attention_residual(
    params: Params, prefix: str, x: np.ndarray, num_heads: int, eps: float, observe: Callable[[np.ndarray], None] | None = None
) -> tuple[np.ndarray, Callable]:
    """The first half of a block: x + MHSA(LN(x)). x and y: (B, N, D); `vjp(dy) -> (dx, grads)`."""
    normed, norm_vjp = layers.layer_norm(params, f"{prefix}.norm1", x, eps)
    attended, attention_vjp = attention(params, f"{prefix}.attn", normed, num_heads, observe)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dnormed, attention_grads = attention_vjp(dy)
        dx, norm_grads = norm_vjp(dnormed)
        return dy + dx, merge(norm_grads, attention_grads)

    attended += x  # in place: nothing else holds it
    return attended, vjp


def mlp_residual(params: Params, prefix: str, x: np.ndarray, eps: float) -> tuple[np.ndarray, Callable]:
    """The second half of a block: x + MLP(LN(x)). x and y: (B, N, D); `vjp(dy) -> (dx, grads)`."""
    normed, norm_vjp = layers.layer_norm(params, f"{prefix}.norm2", x, eps)
    expanded, mlp_vjp = mlp(params, f"{prefix}.mlp", normed)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dnormed, mlp_grads = mlp_vjp(dy)
        dx, norm_grads = norm_vjp(dnormed)
        return dy + dx, merge(norm_grads, mlp_grads)

    expanded += x  # in place: nothing else holds it
    return expanded, vjp


def block(
    params: Params, prefix: str, x: np.ndarray, num_heads: int, eps: float, observe: Callable[[np.ndarray], None] | None = None
) -> tuple[np.ndarray, Callable]:
    """One pre-norm transformer block. x and y: (B, N, D); `vjp(dy) -> (dx, grads)`. `observe` is given the attention map."""
    middle, attention_vjp = attention_residual(params, prefix, x, num_heads, eps, observe)
    y, mlp_vjp = mlp_residual(params, prefix, middle, eps)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dmiddle, mlp_grads = mlp_vjp(dy)
        dx, attention_grads = attention_vjp(dmiddle)
        return dx, merge(attention_grads, mlp_grads)

    return y, vjp


def encoder(
    params: Params,
    prefix: str,
    tokens: np.ndarray,
    taps: Sequence[int],
    num_heads: int,
    eps: float,
    observe: Observe | None = None,
) -> tuple[list[np.ndarray], Callable]:
    """Run blocks 0 .. max(taps) and return the tokens after each block of `taps` (0-based, increasing), before any final norm.

    Later blocks would not change the result, so they are not run. Returns a list of (B, N, D), and
    `vjp([dtap, ...]) -> (dtokens, grads)`, where None stands for a zero gradient. `observe` is given "attention.{block}", the
    map (B, heads, N, N) of every block.
    """
    vjps, tapped, x = [], {}, tokens
    for i in range(max(taps) + 1):
        watch = None if observe is None else (lambda a, i=i: observe(f"attention.{i}", a))
        x, block_vjp = block(params, f"{prefix}.{i}", x, num_heads, eps, watch)
        vjps.append(block_vjp)
        if i in taps:
            tapped[i] = x

    def vjp(dtaps: Sequence[np.ndarray | None]) -> tuple[np.ndarray, Grads]:
        if len(dtaps) != len(taps):
            raise ValueError(f"{len(dtaps)} gradients for {len(taps)} taps")
        arriving = dict(zip(taps, dtaps, strict=True))
        dx, grads = np.zeros_like(tokens), []
        for i in reversed(range(len(vjps))):
            dtap = arriving.get(i)
            dx, block_grads = vjps[i](dx if dtap is None else dx + dtap)
            grads.append(block_grads)
        return dx, merge(*grads)

    return [tapped[i] for i in taps], vjp
