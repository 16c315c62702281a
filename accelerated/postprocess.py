"""From the network's size back to the picture's: maps (C, h, w) become (H, W), resized as the authors' published code does it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

FILTERS = ("bicubic", "bilinear")  # what `config["output_resize"]` may be, both with align_corners=False


def at_size(maps: Tensor, size: Sequence[int], kernel: str = "bicubic") -> Tensor:
    """Resize one map (1, h, w) to (H, W), the first two of `size`."""
    return interpolate(at_least_float32(maps)[None], (size[0], size[1]), mode=kernel, align_corners=False)[0, 0]


def classes_at_size(scores: Tensor, size: Sequence[int], kernel: str = "bicubic") -> Tensor:
    """Return the class ids (H, W) of the largest resized score of (K, h, w), the lowest id on a tie: uint8, or uint16 if K > 256.

    Class by class: 150 maps at the size of a photograph would take gigabytes.
    """
    best = at_size(scores[:1], size, kernel)
    ids = torch.zeros_like(best, dtype=torch.uint8 if len(scores) <= 256 else torch.int32)
    for k in range(1, len(scores)):
        resized = at_size(scores[k : k + 1], size, kernel)
        ids[resized > best] = k
        torch.maximum(best, resized, out=best)
    return ids if len(scores) <= 256 else ids.to(torch.uint16)


def at_least_float32(values: Tensor) -> Tensor:
    """Return float32 for half precision, whose few digits would show as steps, and the values as they are otherwise."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def check_finite(values: Tensor, what: str) -> None:
    """Raise ValueError where a value is NaN or infinite."""
    if not torch.isfinite(values).all():
        raise ValueError(f"the model's {what} is not finite: its weights are damaged, or too large for their precision")
