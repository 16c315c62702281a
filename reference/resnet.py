"""The Hybrid's embedding network: a ResNet-50 whose 1/16 features are embedded instead of raw patches (paper section 3.1).

It is BiT style (timm's `vit_base_r50_s16_384`): weight-standardised convolutions without bias, GroupNorm, post-activation
bottlenecks in stages of 3, 4, 9, and TensorFlow's 'SAME' padding in the stem, its max-pool and every convolution.

    image (B, 3, H, W) -> R0 (B, 256, H/4, W/4) -> R1 (B, 512, H/8, W/8) -> features (B, 1024, H/16, W/16)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import layers, nn
from .parameters import Grads, Observe, Params, merge, take

Layer = tuple[np.ndarray, Callable[[np.ndarray], tuple[np.ndarray, Grads]]]
Block = Callable[[np.ndarray], Layer]

STANDARDIZATIONS = {"variance": "standardize_weight_variance", "deviation": "standardize_weight_deviation"}
"""Today's timm divides by sqrt(var + 1e-8), the timm of the authors' training by std + 1e-5."""


def standardized_conv(
    params: Params, prefix: str, x: np.ndarray, stride: int, standardization: str
) -> tuple[np.ndarray, Callable]:
    """Weight-standardised, 'SAME'-padded convolution without bias; `vjp(dy) -> (dx, grads)`.

    x: (B, C, H, W); y: (B, O, ceil(H / stride), ceil(W / stride)). `standardization` is "variance" or "deviation".
    """
    if standardization not in STANDARDIZATIONS:
        raise ValueError(f"unknown weight standardization {standardization!r}: expected one of {', '.join(STANDARDIZATIONS)}")
    raw = take(params, f"{prefix}.weight")
    weight, standardize_vjp = getattr(nn, STANDARDIZATIONS[standardization])(raw)
    padding = nn.same_padding((x.shape[2], x.shape[3]), raw.shape[2], stride)
    y, conv_vjp = nn.conv2d(x, weight, None, stride=stride, padding=padding)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dx, dweight, _ = conv_vjp(dy)
        return dx, {f"{prefix}.weight": standardize_vjp(dweight)}

    return y, vjp


def conv_norm(
    params: Params, conv: str, norm: str, x: np.ndarray, stride: int, groups: int, standardization: str
) -> tuple[np.ndarray, Callable]:
    """`standardized_conv` followed by `nn.group_norm`; `vjp(dy) -> (dx, grads)`."""
    convolved, conv_vjp = standardized_conv(params, conv, x, stride, standardization)
    y, norm_vjp = layers.group_norm(params, norm, convolved, groups)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dconvolved, norm_grads = norm_vjp(dy)
        dx, conv_grads = conv_vjp(dconvolved)
        return dx, merge(conv_grads, norm_grads)

    return y, vjp


def join(x: np.ndarray, conv1: Block, conv2: Block, conv3: Block, shortcut: Block | None) -> Layer:
    """ReLU(shortcut(x) + conv3(ReLU(conv2(ReLU(conv1(x)))))), the shape of every bottleneck; `vjp(dy) -> (dx, grads)`.

    Each step is a convolution and its norm. The shortcut is x itself where it is None.
    """
    normed1, conv1_vjp = conv1(x)
    active1, relu1_vjp = nn.relu(normed1)
    normed2, conv2_vjp = conv2(active1)
    active2, relu2_vjp = nn.relu(normed2)
    residual, conv3_vjp = conv3(active2)
    beside, shortcut_vjp = (x, lambda dy: (dy, {})) if shortcut is None else shortcut(x)
    y, relu_vjp = nn.relu(residual + beside)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dsum = relu_vjp(dy)
        dactive2, grads3 = conv3_vjp(dsum)
        dactive1, grads2 = conv2_vjp(relu2_vjp(dactive2))
        dx, grads1 = conv1_vjp(relu1_vjp(dactive1))
        dbeside, shortcut_grads = shortcut_vjp(dsum)
        return dx + dbeside, merge(grads1, grads2, grads3, shortcut_grads)

    return y, vjp


def bottleneck(params: Params, prefix: str, x: np.ndarray, stride: int, groups: int, standardization: str) -> Layer:
    """ReLU(shortcut(x) + residual(x)); `vjp(dy) -> (dx, grads)`.

    Residual: 1x1, 3x3 (it carries the stride), 1x1, each normalised, ReLU between. Shortcut: x itself, or a strided 1x1
    convolution and norm where `{prefix}.downsample` exists (the first block of a stage).
    """

    def convolve(conv: str, norm: str, stride: int = 1) -> Block:
        return lambda x: conv_norm(params, f"{prefix}.{conv}", f"{prefix}.{norm}", x, stride, groups, standardization)

    projects = f"{prefix}.downsample.conv.weight" in params
    shortcut = convolve("downsample.conv", "downsample.norm", stride) if projects else None
    return join(x, convolve("conv1", "norm1"), convolve("conv2", "norm2", stride), convolve("conv3", "norm3"), shortcut)


def stem(params: Params, prefix: str, image: np.ndarray, groups: int, standardization: str) -> tuple[np.ndarray, Callable]:
    """7x7 convolution of stride 2, norm, ReLU, 3x3 max-pool of stride 2: (B, 3, H, W) -> (B, 64, H/4, W/4)."""
    normed, conv_vjp = conv_norm(params, f"{prefix}.conv", f"{prefix}.norm", image, 2, groups, standardization)
    active, relu_vjp = nn.relu(normed)
    y, pool_vjp = nn.max_pool2d(active, 3, 2, nn.same_padding((active.shape[2], active.shape[3]), 3, 2))

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        return conv_vjp(relu_vjp(pool_vjp(dy)))

    return y, vjp


def run_stages(x: np.ndarray, stages: Sequence[Sequence[Block]]) -> tuple[list[np.ndarray], Callable]:
    """Run blocks one after the other and return the output of every stage; `vjp([dstage, ...]) -> (dx, grads)`.

    None stands for a zero gradient.
    """
    outputs: list[np.ndarray] = []
    vjps: list[list[Callable]] = []
    for blocks in stages:
        vjps.append([])
        for block in blocks:
            x, block_vjp = block(x)
            vjps[-1].append(block_vjp)
        outputs.append(x)

    def vjp(doutputs: Sequence[np.ndarray | None]) -> tuple[np.ndarray, Grads]:
        if len(doutputs) != len(outputs):
            raise ValueError(f"{len(doutputs)} gradients for {len(outputs)} stages")
        dx, grads = np.zeros_like(outputs[-1]), []
        for doutput, block_vjps in zip(reversed(doutputs), reversed(vjps), strict=True):
            dx = dx if doutput is None else dx + doutput
            for block_vjp in reversed(block_vjps):
                dx, block_grads = block_vjp(dx)
                grads.append(block_grads)
        return dx, merge(*grads)

    return outputs, vjp


def resnet(
    params: Params,
    prefix: str,
    image: np.ndarray,
    layers: Sequence[int],
    groups: int,
    standardization: str,
    observe: Observe | None = None,
) -> tuple[list[np.ndarray], Callable]:
    """The outputs of every stage, `[R0, R1, features]` for the Hybrid; `vjp([dR0, dR1, dfeatures]) -> (dimage, grads)`.

    image: (B, 3, H, W). `layers` counts the bottlenecks of each stage; every stage but the first halves the size. None stands for
    a zero gradient. `observe` is given "resnet.R0", "resnet.R1", ...
    """

    def block(stage: int, i: int) -> Block:
        stride = 2 if stage > 0 and i == 0 else 1
        return lambda x: bottleneck(params, f"{prefix}.stages.{stage}.blocks.{i}", x, stride, groups, standardization)

    x, stem_vjp = stem(params, f"{prefix}.stem", image, groups, standardization)
    outputs, stages_vjp = run_stages(x, [[block(stage, i) for i in range(blocks)] for stage, blocks in enumerate(layers)])
    if observe is not None:
        for stage, output in enumerate(outputs):
            observe(f"resnet.R{stage}", output)

    def vjp(doutputs: Sequence[np.ndarray | None]) -> tuple[np.ndarray, Grads]:
        dx, grads = stages_vjp(doutputs)
        dimage, stem_grads = stem_vjp(dx)
        return dimage, merge(grads, stem_grads)

    return outputs, vjp
