"""Embed: from an image to tokens (paper section 3.1, "Transformer encoder").

    image (B, 3, H, W)  --patches of p x p, linear-->  (B, N, D), N = (H/p)(W/p)
    [readout; distillation; patches] + positions  -->  tokens (B, P + N, D)

P is the number of prefix tokens: 1 (the *readout* token of the paper, timm's `cls_token`), or 2 for a distilled DeiT. The Hybrid
embeds the features of a ResNet-50 instead of the image, with patches of 1 x 1 (see `resnet`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from . import layers, nn
from .parameters import Grads, Params, take

PREFIX_TOKENS = ("cls_token", "dist_token")


def tokens_of(x: np.ndarray) -> np.ndarray:
    """Lay a map (B, D, h, w) out as tokens (B, h w, D), row by row."""
    b, d, h, w = x.shape
    return x.reshape(b, d, h * w).transpose(0, 2, 1)


def map_of(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Lay tokens (B, h w, D) out as a map (B, D, h, w): the inverse of `tokens_of`. It is the paper's *Concatenate* (eq. 6)."""
    b, n, d = tokens.shape
    if n != grid[0] * grid[1]:
        raise ValueError(f"{n} tokens do not fill a grid of {grid[0]} x {grid[1]}")
    return tokens.transpose(0, 2, 1).reshape(b, d, *grid)


def resize_positions(positions: np.ndarray, prefix_tokens: int, grid: tuple[int, int]) -> tuple[np.ndarray, Callable]:
    """Resize a position embedding to another grid of patches (paper section 3.1, "Handling varying image sizes").

    positions: (1, P + G G, D), learned on a square grid of G x G patches. Returns (1, P + h w, D) for `grid` (h, w), and
    `vjp(dy) -> dpositions`. The prefix part is kept; the patch part is resized linearly, half-pixel centres, no antialiasing (the
    published code's behaviour). Raises ValueError where the patch part is no square.
    """
    patches = positions.shape[1] - prefix_tokens
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches < 1:
        raise ValueError(
            f"a position embedding of shape {positions.shape} has no square patch part after {prefix_tokens} prefix tokens"
        )
    stored = map_of(positions[:, prefix_tokens:], (side, side))
    resized, resize_vjp = nn.resize_bilinear(stored, grid, align_corners=False)
    y = np.concatenate([positions[:, :prefix_tokens], tokens_of(resized)], axis=1)

    def vjp(dy: np.ndarray) -> np.ndarray:
        dstored = resize_vjp(map_of(dy[:, prefix_tokens:], grid))
        return np.concatenate([dy[:, :prefix_tokens], tokens_of(dstored)], axis=1)

    return y, vjp


def embed(params: Params, prefix: str, x: np.ndarray, prefix_tokens: int) -> tuple[np.ndarray, Callable]:
    """Tokens of an image, or of the Hybrid's features.

    x: (B, C, H, W), H and W multiples of the patch size p, which is the kernel size of `{prefix}.patch_embed.proj.weight`
    (D, C, p, p). Returns tokens (B, P + (H/p)(W/p), D), and `vjp(dtokens) -> (dx, grads)`.
    """
    weight = take(params, f"{prefix}.patch_embed.proj.weight")
    patch = weight.shape[2]
    if x.shape[2] % patch or x.shape[3] % patch or 0 in x.shape:
        raise ValueError(
            f"an input of shape {x.shape} cannot be cut into patches of {patch} x {patch}: H and W must be multiples"
        )
    patches, project_vjp = layers.conv2d(params, f"{prefix}.patch_embed.proj", x, stride=patch)
    batch, _, *grid = patches.shape
    names = [f"{prefix}.{name}" for name in PREFIX_TOKENS[:prefix_tokens]]
    first = [np.broadcast_to(take(params, name), (batch, 1, weight.shape[0])) for name in names]
    positions, positions_vjp = resize_positions(take(params, f"{prefix}.pos_embed"), prefix_tokens, (grid[0], grid[1]))
    tokens = np.concatenate([*first, tokens_of(patches)], axis=1) + positions

    def vjp(dtokens: np.ndarray) -> tuple[np.ndarray, Grads]:
        dx, grads = project_vjp(map_of(dtokens[:, prefix_tokens:], (grid[0], grid[1])))
        summed = dtokens.sum(axis=0, keepdims=True)  # one token, one position for the whole batch
        for i, name in enumerate(names):
            grads[name] = summed[:, i : i + 1]
        grads[f"{prefix}.pos_embed"] = positions_vjp(summed)
        return dx, grads

    return tokens, vjp
