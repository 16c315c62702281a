"""Preprocessing at inference, as the authors' published code does it: resize, normalise, make a tensor.

A picture (H, W, 3) becomes the network's input (1, 3, h, w), with h and w multiples of `config["resize_multiple"]`. The
resampling is OpenCV's INTER_CUBIC (a = -0.75, no antialiasing), which is what torch calls bicubic with align_corners=False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from accelerated.images import MAX_PIXELS

RESIZE_METHODS = ("minimal", "lower_bound", "upper_bound")
MAX_NETWORK_PIXELS = 4 * 1024 * 1024  # 16384 patches of 16 x 16; attention grows with the square of their number


def network_shape(height: int, width: int, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (height, width) to which a picture of that size is resized for a network.

    The aspect ratio is kept, up to rounding both sides to the nearest multiple of `config["resize_multiple"]` (halves to the
    even multiple, as the authors' NumPy does). `config["network_size"]` is a number of pixels for either side, or two of them,
    [height, width]: each side has its scale, its size over its length, and `config["resize_method"]` says which is taken:
    - "minimal": the one closer to 1 (the length that changes less; on a tie, the height);
    - "lower_bound": the one that leaves both sides at least that long (where rounding would undercut it, it is rounded up);
    - "upper_bound": the one that leaves both sides at most that long (where rounding would exceed it, it is rounded down).
    A side is never shorter than one multiple: the authors' code fails on pictures so elongated that theirs rounds to 0.
    Raises ValueError for an unknown method.
    """
    tall, wide = network_sides(config)
    method = config["resize_method"]
    down, across = tall / height, wide / width
    if method == "minimal":
        scale = across if abs(1 - across) < abs(1 - down) else down
    elif method == "lower_bound":
        scale = max(across, down)
    elif method == "upper_bound":
        scale = min(across, down)
    else:
        raise ValueError(f"unknown resize_method {method!r}: expected one of {', '.join(RESIZE_METHODS)}")
    multiple = config["resize_multiple"]
    return _rounded(scale * height, tall, multiple, method), _rounded(scale * width, wide, multiple, method)


def network_sides(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return `config["network_size"]` as (height, width); a single number stands for both."""
    size = config["network_size"]
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _rounded(length: float, size: int, multiple: int, method: str) -> int:
    units = round(length / multiple)
    if method == "lower_bound" and units * multiple < size:
        units = math.ceil(length / multiple)
    if method == "upper_bound" and units * multiple > size:
        units = math.floor(length / multiple)
    return max(units, 1) * multiple


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless `image` is RGB of shape (H, W, 3), uint8, or floating point with finite values in [0, 1].

    At most `images.MAX_PIXELS` pixels.
    """
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the image is a {type(image).__name__}: expected a NumPy array of shape (H, W, 3)")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"the image has shape {image.shape}: expected (H, W, 3), RGB, with at least one pixel")
    if math.prod(image.shape[:2]) > MAX_PIXELS:
        raise ValueError(f"the image has shape {image.shape}: expected at most {MAX_PIXELS:,} pixels")
    if image.dtype == np.uint8:
        return
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"the image has dtype {image.dtype}: expected uint8, or floating point in [0, 1]")
    low, high = image.min(), image.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("the image has values that are NaN or infinite: expected values from 0 to 1")
    if low < 0 or high > 1:
        raise ValueError(f"the image has values from {low:g} to {high:g}: floating point is expected in [0, 1]")


def preprocess(image: np.ndarray, config: Mapping[str, Any]) -> torch.Tensor:
    """Turn RGB (H, W, 3), uint8 or floating point in [0, 1], into a network's input (1, 3, h, w), float64, on the CPU.

    Resized to `network_shape` and normalised with `config["image_mean"]` and `config["image_std"]`. Values that the cubic
    overshoots are kept, as the authors keep them. Raises ValueError for what `check_image` refuses, and for a picture so
    elongated that its input would have more than `MAX_NETWORK_PIXELS` pixels.
    """
    check_image(image)
    return resize_and_normalise(image, network_shape(image.shape[0], image.shape[1], config), config)


def resize_and_normalise(image: np.ndarray, shape: tuple[int, int], config: Mapping[str, Any]) -> torch.Tensor:
    """Do what `preprocess` does to an image that `check_image` accepts, to (1, 3, *shape) float64.

    Raises ValueError for a shape of more than `MAX_NETWORK_PIXELS` pixels.
    """
    if math.prod(shape) > MAX_NETWORK_PIXELS:
        raise ValueError(
            f"a picture of {image.shape[1]} x {image.shape[0]} pixels needs a network input of {shape[1]} x {shape[0]}, more "
            f"than the limit of {MAX_NETWORK_PIXELS} pixels: choose a smaller network size, or cut it into less elongated pieces"
        )
    return torch.stack([
        (_resized(image[..., channel], shape) - config["image_mean"][channel]) / config["image_std"][channel]
        for channel in range(3)
    ])[None]  # fmt: skip


def _resized(channel: np.ndarray, shape: tuple[int, int]) -> torch.Tensor:
    """Resize (H, W) to (h, w), in [0, 1].

    In float64, because torch computes the source coordinates in the image's own precision, and in float32 they would be off
    by some 1e-4 pixels; one channel at a time, because a large picture in float64 is large.
    """
    values = torch.from_numpy(channel.astype(np.float64))
    if channel.dtype == np.uint8:
        values /= 255
    return interpolate(values[None, None], shape, mode="bicubic", align_corners=False)[0, 0]
