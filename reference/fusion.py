"""Fusion: the RefineNet-style decoder blocks (paper section 3.2, "Fusion", and figure 1, right).

    y = project(upsample(RCU2(previous + RCU1(skip))))          from the deepest stage up
    RCU(x) = x + conv3x3(ReLU(conv3x3(ReLU(x))))                with batch norm after each convolution for segmentation

The deepest block has no previous map: it is RCU2 of its own. Upsampling is bilinear, align_corners=True, to the size of the next
skip, and by 2 in the last block; `project` is a 1x1 convolution. All maps are (B, D^, h, w).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import layers, nn
from .parameters import Grads, Params, merge, take

Statistics = dict[str, np.ndarray]
"""Filled, where given, with the running statistics after a training step, under the keys of the parameters they replace."""


def batch_norm(
    params: Params, prefix: str, x: np.ndarray, training: bool, statistics: Statistics | None, eps: float = 1e-5
) -> tuple[np.ndarray, Callable]:
    """`nn.batch_norm` with parameters `{prefix}.{weight,bias,running_mean,running_var}`; `vjp(dy) -> (dx, grads)`."""
    names = [f"{prefix}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    output, norm_vjp = nn.batch_norm(x, *(take(params, name) for name in names), training=training, eps=eps)
    if training and statistics is not None:
        statistics[names[2]], statistics[names[3]] = output.running_mean, output.running_var

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dx, dweight, dbias = norm_vjp(nn.BatchNorm(dy, None, None))
        return dx, {names[0]: dweight, names[1]: dbias}

    return output.y, vjp


def conv3x3(
    params: Params, conv: str, norm: str, x: np.ndarray, training: bool, statistics: Statistics | None
) -> tuple[np.ndarray, Callable]:
    """A 3x3 convolution, with a bias (depth) or followed by batch norm (segmentation), as the parameters have it.

    Exactly one of `{conv}.bias` and `{norm}.weight` is there. `vjp(dy) -> (dx, grads)`.
    """
    if f"{norm}.weight" not in params:
        return layers.conv2d(params, conv, x, padding=1)
    convolved, conv_vjp = layers.conv2d_without_bias(params, conv, x, padding=1)
    y, norm_vjp = batch_norm(params, norm, convolved, training, statistics)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dconvolved, norm_grads = norm_vjp(dy)
        dx, conv_grads = conv_vjp(dconvolved)
        return dx, merge(conv_grads, norm_grads)

    return y, vjp


def residual_conv_unit(
    params: Params, prefix: str, x: np.ndarray, training: bool = False, statistics: Statistics | None = None
) -> tuple[np.ndarray, Callable]:
    """RCU(x) = x + f(x), f pre-activated: ReLU, conv, [norm,] ReLU, conv[, norm]. `vjp(dy) -> (dx, grads)`."""
    active1, relu1_vjp = nn.relu(x)
    middle, conv1_vjp = conv3x3(params, f"{prefix}.conv1", f"{prefix}.bn1", active1, training, statistics)
    active2, relu2_vjp = nn.relu(middle)
    residual, conv2_vjp = conv3x3(params, f"{prefix}.conv2", f"{prefix}.bn2", active2, training, statistics)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dactive2, grads2 = conv2_vjp(dy)
        dactive1, grads1 = conv1_vjp(relu2_vjp(dactive2))
        return dy + relu1_vjp(dactive1), merge(grads1, grads2)

    residual += x  # in place: nothing else holds it
    return residual, vjp


def upsample_and_project(params: Params, prefix: str, x: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, Callable]:
    """Bilinear upsampling to `size` (align_corners=True), then the block's 1x1 convolution. `vjp(dy) -> (dx, grads)`."""
    upsampled, resize_vjp = nn.resize_bilinear(x, size, align_corners=True)
    y, conv_vjp = layers.conv2d(params, f"{prefix}.project", upsampled)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        dupsampled, grads = conv_vjp(dy)
        return resize_vjp(dupsampled), grads

    return y, vjp


def deepest_fusion(
    params: Params,
    prefix: str,
    x: np.ndarray,
    size: tuple[int, int],
    training: bool = False,
    statistics: Statistics | None = None,
) -> tuple[np.ndarray, Callable]:
    """The first block of the decoder, which has no previous map: project(upsample(RCU2(x))). `vjp(dy) -> (dx, grads)`."""
    refined, rcu2_vjp = residual_conv_unit(params, f"{prefix}.rcu2", x, training, statistics)
    y, up_vjp = upsample_and_project(params, prefix, refined, size)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, Grads]:
        drefined, up_grads = up_vjp(dy)
        dx, rcu2_grads = rcu2_vjp(drefined)
        return dx, merge(rcu2_grads, up_grads)

    return y, vjp


def fusion(
    params: Params,
    prefix: str,
    previous: np.ndarray,
    skip: np.ndarray,
    size: tuple[int, int],
    training: bool = False,
    statistics: Statistics | None = None,
) -> tuple[np.ndarray, Callable]:
    """project(upsample(RCU2(previous + RCU1(skip)))), upsampled to `size`.

    previous, skip: (B, D^, h, w), of one shape. Returns (B, D^, *size), and `vjp(dy) -> (dprevious, dskip, grads)`.
    """
    if previous.shape != skip.shape:
        raise ValueError(f"{prefix}: the previous map has shape {previous.shape}, the skip {skip.shape}: they must agree")
    refined_skip, rcu1_vjp = residual_conv_unit(params, f"{prefix}.rcu1", skip, training, statistics)
    refined_skip += previous  # in place: nothing else holds it
    refined, rcu2_vjp = residual_conv_unit(params, f"{prefix}.rcu2", refined_skip, training, statistics)
    y, up_vjp = upsample_and_project(params, prefix, refined, size)

    def vjp(dy: np.ndarray) -> tuple[np.ndarray, np.ndarray, Grads]:
        drefined, up_grads = up_vjp(dy)
        dsum, rcu2_grads = rcu2_vjp(drefined)
        dskip, rcu1_grads = rcu1_vjp(dsum)
        return dsum, dskip, merge(rcu1_grads, rcu2_grads, up_grads)

    return y, vjp
