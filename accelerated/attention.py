"""Attention of a running model: its module, and where each head looks (Vaswani et al. 2017, section 3.2; paper section 3.1).

    softmax(q k^T / sqrt(d))            (B, heads, N, N): row i says where token i looks, and sums to one

The model itself calls a fused attention, which never holds these maps; here they are made again from its queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import timm.layers.attention
import torch
from torch import Tensor, nn

from accelerated import operators
from accelerated.kernel_paths import by_kernel

if TYPE_CHECKING:
    from accelerated.dpt import DPT


class Attention(timm.layers.attention.Attention):
    """timm's multi-head self-attention, tokens (B, N, D) to the same, which calls torch's fused attention or our kernel."""

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        masked = any(argument is not None and argument is not False for argument in (*arguments, *options.values()))
        if masked or not by_kernel("attention", x.device.type):  # a DPT masks nothing, and neither does the kernel
            return super().forward(x, *arguments, **options)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        out, _ = operators.attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def attention_maps(model: DPT, image: Tensor, blocks: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The maps (B, heads, N, N) of the model's `blocks`, by default the tapped ones, on a normalised image (B, 3, H, W).

    Keys are "attention.{block}", as the reference's `observe` names them. The model is run once and not changed. Raises
    ValueError for a block that it does not have, and for images as the model does.
    """
    encoder: Any = model.backbone.blocks
    chosen = [tap for tap in model.config["taps"] if isinstance(tap, int)] if blocks is None else list(blocks)
    for block in chosen:
        if not 0 <= block < len(encoder):
            raise ValueError(
                f"blocks are {chosen}: expected indices from 0 to {len(encoder) - 1}, the blocks that the model runs"
            )
    maps: dict[str, Tensor] = {}

    def keep(attention: Any, key: str, module: nn.Module, arguments: tuple[Tensor, ...], qkv: Tensor) -> None:
        batch, length, _ = qkv.shape
        q, k, _ = qkv.reshape(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        maps[key] = (q * attention.scale @ k.transpose(-2, -1)).softmax(dim=-1)

    hooks = []
    try:
        for block in chosen:
            attention = encoder[block].attn
            hooks.append(attention.qkv.register_forward_hook(partial(keep, attention, f"attention.{block}")))
        model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def attention_map(
    attention: Tensor, grid: tuple[int, int], query: tuple[int, int] | None = None, prefix_tokens: int = 1
) -> Tensor:
    """Where one token looks, per head: (B, heads, h, w), from a map (B, heads, N, N) of `attention_maps`.

    `query`: a patch by its row and column in the grid (h, w), or None, the readout token. N = prefix_tokens + h w. What the token
    spends on the prefix tokens is left out, so a map sums to one less that. Raises ValueError for shapes, a grid or a query that
    do not fit.
    """
    height, width = grid
    tokens = prefix_tokens + height * width
    if attention.ndim != 4 or attention.shape[2:] != (tokens, tokens):
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}: expected (B, heads, {tokens}, {tokens}), for {prefix_tokens} prefix "
            f"tokens and a grid of {height} x {width} patches"
        )
    if query is None:
        token = 0
    elif 0 <= query[0] < height and 0 <= query[1] < width:
        token = prefix_tokens + query[0] * width + query[1]
    else:
        raise ValueError(f"query is {query}: expected the row and column of a patch in a grid of {height} x {width}, or None")
    return attention[:, :, token, prefix_tokens:].unflatten(-1, (height, width))
