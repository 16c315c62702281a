"""MiDaS, the convolutional network that the paper compares DPT with (Ranftl et al. 2020; DPT paper, section 4.1 and table 8).

In: image (B, 3, H, W), normalised with the configuration's mean and standard deviation; H and W are any multiples of 4. Out:
inverse depth (B, H, W) up to scale and shift. The encoders are timm's, as are their parameter names; the decoder follows the
authors' published code for v2.1:
- v2.1 (`fusion_block` "rectified"): the residual unit's first ReLU works in place, so that the skip connection sees its result,
  ReLU(x) + f(x) instead of x + f(x); and a fusion block ends without the 1x1 convolution.
- v2.1 small ("projected"): DPT's own fusion blocks; the 1x1 convolution of all but the finest also halves the width.
- The fusion blocks upsample with align_corners=True, the head with align_corners=False.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from accelerated.configs import Config
from accelerated.dpt import DPT
from accelerated.fusion import BatchNorm2d, DeepestFusion, Fusion, ResidualConvUnit, fuse, upsample_add
from accelerated.heads import DepthHead, upsample_twice

SIDE = 4  # the sides of an image are multiples of this: the finest tap has a quarter of its size


class EncoderNorm(BatchNorm2d):
    """Batch norm with the encoder's eps, followed by ReLU6 where `clipped`: timm's EfficientNet joins the two."""

    def __init__(self, width: int, eps: float, clipped: bool) -> None:
        super().__init__(width)
        self.eps = eps
        self.clipped = clipped

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.relu6(y) if self.clipped else y


class ResNetEncoder(nn.Module):
    """ResNeXt-101 32x8d or ResNet-50 without classifier: (B, 3, H, W) to four maps at 1/4, 1/8, 1/16, 1/32, rounded up."""

    def __init__(self, config: Config) -> None:
        super().__init__()

        def norm(width: int, **_: Any) -> EncoderNorm:
            return EncoderNorm(width, config["batch_norm_eps"], clipped=False)

        resnet: Any = ResNet(
            Bottleneck,  # type: ignore[arg-type]  # timm means the class
            config["resnet_layers"],
            channels=tuple(width // 4 for width in config["resnet_widths"]),  # timm counts before the bottleneck's expansion
            cardinality=config["resnet_cardinality"],
            base_width=config["resnet_base_width"],
            norm_layer=norm,
            zero_init_last=False,
            num_classes=0,
        )
        self.conv1, self.bn1, self.maxpool = resnet.conv1, resnet.bn1, resnet.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4

    def forward(self, image: Tensor) -> list[Tensor]:
        maps, x = [], self.maxpool(F.relu(self.bn1(self.conv1(image))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


class EfficientNetEncoder(nn.Module):
    """EfficientNet-Lite3 up to its last tapped stage: (B, 3, H, W) to four maps at 1/4, 1/8, 1/16, 1/32, rounded up."""

    def __init__(self, config: Config) -> None:
        super().__init__()

        def norm(width: int, apply_act: bool = True, **_: Any) -> EncoderNorm:
            return EncoderNorm(width, config["batch_norm_eps"], clipped=apply_act)

        network: Any = EfficientNet(
            decode_arch_def([[stage] for stage in _stages(config)]),
            num_features=0,
            num_classes=0,
            stem_size=config["efficientnet_stem_width"],
            fix_stem=True,
            round_chs_fn=int,  # the widths are what they shall be
            pad_type="same",
            act_layer=nn.ReLU6,
            norm_layer=norm,
        )
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks
        self.taps = list(config["efficientnet_taps"])

    def forward(self, image: Tensor) -> list[Tensor]:
        maps, x = [], self.bn1(self.conv_stem(image))
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in self.taps:
                maps.append(x)
        return maps


class DeepestRectifiedFusion(nn.Module):
    """RCU2(ReLU(x)): with its input rectified, the residual unit computes ReLU(x) + f(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rcu2 = ResidualConvUnit(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.rcu2(F.relu(x))


class RectifiedFusion(DeepestRectifiedFusion):
    """The same of a finer stage, `skip` (B, D^, h, w), added to the output of the block before it, upsampled to its size."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.rcu1 = ResidualConvUnit(width)

    def forward(self, previous: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(upsample_add(previous, self.rcu1(F.relu(skip))))


class ReduceMap(nn.Module):
    """An encoder's map brought to its fusion width by a 3x3 convolution."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(channels, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class MiDaSHead(DepthHead):
    """DPT's depth head, but for the corners of its upsampling, which are not aligned: (B, D^, H/2, W/2) to (B, H, W)."""

    align_corners = False


class MiDaS(DPT):
    """A convolutional MiDaS in DPT's frame: other modules, and one task, depth.

    `accelerated.dpt.from_config` makes it of a configuration with an "encoder".

    `state_dict()` has exactly the keys of the reference's parameters. Raises ValueError for a configuration that makes no MiDaS.
    """

    def assemble(self, config: Config) -> None:
        """Make the modules: the encoder, its maps' reductions, the fusion blocks, the head."""
        self.patch_size = SIDE  # under DPT's name, which training asks for what an image's sides must be multiples of
        widths = config["fusion_widths"]
        encoder = ResNetEncoder if config["encoder"] == "resnet" else EfficientNetEncoder
        self.backbone = encoder(config)  # type: ignore[assignment]
        self.reassemble = nn.ModuleList(ReduceMap(*pair) for pair in zip(_tapped_widths(config), widths, strict=True))
        self.fusion = _fusion_blocks(config)
        self.head = MiDaSHead({"fusion_width": widths[0], "head_widths": config["head_widths"]})

    def forward(self, image: Tensor) -> Tensor:
        """Raise ValueError for an image that is not (B, 3, H, W) with H and W multiples of 4."""
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"the image has shape {tuple(image.shape)}: expected (B, 3, H, W)")
        if image.shape[2] % SIDE or image.shape[3] % SIDE:
            raise ValueError(f"the image is {image.shape[2]} x {image.shape[3]} pixels: expected multiples of {SIDE}")
        maps = [reduce(x) for reduce, x in zip(self.reassemble, self.backbone(image), strict=True)]
        return self.head(upsample_twice(fuse(self.fusion, maps)[0]))


def _stages(config: Config) -> Iterator[str]:
    """One of timm's descriptions for each stage of the EfficientNet up to the last tap: later ones would be dead weight."""
    keys = ("layers", "kernels", "strides", "expansions", "widths")
    until = config["efficientnet_taps"][-1] + 1
    for stage in zip(*(config[f"efficientnet_{key}"][:until] for key in keys), strict=True):
        kind = "ds" if stage[3] == 1 else "ir"  # depthwise separable, or inverted residual
        yield "{}_r{}_k{}_s{}_e{}_c{}".format(kind, *stage)


def _tapped_widths(config: Config) -> list[int]:
    if config["encoder"] == "resnet":
        return config["resnet_widths"]
    return [config["efficientnet_widths"][tap] for tap in config["efficientnet_taps"]]


def _fusion_blocks(config: Config) -> nn.ModuleList:
    """Blocks 0 (finest) to 3 (deepest)."""
    widths = config["fusion_widths"]
    if config["fusion_block"] == "rectified":
        return nn.ModuleList([*(RectifiedFusion(width) for width in widths[:3]), DeepestRectifiedFusion(widths[3])])
    blocks = nn.ModuleList()
    for k, width in enumerate(widths):
        block = (Fusion if k < 3 else DeepestFusion)({"fusion_width": width, "fusion_batch_norm": False})
        block.project = nn.Conv2d(width, widths[max(k - 1, 0)], 1)
        blocks.append(block)
    return blocks
