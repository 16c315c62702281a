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

RESIZE_METHODS = ("minimal", "lower_bound", "upper_bound")
MAX_NETWORK_PIXELS = 4 * 1024 * 1024  # 16384 patches of 16 x 16; attention grows with the square of their number


def network_shape(height: int, width: int, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the (height, width) to which a picture of that size is resized for a network.

    The aspect ratio is kept, up to rounding both sides to the nearest multiple of `config["resize_multiple"]` (halves to the
    even multiple, as the authors' NumPy does). `config["resize_method"]` says which side meets `config["network_size"]`:
    - "minimal": the one whose scale is closer to 1 (the shorter or the longer one, whichever changes less; on a tie, the height);
    - "lower_bound": the one that leaves both sides at least that long (where rounding would undercut it, it is rounded up);
    - "upper_bound": the one that leaves both sides at most that long (where rounding would exceed it, it is rounded down).
    A side is never shorter than one multiple: the authors' code fails on pictures so elongated that theirs rounds to 0.
    Raises ValueError for an unknown method.
    """
    size, multiple, method = config["network_size"], config["resize_multiple"], config["resize_method"]
    down, across = size / height, size / width
    if method == "minimal":
        scale = across if abs(1 - across) < abs(1 - down) else down
    elif method == "lower_bound":
        scale = max(across, down)
    elif method == "upper_bound":
        scale = min(across, down)
    else:
        raise ValueError(f"unknown resize_method {method!r}: expected one of {', '.join(RESIZE_METHODS)}")

    def rounded(length: float) -> int:
        units = round(length / multiple)
        if method == "lower_bound" and units * multiple < size:
            units = math.ceil(length / multiple)
        if method == "upper_bound" and units * multiple > size:
            units = math.floor(length / multiple)
        return max(units, 1) * multiple

    return rounded(scale * height), rounded(scale * width)


def check_image(image: np.ndarray) -> None:
    """Raise ValueError unless `image` is RGB of shape (H, W, 3), uint8, or floating point with finite values in [0, 1]."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the image is a {type(image).__name__}: expected a NumPy array of shape (H, W, 3)")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"the image has shape {image.shape}: expected (H, W, 3), RGB, with at least one pixel")
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
    height, width = image.shape[:2]
    shape = network_shape(height, width, config)
    if math.prod(shape) > MAX_NETWORK_PIXELS:
        raise ValueError(
            f"a picture of {width} x {height} pixels needs a network input of {shape[1]} x {shape[0]}, "
            f"more than the limit of {MAX_NETWORK_PIXELS} pixels: cut it into less elongated pieces"
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
