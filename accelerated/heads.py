"""The heads (authors' code; paper section 3.2, "task-specific output head", and section 5.2 for the auxiliary one).

In: the finest fusion output (B, D^, H/2, W/2), for the auxiliary head the penultimate one (B, D^, H/4, W/4).
Out: inverse depth (B, H, W), or logits (B, K, h, w) at the resolution of the input map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelerated.configs import Config
from accelerated.fusion import BatchNorm2d

FARTHEST = 1e-8  # smallest inverse depth, 1 / metre, that a metric model gives


class Segmentation(NamedTuple):
    """What a segmentation model returns.

    In training `logits` (B, K, H/2, W/2) and `auxiliary` (B, K, H/4, W/4): the loss resizes both to the labels. Otherwise
    `logits` (B, K, H, W) and None.
    """

    logits: Tensor
    auxiliary: Tensor | None


class DepthHead(nn.Module):
    """Inverse depth, non-negative, up to scale and shift: (B, D^, H/2, W/2) to (B, H, W)."""

    align_corners = True  # how the upsampling counts pixels

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, (first, second) = config["fusion_width"], config["head_widths"]
        self.conv1 = nn.Conv2d(width, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv3 = nn.Conv2d(second, 1, 1)
        # The last ReLU passes no gradient where its input is negative: start above it.
        assert self.conv3.bias is not None
        nn.init.constant_(self.conv3.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.conv1(x), scale_factor=2, mode="bilinear", align_corners=self.align_corners)
        return F.relu(self.conv3(F.relu(self.conv2(x)))).squeeze(1)


def metric_depth(inverse: Tensor, scale: float, shift: float) -> Tensor:
    """Depth in metres, 1 / max(scale * inverse + shift, 1e-8), of a model trained for one dataset's; at least float32.

    Source: the authors' inference code for their KITTI and NYU models.
    """
    inverse = inverse.float() if inverse.dtype in (torch.float16, torch.bfloat16) else inverse
    return (scale * inverse + shift).clamp(min=FARTHEST).reciprocal()


class SegmentationHead(nn.Module):
    """Logits at the resolution of the map: (B, D^, h, w) to (B, K, h, w). The auxiliary head is another of these."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config["fusion_width"]
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = BatchNorm2d(width)
        self.dropout = nn.Dropout(config["dropout"])
        self.classifier = nn.Conv2d(width, config["num_classes"], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(F.relu(self.bn(self.conv(x)))))


def upsample_twice(x: Tensor) -> Tensor:
    """Twice the size, bilinear, corners aligned: the last step of fusion, and of the heads."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
