"""Training windows: the same random part, scale and mirroring for an image and everything aligned with it.

The paper (sections 4 and 5) trains on random square crops with random horizontal flips, its segmentation also with random
rescaling. A window is a list of rows and a list of columns per image; a scaled one skips or repeats some, a mirrored one runs
through its columns backwards. Reading any map (target, mask, labels) at those rows and columns keeps it aligned with the image
by construction, and invents no value between two depths or two classes.

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


def random_windows(
    images: Tensor, size: tuple[int, int], crop: int, smallest: float, flip: bool, generator: torch.Generator
) -> Windows:
    """Draw a square window for each of `images` (B,), anywhere inside `size` (H, W), mirrored half the time if `flip`.

    Its side is between `smallest` and 1 times the shorter side of the image; `crop` x `crop` pixels are read from it, each the
    nearest to its place. Raises ValueError unless 0 < smallest <= 1.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest={smallest}: expected a share of the image's side, above 0 and at most 1")
    count = (len(images), 1)
    share = smallest + (1 - smallest) * torch.rand(count, generator=generator, dtype=torch.float64)
    side = share * min(size)
    places = (torch.arange(crop) + 0.5) / crop * side

    def along(length: int) -> Tensor:
        start = torch.rand(count, generator=generator, dtype=torch.float64) * (length - side)
        return (start + places).floor().long().clamp(max=length - 1)

    rows, columns = along(size[0]), along(size[1])
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return Windows(images, rows, columns)


def cut(maps: Tensor, windows: Windows) -> Tensor:
    """Read the windows out of `maps` (N, H, W, ...), on its device and in its dtype: (B, crop, crop, ...)."""
    images, rows, columns = (index.to(maps.device, non_blocking=True) for index in windows)
    return maps[images[:, None, None], rows[:, :, None], columns[:, None, :]]


def color_factors(count: int, amount: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw from [1 - amount, 1 + amount], for `count` images, the factors of brightness per channel and of contrast.

    Returns (count, 3, 1, 1) and (count, 1, 1, 1), on the CPU, for `jitter_colors`.
    """
    brightness, contrast = (1 + amount * (2 * torch.rand(count, channels, 1, 1, generator=generator) - 1) for channels in (3, 1))
    return brightness, contrast


def jitter_colors(image: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Change contrast, and brightness per channel, of each image (B, 3, H, W) by the factors of `color_factors`.

    Contrast is the distance from the image's mean. The result is not clipped to [0, 1], so no structure is lost.
    """
    brightness, contrast = (factor.to(image.device, image.dtype) for factor in (brightness, contrast))
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    return (contrast * (image - mean) + mean) * brightness


def normalize(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Map an RGB image (B, 3, H, W) in [0, 1] to what the network reads: (image - mean) / std, per channel."""
    shape = (1, 3, 1, 1)
    return (image - image.new_tensor(mean).view(shape)) / image.new_tensor(std).view(shape)
