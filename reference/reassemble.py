"""Reassemble: from the tokens of a tap back to an image-like map (paper section 3.2, equation 1).

    Reassemble_s(t) = (Resample_s o Concatenate o Read)(t)
    tokens (B, P + N, D) --Read--> (B, N, D) --Concatenate--> (B, D, H/p, W/p) --Resample--> (B, D^, H/s, W/s)

Read deals with the readout token: *ignore* drops it (equation 3), *add* adds it to every token (equation 4), *project* mixes it
into every token by a learned map and GELU (equation 5). Resample is a 1x1 convolution to the stage's width, a resampling to
stride s = 4, 8, 16, 32 for stages 0 to 3, and (published code) a bias-free 3x3 convolution to the decoder's width D^.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import layers, nn
from .embed import map_of, tokens_of
from .parameters import Grads, Params, merge


def read_ignore(params: Params, prefix: str, tokens: np.ndarray, prefix_tokens: int) -> tuple[np.ndarray, Callable]:
    """Drop the prefix tokens: (B, P + N, D) -> (B, N, D); `vjp(dy) -> (dtokens, grads)`."""

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dtokens = np.zeros_like(tokens)
        dtokens[:, prefix_tokens:] = dy
        return dtokens, {}

    return tokens[:, prefix_tokens:], vjp


def read_add(params: Params, prefix: str, tokens: np.ndarray, prefix_tokens: int) -> tuple[np.ndarray, Callable]:
    """Add the readout token to every patch token; of two prefix tokens, their mean (the published code's behaviour)."""
    y = tokens[:, prefix_tokens:] + tokens[:, :prefix_tokens].mean(axis=1, keepdims=True)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dreadout = dy.sum(axis=1, keepdims=True) / prefix_tokens
        return np.concatenate([np.repeat(dreadout, prefix_tokens, axis=1), dy], axis=1), {}

    return y, vjp


def read_project(params: Params, prefix: str, tokens: np.ndarray, prefix_tokens: int) -> tuple[np.ndarray, Callable]:
    """GELU(W [t; t0] + b) for every patch token t and the readout token t0 (a distillation token is ignored).

    Parameters `{prefix}.readout.{weight,bias}`: (D, 2D), (D,).
    """
    patches = tokens[:, prefix_tokens:]
    width = tokens.shape[2]
    pairs = np.concatenate([patches, np.broadcast_to(tokens[:, :1], patches.shape)], axis=2)
    mixed, linear_vjp = layers.linear(params, f"{prefix}.readout", pairs)
    y, gelu_vjp = nn.gelu(mixed)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dpairs, grads = linear_vjp(gelu_vjp(dy))
        dtokens = np.zeros_like(tokens)
        dtokens[:, prefix_tokens:] = dpairs[:, :, :width]
        dtokens[:, 0] += dpairs[:, :, width:].sum(axis=1)
        return dtokens, grads

    return y, vjp


READOUTS = {"ignore": read_ignore, "add": read_add, "project": read_project}


def resample(params: Params, prefix: str, x: np.ndarray, stage: int) -> tuple[np.ndarray, Callable]:
    """Bring a map of stride p to the stride of its stage; `vjp(dy) -> (dx, grads)`. Stage 0 is the finest.

    Stage 0: transposed 4x4, stride 4. Stage 1: transposed 2x2, stride 2. Stage 2: nothing. Stage 3: 3x3, stride 2, padding 1.
    """
    if stage == 0:
        return layers.conv_transpose2d(params, f"{prefix}.resample", x, stride=4)
    if stage == 1:
        return layers.conv_transpose2d(params, f"{prefix}.resample", x, stride=2)
    if stage == 3:
        return layers.conv2d(params, f"{prefix}.resample", x, stride=2, padding=1)
    if stage == 2:
        return x, lambda dy: (dy, {})
    raise ValueError(f"there is no reassemble stage {stage}: expected 0, 1, 2 or 3")


def to_fusion_width(params: Params, prefix: str, x: np.ndarray) -> tuple[np.ndarray, Callable]:
    """Bias-free 3x3 convolution to the decoder's width; all that the Hybrid's two ResNet maps need. `vjp(dy) -> (dx, grads)`."""
    return layers.conv2d_without_bias(params, f"{prefix}.out", x, padding=1)


def reassemble(
    params: Params, prefix: str, tokens: np.ndarray, grid: tuple[int, int], stage: int, readout: str, prefix_tokens: int
) -> tuple[np.ndarray, Callable]:
    """Reassemble the tokens of one tap into the map of one stage.

    tokens: (B, P + N, D) on a `grid` (H/p, W/p). Returns (B, D^, H/s, W/s), s = p/4, p/2, p, 2p for stages 0 to 3, and
    `vjp(dy) -> (dtokens, grads)`. Raises ValueError for an unknown readout.
    """
    if readout not in READOUTS:
        raise ValueError(f"unknown readout {readout!r}: expected one of {', '.join(READOUTS)}")
    patches, read_vjp = READOUTS[readout](params, prefix, tokens, prefix_tokens)
    projected, project_vjp = layers.conv2d(params, f"{prefix}.project", map_of(patches, grid))
    resampled, resample_vjp = resample(params, prefix, projected, stage)
    y, out_vjp = to_fusion_width(params, prefix, resampled)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dresampled, out_grads = out_vjp(dy)
        dprojected, resample_grads = resample_vjp(dresampled)
        dmap, project_grads = project_vjp(dprojected)
        dtokens, read_grads = read_vjp(tokens_of(dmap))
        return dtokens, merge(read_grads, project_grads, resample_grads, out_grads)

    return y, vjp
