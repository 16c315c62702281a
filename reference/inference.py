"""Multi-scale, mirrored, sliding-window inference of segmentation (paper section 5.2: "multi-scale" and "flip" evaluation).

    segment = mean over the scales of  resize(sliding_window(mirrored(softmax of the logits), resized image))

The network sees windows of the size that it was trained on; a stride of two thirds of it makes them overlap. Three steps, each of
which takes a function from images (B, C, h, w) to maps (B, K, h, w), and is one: they know of no model, and compose.

Source: the authors trained in PyTorch-Encoding (they say so of its crops, base size 520 and crop 480), whose MultiEvalModule has
these scales, this stride, resizing with align_corners=True and black padding below and to the right. It differs in two things.
Its last window runs over the border and is padded; ours ends at the border, as mmsegmentation's does. It averages
exp(logits + mirrored logits), so that a window whose logits all lie higher, which means nothing to a softmax, counts for more; we
average probabilities, as mmsegmentation does over mirrors and scales. Inference has no vjp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from . import nn
from .configs import Config
from .dpt import forward
from .parameters import Params

Function = Callable[[np.ndarray], np.ndarray]
"""From images (B, C, h, w) to maps (B, K, h, w) of the same size."""

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` start along an axis: at every `stride`, and last where one ends at the border; 0 if none fits.

    Raises ValueError unless all three are whole numbers of at least 1, and `stride`, lest it leave gaps, is at most `crop`.
    """
    for name, value in (("length", length), ("crop", crop), ("stride", stride)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} is {value!r}: expected a whole number of at least 1")
    if stride > crop:
        raise ValueError(f"stride is {stride}: expected at most the crop, {crop}, so that no pixel is left out")
    last = max(length - crop, 0)
    return [*range(0, last, stride), last]


def coverage(length: int, crop: int, stride: int) -> np.ndarray:
    """How many windows see each position of an axis, padded to `crop` where shorter: whole numbers of at least 1."""
    seen = np.zeros(max(length, crop), np.intp)
    for start in window_starts(length, crop, stride):
        seen[start : start + crop] += 1
    return seen


def default_stride(crop: int) -> int:
    """Two thirds of the crop."""
    return max(2 * crop // 3, 1)


def sliding_window(
    function: Function, image: np.ndarray, crop: int, stride: int | None = None, fill: float | np.ndarray = 0.0
) -> np.ndarray:
    """Apply `function` to windows of `crop` x `crop` pixels of image (B, C, H, W); average where they overlap: (B, K, H, W).

    `stride`: None for two thirds of the crop. An image smaller than a window is padded below and to the right with `fill`, a
    number or one per channel (C,), and what comes out there is dropped. Raises ValueError for an image, crop or stride that is
    none, and for a function whose maps are not of the size of its windows.
    """
    _check_image(image)
    stride = default_stride(crop) if stride is None else stride
    height, width = image.shape[2:]
    tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
    padded = _pad(image, crop, fill)
    total: np.ndarray | None = None
    for top in tops:
        for left in lefts:
            window = padded[:, :, top : top + crop, left : left + crop]
            maps = _call(function, window)
            if total is None:
                total = np.zeros((*maps.shape[:2], *padded.shape[2:]), maps.dtype)
            total[:, :, top : top + crop, left : left + crop] += maps
    assert total is not None
    seen = np.outer(coverage(height, crop, stride), coverage(width, crop, stride))
    return (total / seen.astype(total.dtype))[:, :, :height, :width]


def mirrored(function: Function) -> Function:
    """The mean of what `function` says of an image and, mirrored back, of its mirror image."""
    return lambda image: (_call(function, image) + _call(function, image[..., ::-1])[..., ::-1]) / 2


def scaled_size(size: tuple[int, int], base: int, scale: float) -> tuple[int, int]:
    """The size (h, w) at a scale: the longer side is base * scale, rounded up, the other in proportion, rounded, at least 1."""
    longer = math.ceil(base * scale)
    height, width = (max(math.floor(side * longer / max(size) + 0.5), 1) for side in size)
    return height, width


def multi_scale(function: Function, image: np.ndarray, scales: Sequence[float] = SCALES, base: int | None = None) -> np.ndarray:
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
    total: np.ndarray | None = None
    for scale in scales:
        resized, _ = nn.resize_bilinear(image, scaled_size(size, base, scale), align_corners=True)
        maps, _ = nn.resize_bilinear(_call(function, resized), size, align_corners=True)
        total = maps if total is None else total + maps
    assert total is not None
    return total / total.dtype.type(len(scales))


def segment(
    params: Params,
    image: np.ndarray,
    config: Config,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    crop: int | None = None,
    stride: int | None = None,
    base: int | None = None,
) -> np.ndarray:
    """Class probabilities (B, K, H, W) of a normalised image (B, 3, H, W) of any size, as in the paper's evaluation.

    `crop`: by default the configuration's network size (480), `base`: 13/12 of the crop (520 for 480). Raises ValueError for a
    depth model, a crop that is no multiple of the patch size, and as `sliding_window` and `multi_scale` do.
    """
    if config["task"] != "segmentation":
        raise ValueError(f"the model's task is {config['task']!r}: expected 'segmentation'")
    crop = config["network_size"] if crop is None else crop
    if crop % config["patch_size"]:
        raise ValueError(f"crop is {crop}: expected a multiple of the patch size, {config['patch_size']}")
    base = math.ceil(crop * 13 / 12) if base is None else base
    black = -np.asarray(config["image_mean"]) / np.asarray(config["image_std"])

    def probabilities(window: np.ndarray) -> np.ndarray:
        return nn.softmax(forward(params, window, config).logits, axis=1)[0]

    seen = mirrored(probabilities) if flip else probabilities
    return multi_scale(lambda resized: sliding_window(seen, resized, crop, stride, black), image, scales, base)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 4 or image.size == 0 or image.dtype not in (np.float32, np.float64):
        raise ValueError(f"image has shape {image.shape} and dtype {image.dtype}: expected (B, C, H, W), float32 or float64")


def _pad(image: np.ndarray, crop: int, fill: float | np.ndarray) -> np.ndarray:
    """Extend image (B, C, H, W) below and to the right to at least crop x crop."""
    batch, channels, height, width = image.shape
    if height >= crop and width >= crop:
        return image
    if np.shape(fill) not in ((), (channels,)):
        raise ValueError(f"fill has shape {np.shape(fill)}: expected a number, or one for each of {channels} channels")
    padded = np.empty((batch, channels, max(height, crop), max(width, crop)), image.dtype)
    padded[:] = np.reshape(fill, (-1, 1, 1))
    padded[:, :, :height, :width] = image
    return padded


def _call(function: Function, image: np.ndarray) -> np.ndarray:
    maps = function(image)
    if maps.ndim != 4 or maps.shape[0] != image.shape[0] or maps.shape[2:] != image.shape[2:]:
        batch, _, height, width = image.shape
        raise ValueError(f"the function's maps have shape {maps.shape}: expected ({batch}, K, {height}, {width}), as its images")
    return maps
