"""Training crops: the same random window and mirroring for an image and everything aligned with it.

The paper (sections 4 and 5) trains on random square crops with random horizontal flips. A window is a list of rows and a list
of columns per image, a mirrored one runs through its columns backwards; reading any map (target, mask, labels) at those rows
and columns keeps it aligned with the image by construction.

Shapes: maps (N, H, W) or (N, H, W, C) in, (B, crop, crop) or (B, crop, crop, C) out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """One square window per image of a batch."""

    images: Tensor  # (B,) which image
    rows: Tensor  # (B, crop) which rows of it, in order
    columns: Tensor  # (B, crop) which columns; descending where mirrored


def random_windows(images: Tensor, size: tuple[int, int], crop: int, flip: bool, generator: torch.Generator) -> Windows:
    """Draw a window of `crop` x `crop` pixels for each of `images` (B,), anywhere inside `size` (H, W), mirrored half the time.

    Raises ValueError where the crop is larger than the image.
    """
    height, width = size
    if crop > min(height, width):
        raise ValueError(f"a crop of {crop} x {crop} does not fit in images of {height} x {width}")
    count = (len(images), 1)
    steps = torch.arange(crop)
    rows = torch.randint(height - crop + 1, count, generator=generator) + steps
    columns = torch.randint(width - crop + 1, count, generator=generator) + steps
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return Windows(images, rows, columns)


def cut(maps: Tensor, windows: Windows) -> Tensor:
    """Read the windows out of `maps` (N, H, W, ...), on its device and in its dtype: (B, crop, crop, ...)."""
    images, rows, columns = (index.to(maps.device, non_blocking=True) for index in windows)
    return maps[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def jitter_colors(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast of each image (B, 3, H, W) by a factor drawn from [1 - amount, 1 + amount].

    Contrast is the distance from the image's mean. The result is not clipped to [0, 1], so that the change is invertible and
    no structure is lost.
    """
    factors = 1 + amount * (2 * torch.rand(2, len(image), 1, 1, 1, generator=generator) - 1)
    brightness, contrast = factors.to(image.device, image.dtype)
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return (contrast * (image - mean) + mean) * brightness


def normalize(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Map an RGB image (B, 3, H, W) in [0, 1] to what the network reads: (image - mean) / std, per channel."""
    shape = (1, 3, 1, 1)
    return (image - image.new_tensor(mean).view(shape)) / image.new_tensor(std).view(shape)
