"""The heads: from the finest fused map (B, D^, H/2, W/2) to the task's output (paper section 3.2, published code for the widths).

    depth:         conv3x3, bilinear x2, conv3x3, ReLU, conv1x1, ReLU         -> inverse depth (B, H, W), non-negative
    metric depth:  1 / max(scale * inverse depth + shift, 1e-8)               -> metres, of a model trained for one dataset's
    segmentation:  conv3x3, batch norm, ReLU, dropout, conv1x1                -> logits (B, K, H/2, W/2)

The segmentation head's last step, bilinear x2, is separate (`upsample_logits`): training leaves it to the loss, which resizes the
logits to the labels. The auxiliary head is a segmentation head on the output of the penultimate fusion block, at 1/4.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import layers, nn
from .fusion import Statistics, batch_norm
from .parameters import Grads, Params, merge

FARTHEST = 1e-8
"""The smallest inverse depth, 1 / metre, that a metric model gives."""


def depth_head(params: Params, prefix: str, x: np.ndarray, align_corners: bool = True) -> tuple[np.ndarray, Callable]:
    """Inverse depth (B, 2h, 2w), up to scale and shift, from a map (B, D^, h, w); `vjp(ddepth) -> (dx, grads)`.

    `align_corners` is how the upsampling counts pixels: True in DPT, False in MiDaS.
    """
    reduced, conv1_vjp = layers.conv2d(params, f"{prefix}.conv1", x, padding=1)
    upsampled, resize_vjp = nn.resize_bilinear(reduced, (2 * x.shape[2], 2 * x.shape[3]), align_corners=align_corners)
    convolved, conv2_vjp = layers.conv2d(params, f"{prefix}.conv2", upsampled, padding=1)
    active, relu1_vjp = nn.relu(convolved)
    scalar, conv3_vjp = layers.conv2d(params, f"{prefix}.conv3", active)
    depth, relu2_vjp = nn.relu(scalar)

    def vjp(ddepth: np.ndarray) -> tuple[np.ndarray, Grads]:
        dactive, grads3 = conv3_vjp(relu2_vjp(ddepth[:, None]))
        dupsampled, grads2 = conv2_vjp(relu1_vjp(dactive))
        dx, grads1 = conv1_vjp(resize_vjp(dupsampled))
        return dx, merge(grads1, grads2, grads3)

    return depth[:, 0], vjp


def metric_depth(inverse: np.ndarray, scale: float, shift: float) -> tuple[np.ndarray, Callable]:
    """Depth in metres, 1 / max(scale * inverse + shift, 1e-8); `vjp(ddepth) -> dinverse`, zero where the maximum is 1e-8.

    Source: the authors' inference code for their KITTI and NYU models.
    """
    affine = (scale * inverse + shift).astype(inverse.dtype)
    depth = 1 / np.maximum(affine, FARTHEST, dtype=inverse.dtype)

    def vjp(ddepth: np.ndarray) -> np.ndarray:
        return np.where(affine >= FARTHEST, -scale * depth * depth * ddepth, 0).astype(inverse.dtype)

    return depth, vjp


def segmentation_head(
    params: Params,
    prefix: str,
    x: np.ndarray,
    training: bool = False,
    statistics: Statistics | None = None,
    dropout_mask: np.ndarray | None = None,
    dropout: float = 0.1,
) -> tuple[np.ndarray, Callable]:
    """Logits (B, K, h, w) from a map (B, D^, h, w); `vjp(dlogits) -> (dx, grads)`. Also the auxiliary head.

    `dropout_mask`, boolean (B, D^, h, w), says what dropout keeps, and `dropout` is the share it drops; None drops nothing.
    """
    convolved, conv_vjp = layers.conv2d_without_bias(params, f"{prefix}.conv", x, padding=1)
    normed, norm_vjp = batch_norm(params, f"{prefix}.bn", convolved, training, statistics)
    active, relu_vjp = nn.relu(normed)
    kept, dropout_vjp = (active, None) if dropout_mask is None else nn.dropout(active, dropout_mask, dropout)
    logits, classifier_vjp = layers.conv2d(params, f"{prefix}.classifier", kept)

    def vjp(dlogits: np.ndarray) -> tuple[np.ndarray, Grads]:
        dkept, classifier_grads = classifier_vjp(dlogits)
        dnormed, norm_grads = norm_vjp(relu_vjp(dkept if dropout_vjp is None else dropout_vjp(dkept)))
        dx, conv_grads = conv_vjp(dnormed)
        return dx, merge(conv_grads, norm_grads, classifier_grads)

    return logits, vjp


def upsample_logits(logits: np.ndarray) -> tuple[np.ndarray, Callable]:
    """The segmentation head's last step at inference: bilinear x2, align_corners=True; `vjp(dy) -> dlogits`."""
    return nn.resize_bilinear(logits, (2 * logits.shape[2], 2 * logits.shape[3]), align_corners=True)
