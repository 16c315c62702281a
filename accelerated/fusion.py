"""Fusion (paper section 3.2, figure 1 right): RefineNet-style blocks that join the stages from the deepest to the finest.

    y = upsample(project(RCU2(previous + RCU1(skip))))        the deepest block has no skip: y = upsample(project(RCU2(x)))

In: maps (B, D^, h, w). Out: (B, D^, h', w'), (h', w') the size of the next finer stage, bilinear with align_corners=True; twice
(h, w) after the finest. RCU is the residual convolutional unit x + conv(ReLU(conv(ReLU(x)))). Figure 1 projects, by a 1x1
convolution, after upsampling. The two commute: bilinear weights sum to one, whatever a bias adds. This way round the convolution
sees a quarter of the pixels, and the sum with the next RCU1 can be part of the upsampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from accelerated import operators
from accelerated.configs import Config
from accelerated.kernel_paths import by_kernel


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d without `num_batches_tracked`: the count serves only a cumulative average, which no DPT uses.

    Its parameters are weight, bias, running_mean and running_var, and a plain dict of them loads with strict=True.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.num_batches_tracked = None

    def reset_running_stats(self) -> None:
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any) -> None:
        # nn.BatchNorm2d adds the missing count to a dict without version metadata, and then calls it unexpected.
        nn.Module._load_from_state_dict(self, state_dict, *args)


class ResidualConvUnit(nn.Module):
    """x + conv2(ReLU(conv1(ReLU(x)))), 3x3, maps (B, D^, h, w) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class NormalizedResidualConvUnit(nn.Module):
    """The same with batch norm after each convolution, which then needs no bias (paper section 5.2: segmentation)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(F.relu(x))))))


class DeepestFusion(nn.Module):
    """The block that starts the chain: no previous output, so no RCU1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config["fusion_width"]
        self.rcu2 = residual_conv_unit(config)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.rcu2(x))


class Fusion(DeepestFusion):
    """The block that adds a finer stage, `skip` (B, D^, h, w), to the output of the block before it, upsampled to its size."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rcu1 = residual_conv_unit(config)

    def forward(self, previous: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(upsample_add(previous, self.rcu1(skip)))


def residual_conv_unit(config: Config) -> nn.Module:
    """The unit that the configuration asks for: with batch norm or without."""
    unit = NormalizedResidualConvUnit if config["fusion_batch_norm"] else ResidualConvUnit
    return unit(config["fusion_width"])


def fusion_blocks(config: Config) -> nn.ModuleList:
    """Blocks 0 (finest) to 3 (deepest)."""
    return nn.ModuleList([Fusion(config), Fusion(config), Fusion(config), DeepestFusion(config)])


def fuse(blocks: nn.ModuleList, stages: list[Tensor]) -> list[Tensor]:
    """Run the chain over the reassembled stages (finest first); return what every block gives, in the same order.

    Output k has the size of stage k. Whoever takes it upsamples it, to the size of stage k - 1 or twice its own.
    """
    outputs = [blocks[3](stages[3])]
    for k in (2, 1, 0):
        outputs.insert(0, blocks[k](outputs[0], stages[k]))
    return outputs


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (B, C, h, w) resized to (B, C, *size), bilinear, align_corners=True."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def upsample_add(x: Tensor, skip: Tensor) -> Tensor:
    """x (B, C, h, w) upsampled to the size of skip (B, C, H, W), plus skip: by torch or by our kernel."""
    if by_kernel("upsample_add", skip.device.type):
        return operators.upsample_add(x, skip)
    return upsample(x, skip.shape[-2:]) + skip
