"""The encoder of MiDaS v2.1 small: EfficientNet-Lite3 (Tan and Le 2019; Google's Lite variant), TensorFlow's as timm has it.

    image (B, 3, H, W) -> stages (B, C, h, w) at 1/2, 1/4, 1/8, 1/16, 1/16, 1/32, 1/32 of the size, rounded up

Inverted residuals without squeeze-and-excitation: batch norm (eps 1e-3), ReLU6 and TensorFlow's 'SAME' padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import nn
from .configs import Config
from .parameters import Grads, Params, merge, take
from .resnet import Block, Layer, run_stages
from .resnext import Norms, conv_norm


def conv_norm_relu6(params: Params, conv: str, norm: str, x: np.ndarray, norms: Norms, stride: int = 1, groups: int = 1) -> Layer:
    """A 'SAME'-padded convolution, batch norm and ReLU6; `vjp(dy) -> (dx, grads)`."""
    kernel = take(params, f"{conv}.weight").shape[2]
    padding = nn.same_padding((x.shape[2], x.shape[3]), kernel, stride)
    normed, conv_vjp = conv_norm(params, conv, norm, x, norms, stride, padding, groups)
    y, relu6_vjp = nn.relu6(normed)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        return conv_vjp(relu6_vjp(dy))

    return y, vjp


def depthwise_separable(params: Params, prefix: str, x: np.ndarray, stride: int, norms: Norms) -> Layer:
    """The block without expansion: a depthwise convolution with ReLU6, then a linear 1x1; `vjp(dy) -> (dx, grads)`."""
    filtered, depthwise_vjp = conv_norm_relu6(params, f"{prefix}.conv_dw", f"{prefix}.bn1", x, norms, stride, groups=x.shape[1])
    projected, pointwise_vjp = conv_norm(params, f"{prefix}.conv_pw", f"{prefix}.bn2", filtered, norms)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dfiltered, pointwise_grads = pointwise_vjp(dy)
        dx, depthwise_grads = depthwise_vjp(dfiltered)
        return dx, merge(pointwise_grads, depthwise_grads)

    return with_skip(x, projected, stride, vjp)


def inverted_residual(params: Params, prefix: str, x: np.ndarray, stride: int, norms: Norms) -> Layer:
    """1x1 to more channels and a depthwise convolution, both with ReLU6, then a linear 1x1; `vjp(dy) -> (dx, grads)`."""
    expanded, expand_vjp = conv_norm_relu6(params, f"{prefix}.conv_pw", f"{prefix}.bn1", x, norms)
    filtered, depthwise_vjp = conv_norm_relu6(
        params, f"{prefix}.conv_dw", f"{prefix}.bn2", expanded, norms, stride, groups=expanded.shape[1]
    )
    projected, pointwise_vjp = conv_norm(params, f"{prefix}.conv_pwl", f"{prefix}.bn3", filtered, norms)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dfiltered, pointwise_grads = pointwise_vjp(dy)
        dexpanded, depthwise_grads = depthwise_vjp(dfiltered)
        dx, expand_grads = expand_vjp(dexpanded)
        return dx, merge(pointwise_grads, depthwise_grads, expand_grads)

    return with_skip(x, projected, stride, vjp)


def with_skip(x: np.ndarray, y: np.ndarray, stride: int, y_vjp: Callable) -> Layer:
    """x + y where a block has stride 1 and as many channels out as in, else y; `vjp(dy) -> (dx, grads)`."""
    if stride > 1 or x.shape[1] != y.shape[1]:
        return y, y_vjp

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dx, grads = y_vjp(dy)
        return dx + dy, grads

    return x + y, vjp


def efficientnet(
    params: Params, prefix: str, image: np.ndarray, config: Config, norms: Norms
) -> tuple[list[np.ndarray], Callable]:
    """The outputs of the tapped stages; `vjp([dtap, ...]) -> (dimage, grads)`.

    image: (B, 3, H, W), any size. A stage's first block carries its stride; stages after the last tap are not there.
    """
    strides, taps = config["efficientnet_strides"], list(config["efficientnet_taps"])

    def block(stage: int, i: int) -> Block:
        kind = depthwise_separable if config["efficientnet_expansions"][stage] == 1 else inverted_residual
        stride = strides[stage] if i == 0 else 1
        return lambda x: kind(params, f"{prefix}.blocks.{stage}.{i}", x, stride, norms)

    x, stem_vjp = conv_norm_relu6(params, f"{prefix}.conv_stem", f"{prefix}.bn1", image, norms, 2)
    counts = config["efficientnet_layers"][: taps[-1] + 1]
    outputs, stages_vjp = run_stages(x, [[block(stage, i) for i in range(count)] for stage, count in enumerate(counts)])

    def vjp(dtaps: Sequence[np.ndarray]) -> tuple[np.ndarray, Grads]:
        doutputs: list[np.ndarray | None] = [None] * len(outputs)
        for tap, dtap in zip(taps, dtaps, strict=True):
            doutputs[tap] = dtap
        dx, grads = stages_vjp(doutputs)
        dimage, stem_grads = stem_vjp(dx)
        return dimage, merge(grads, stem_grads)

    return [outputs[tap] for tap in taps], vjp
