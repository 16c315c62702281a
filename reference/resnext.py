"""The encoder of MiDaS: ResNeXt-101 32x8d (Xie et al. 2017), or ResNet-50 (He et al. 2016; DPT paper, table 8), four stages.

    image (B, 3, H, W) -> stage k (B, C_k, H / 2^(k + 2), W / 2^(k + 2)), k = 0 ... 3, C = 256, 512, 1024, 2048

Bottlenecks are post-activation, normalised by batch norm, and their 3x3 convolution, of `cardinality` groups, carries the stride
(the names and the strides are torchvision's, which WSL's weights and timm share). Odd sides are rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from . import nn
from .fusion import Statistics, batch_norm
from .nn.checks import Padding
from .parameters import Grads, Params, merge, take
from .resnet import Block, Layer, join, run_stages


class Norms(NamedTuple):
    """How the batch norms of an encoder work: by the batch's statistics in training, which `statistics` then collects."""

    eps: float
    training: bool = False
    statistics: Statistics | None = None


def conv_norm(
    params: Params,
    conv: str,
    norm: str,
    x: np.ndarray,
    norms: Norms,
    stride: int = 1,
    padding: Padding = 0,
    groups: int = 1,
) -> Layer:
    """A convolution without bias, then batch norm: (B, C, H, W) to (B, O, h, w); `vjp(dy) -> (dx, grads)`."""
    convolved, conv_vjp = _convolve(x, take(params, f"{conv}.weight"), stride, padding, groups)
    y, norm_vjp = batch_norm(params, norm, convolved, norms.training, norms.statistics, norms.eps)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dconvolved, norm_grads = norm_vjp(dy)
        dx, dweight, *_ = conv_vjp(dconvolved)
        return dx, merge({f"{conv}.weight": dweight}, norm_grads)

    return y, vjp


def _convolve(x: np.ndarray, weight: np.ndarray, stride: int, padding: Padding, groups: int) -> tuple[np.ndarray, Callable]:
    if groups == 1:
        return nn.conv2d(x, weight, None, stride, padding)
    return nn.grouped_conv2d(x, weight, groups, stride, padding)


def bottleneck(params: Params, prefix: str, x: np.ndarray, stride: int, cardinality: int, norms: Norms) -> Layer:
    """ReLU(shortcut(x) + residual(x)); `vjp(dy) -> (dx, grads)`.

    Residual: 1x1, 3x3 (grouped, strided), 1x1, each normalised, ReLU between. Shortcut: x itself, or a strided 1x1 convolution
    and norm where `{prefix}.downsample` exists (the first block of a stage).
    """

    def convolve(i: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Block:
        return lambda x: conv_norm(params, f"{prefix}.conv{i}", f"{prefix}.bn{i}", x, norms, stride, padding, groups)

    def project(x: np.ndarray) -> Layer:
        return conv_norm(params, f"{prefix}.downsample.0", f"{prefix}.downsample.1", x, norms, stride)

    shortcut = project if f"{prefix}.downsample.0.weight" in params else None
    return join(x, convolve(1), convolve(2, stride, 1, cardinality), convolve(3), shortcut)


def stem(params: Params, prefix: str, image: np.ndarray, norms: Norms) -> Layer:
    """7x7 convolution of stride 2, norm, ReLU, 3x3 max-pool of stride 2: (B, 3, H, W) -> (B, 64, H/4, W/4)."""
    normed, conv_vjp = conv_norm(params, f"{prefix}.conv1", f"{prefix}.bn1", image, norms, 2, 3)
    active, relu_vjp = nn.relu(normed)
    y, pool_vjp = nn.max_pool2d(active, 3, 2, 1)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        return conv_vjp(relu_vjp(pool_vjp(dy)))

    return y, vjp


def resnext(
    params: Params, prefix: str, image: np.ndarray, layers: Sequence[int], cardinality: int, norms: Norms
) -> tuple[list[np.ndarray], Callable]:
    """The outputs of the four stages; `vjp([dstage, ...]) -> (dimage, grads)`, None standing for a zero gradient.

    image: (B, 3, H, W), any size. `layers` counts the bottlenecks of each stage; every stage but the first halves the size.
    """

    def block(stage: int, i: int) -> Block:
        stride = 2 if stage > 0 and i == 0 else 1
        return lambda x: bottleneck(params, f"{prefix}.layer{stage + 1}.{i}", x, stride, cardinality, norms)

    x, stem_vjp = stem(params, prefix, image, norms)
    outputs, stages_vjp = run_stages(x, [[block(stage, i) for i in range(blocks)] for stage, blocks in enumerate(layers)])

    def vjp(doutputs: Sequence[np.ndarray | None]) -> tuple[np.ndarray, Grads]:
        dx, grads = stages_vjp(doutputs)
        dimage, stem_grads = stem_vjp(dx)
        return dimage, merge(grads, stem_grads)

    return outputs, vjp
