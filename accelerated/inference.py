"""Multi-scale, mirrored, sliding-window inference of segmentation (paper section 5.2: "multi-scale" and "flip" evaluation).

    segment = mean over the scales of  resize(sliding_window(mirrored(softmax of the logits), resized image))

The network sees windows of the size that it was trained on; a stride of two thirds of it makes them overlap. Three steps, each of
which takes a function from images (B, C, h, w) to maps (B, K, h, w), and is one: they know of no model, and compose.

Source: the authors trained in PyTorch-Encoding (they say so of its crops, base size 520 and crop 480), whose MultiEvalModule has
these scales, this stride, resizing with align_corners=True and black padding below and to the right. It differs in two things.
Its last window runs over the border and is padded; ours ends at the border, as mmsegmentation's does. It averages
exp(logits + mirrored logits), so that a window whose logits all lie higher, which means nothing to a softmax, counts for more; we
average probabilities, as mmsegmentation does over mirrors and scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from accelerated.dpt import DPT

Function = Callable[[Tensor], Tensor]
"""From images (B, C, h, w) to maps (B, K, h, w) of the same size."""

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` start along an axis: at every `stride`, and last where one ends at the border; 0 if none fits.

    Raises ValueError unless all three are whole numbers of at least 1, and `stride`, lest it leave gaps, is at most `crop`.
    """
    for name, value in (("length", length), ("crop", crop), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: expected a whole number of at least 1")
    if stride > crop:
        raise ValueError(f"stride is {stride}: expected at most the crop, {crop}, so that no pixel is left out")
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def default_stride(crop: int) -> int:
    """Two thirds of the crop."""
    return max(2 * crop // 3, 1)


def sliding_window(
    function: Function,
    image: Tensor,
    crop: int,
    stride: int | None = None,
    fill: float | Tensor = 0.0,
    windows_at_once: int = 8,
) -> Tensor:
    """Apply `function` to windows of `crop` x `crop` pixels of image (B, C, H, W); average where they overlap: (B, K, H, W).

    `stride`: None for two thirds of the crop. An image smaller than a window is padded below and to the right with `fill`, a
    number or one per channel (C,), and what comes out there is dropped. `function` is given up to `windows_at_once` windows of
    every image as one batch: a matter of memory and speed, which its result must not depend on. Raises ValueError for an image,
    crop, stride or number of windows that is none, and for a function whose maps are not of the size of its windows.
    """
    _check_image(image)
    if windows_at_once < 1:
        raise ValueError(f"windows_at_once is {windows_at_once}: expected at least 1")
    stride = default_stride(crop) if stride is None else stride
    batch, _, height, width = image.shape
    tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
    places = [(slice(top, top + crop), slice(left, left + crop)) for top in tops for left in lefts]
    padded = _pad(image, crop, fill)
    total, seen = image.new_zeros(()), image.new_zeros(padded.shape[2:])
    for first in range(0, len(places), windows_at_once):
        some = places[first : first + windows_at_once]
        maps = _call(function, torch.cat([padded[:, :, rows, columns] for rows, columns in some]))
        if total.ndim == 0:
            total = maps.new_zeros((batch, maps.shape[1], *padded.shape[2:]))
        for (rows, columns), window in zip(some, maps.split(batch), strict=True):
            total[:, :, rows, columns] += window
            seen[rows, columns] += 1
    return (total / seen.to(total.dtype))[:, :, :height, :width]


def mirrored(function: Function) -> Function:
    """The mean of what `function` says of an image and, mirrored back, of its mirror image."""
    return lambda image: (_call(function, image) + _call(function, image.flip(-1)).flip(-1)) / 2


def scaled_size(size: tuple[int, int], base: int, scale: float) -> tuple[int, int]:
    """The size (h, w) at a scale: the longer side is base * scale, rounded up, the other in proportion, rounded, at least 1."""
    longer = math.ceil(base * scale)
    height, width = (max(math.floor(side * longer / max(size) + 0.5), 1) for side in size)
    return height, width


def multi_scale(function: Function, image: Tensor, scales: Sequence[float] = SCALES, base: int | None = None) -> Tensor:
    """The mean of `function` over image (B, C, H, W) resized to each of `scales`, its maps resized back: (B, K, H, W).

    `base` is the longer side at scale 1, by default the image's own. Resizing is bilinear, align_corners=True. Raises ValueError
    where there is no scale, or one is not a positive number, or `base` is below 1.
    """
    _check_image(image)
    if len(scales) == 0 or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise ValueError(f"scales are {list(scales)}: expected at least one, all of them positive numbers")
    size = (image.shape[2], image.shape[3])
    base = max(size) if base is None else base
    if base < 1:
        raise ValueError(f"base is {base}: expected at least 1 pixel, the longer side at scale 1")
    total: Tensor | None = None
    for scale in scales:
        maps = _resize(_call(function, _resize(image, scaled_size(size, base, scale))), size)
        total = maps if total is None else total + maps
    assert total is not None
    return total / len(scales)


@torch.inference_mode()
def segment(
    model: DPT,
    image: Tensor,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    crop: int | None = None,
    stride: int | None = None,
    base: int | None = None,
    windows_at_once: int = 8,
) -> Tensor:
    """Class probabilities (B, K, H, W) of a normalised image (B, 3, H, W) of any size, as in the paper's evaluation.

    `crop`: by default the configuration's network size (480), `base`: 13/12 of the crop (520 for 480). Raises ValueError for a
    depth model, a model in training mode, a crop that is no multiple of the patch size, and as `sliding_window` and
    `multi_scale` do.
    """
    config = model.config
    if config["task"] != "segmentation":
        raise ValueError(f"the model's task is {config['task']!r}: expected 'segmentation'")
    if model.training:
        raise ValueError("the model is in training mode: expected model.eval(), which drops nothing and keeps its statistics")
    window = config["network_size"] if crop is None else crop
    if window % model.patch_size:
        raise ValueError(f"crop is {window}: expected a multiple of the patch size, {model.patch_size}")
    base = math.ceil(window * 13 / 12) if base is None else base
    black = -image.new_tensor(config["image_mean"]) / image.new_tensor(config["image_std"])

    def probabilities(windows: Tensor) -> Tensor:
        return model(windows).logits.softmax(1)

    seen = mirrored(probabilities) if flip else probabilities

    def slide(resized: Tensor) -> Tensor:
        return sliding_window(seen, resized, window, stride, black, windows_at_once)

    return multi_scale(slide, image, scales, base)


def _check_image(image: Tensor) -> None:
    if image.ndim != 4 or image.numel() == 0 or not image.is_floating_point():
        raise ValueError(f"image has shape {tuple(image.shape)} and dtype {image.dtype}: expected floating-point (B, C, H, W)")


def _pad(image: Tensor, crop: int, fill: float | Tensor) -> Tensor:
    """Extend image (B, C, H, W) below and to the right to at least crop x crop."""
    batch, channels, height, width = image.shape
    if height >= crop and width >= crop:
        return image
    colour = torch.as_tensor(fill, dtype=image.dtype, device=image.device)
    if tuple(colour.shape) not in ((), (channels,)):
        raise ValueError(f"fill has shape {tuple(colour.shape)}: expected a number, or one for each of {channels} channels")
    size = (batch, channels, max(height, crop), max(width, crop))
    padded = colour.reshape(-1, 1, 1).expand(size).clone(memory_format=torch.contiguous_format)
    padded[:, :, :height, :width] = image
    return padded


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def _call(function: Function, image: Tensor) -> Tensor:
    maps = function(image)
    if maps.ndim != 4 or maps.shape[0] != image.shape[0] or maps.shape[2:] != image.shape[2:]:
        batch, _, height, width = image.shape
        raise ValueError(
            f"the function's maps have shape {tuple(maps.shape)}: expected ({batch}, K, {height}, {width}), as its images"
        )
    return maps
