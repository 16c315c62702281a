"""MiDaS, the convolutional network that the paper compares DPT with (Ranftl et al. 2020; DPT paper, section 4.1 and table 8).

    image (B, 3, H, W), normalised --encoder--> four maps at 1/4, 1/8, 1/16, 1/32 --3x3 convolutions--> the fusion widths
                                   --fusion--> (B, D^, H/2, W/2) --head--> inverse depth (B, H, W)

H and W are any multiples of 4. Details are those of the authors' published code for v2.1:
- v2.1 (`fusion_block` "rectified"): the residual unit's first ReLU works in place, so that the skip connection sees its result,
  ReLU(x) + f(x) instead of x + f(x); and a fusion block ends without the 1x1 convolution.
- v2.1 small ("projected"): DPT's own fusion blocks; the 1x1 convolution of all but the finest also halves the width.
- The fusion blocks upsample with align_corners=True, the head with align_corners=False.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import nn
from .configs import Config
from .efficientnet import efficientnet
from .fusion import Statistics, deepest_fusion, fusion, residual_conv_unit
from .heads import depth_head
from .parameters import Grads, Observe, Params, merge
from .reassemble import to_fusion_width
from .resnext import Norms, resnext

SIDE = 4
"""The sides of an image are multiples of this: the finest tap has a quarter of its size."""


def rectified_conv_unit(params: Params, prefix: str, x: np.ndarray) -> tuple[np.ndarray, Callable]:
    """ReLU(x) + conv(ReLU(conv(ReLU(x)))): the residual unit whose first ReLU works in place. `vjp(dy) -> (dx, grads)`."""
    active, relu_vjp = nn.relu(x)
    y, unit_vjp = residual_conv_unit(params, prefix, active)  # its own ReLU finds nothing left to do

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dactive, grads = unit_vjp(dy)
        return relu_vjp(dactive), grads

    return y, vjp


def deepest_rectified_fusion(params: Params, prefix: str, x: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Callable]:
    """upsample(RCU2(x)) with the rectified unit; (B, D^, h, w) to (B, D^, *size). `vjp(dy) -> (dx, grads)`."""
    refined, rcu2_vjp = rectified_conv_unit(params, f"{prefix}.rcu2", x)
    y, resize_vjp = nn.resize_bilinear(refined, size, align_corners=True)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        return rcu2_vjp(resize_vjp(dy))

    return y, vjp


def rectified_fusion(
    params: Params, prefix: str, previous: np.ndarray, skip: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, Callable]:
    """upsample(RCU2(previous + RCU1(skip))) with the rectified unit.

    previous, skip: (B, D^, h, w), of one shape. Returns (B, D^, *size), and `vjp(dy) -> (dprevious, dskip, grads)`.
    """
    refined_skip, rcu1_vjp = rectified_conv_unit(params, f"{prefix}.rcu1", skip)
    y, deepest_vjp = deepest_rectified_fusion(params, prefix, previous + refined_skip, size)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, Grads]:
        dsum, grads = deepest_vjp(dy)
        dskip, rcu1_grads = rcu1_vjp(dsum)
        return dsum, dskip, merge(grads, rcu1_grads)

    return y, vjp


FUSION_BLOCKS: dict[str, tuple[Callable, Callable]] = {
    "rectified": (deepest_rectified_fusion, rectified_fusion),
    "projected": (deepest_fusion, fusion),
}
ENCODERS = ("resnet", "efficientnet")


def check_midas(config: Config) -> None:
    """Raise ValueError for a task, an encoder or a fusion block that no MiDaS has."""
    for key, known in {"task": ("depth",), "encoder": ENCODERS, "fusion_block": tuple(FUSION_BLOCKS)}.items():
        if config[key] not in known:
            raise ValueError(f"unknown {key} {config[key]!r} of a MiDaS: expected {' or '.join(known)}")


def encode(
    params: Params, image: np.ndarray, config: Config, training: bool = False, statistics: Statistics | None = None
) -> tuple[list[np.ndarray], Callable]:
    """Four maps (B, C, h, w), at 1/4, 1/8, 1/16 and 1/32 of the image, rounded up; `vjp([dmap, ...]) -> (dimage, grads)`."""
    norms = Norms(config["batch_norm_eps"], training, statistics)
    if config["encoder"] == "resnet":
        return resnext(params, "backbone", image, config["resnet_layers"], config["resnet_cardinality"], norms)
    return efficientnet(params, "backbone", image, config, norms)


def decode(
    params: Params, maps: Sequence[np.ndarray], config: Config, observe: Observe | None = None
) -> tuple[np.ndarray, Callable]:
    """Bring the encoder's maps to the fusion widths and fuse them: (B, D^, H/2, W/2); `vjp(dy) -> ([dmap, ...], grads)`.

    `observe` is given "reassemble.{k}" and "fusion.{k}".
    """
    deepest_block, block = FUSION_BLOCKS[config["fusion_block"]]
    reduced, reduce_vjps = [], []
    for k, x in enumerate(maps):
        y, reduce_vjp = to_fusion_width(params, f"reassemble.{k}", x)
        reduced.append(y)
        reduce_vjps.append(reduce_vjp)
    finest = reduced[0]
    sizes = [(2 * finest.shape[2], 2 * finest.shape[3])] + [(y.shape[2], y.shape[3]) for y in reduced[:3]]
    x, deepest_vjp = deepest_block(params, "fusion.3", reduced[3], sizes[3])
    fused, block_vjps = {3: x}, []
    for k in (2, 1, 0):
        x, block_vjp = block(params, f"fusion.{k}", x, reduced[k], sizes[k])
        fused[k] = x
        block_vjps.append(block_vjp)
    if observe is not None:
        for k, y in enumerate(reduced):
            observe(f"reassemble.{k}", y)
            observe(f"fusion.{k}", fused[k])

    def vjp(dx: np.ndarray) -> tuple[list[np.ndarray], Grads]:
        dreduced, grads = [], []
        for block_vjp in reversed(block_vjps):
            dx, dskip, block_grads = block_vjp(dx)
            dreduced.append(dskip)
            grads.append(block_grads)
        dx, deepest_grads = deepest_vjp(dx)
        pulled = [reduce_vjp(dy) for reduce_vjp, dy in zip(reduce_vjps, [*dreduced, dx], strict=True)]
        return [dmap for dmap, _ in pulled], merge(deepest_grads, *grads, *(reduce_grads for _, reduce_grads in pulled))

    return x, vjp


def midas(
    params: Params,
    image: np.ndarray,
    config: Config,
    training: bool = False,
    statistics: Statistics | None = None,
    observe: Observe | None = None,
) -> tuple[np.ndarray, Callable]:
    """Inverse depth (B, H, W), up to scale and shift, of a normalised `image` (B, 3, H, W), as `reference.apply` checks it.

    `vjp(ddepth) -> (dimage, grads)`. `training` and `statistics` are for the encoder's batch norms, the only ones there are.
    `observe` is given "tap.{k}", "reassemble.{k}" and "fusion.{k}". Raises ValueError for a task, an encoder or a fusion block
    that no MiDaS has.
    """
    check_midas(config)
    maps, encode_vjp = encode(params, image, config, training, statistics)
    if observe is not None:
        for k, x in enumerate(maps):
            observe(f"tap.{k}", x)
    fused, decode_vjp = decode(params, maps, config, observe)
    depth, head_vjp = depth_head(params, "head", fused, align_corners=False)

    def vjp(ddepth: np.ndarray) -> tuple[np.ndarray, Grads]:
        dfused, head_grads = head_vjp(ddepth)
        dmaps, decode_grads = decode_vjp(dfused)
        dimage, encode_grads = encode_vjp(dmaps)
        return dimage, merge(head_grads, decode_grads, encode_grads)

    return depth, vjp
