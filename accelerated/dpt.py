"""The whole model (paper section 3, figure 1): encoder, four reassemble stages, four fusion blocks, a head.

In: image (B, 3, H, W), normalised with the configuration's mean and standard deviation; H and W are any multiples of the patch
size. Out: inverse depth (B, H, W) up to scale and shift, or `Segmentation`; where the configuration has "metric_scale" and
"metric_shift", depth in metres.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from accelerated.backbones import Backbone, load_imagenet
from accelerated.config_checks import validate
from accelerated.configs import Config, configuration
from accelerated.fusion import fuse, fusion_blocks, upsample
from accelerated.heads import DepthHead, Segmentation, SegmentationHead, metric_depth, upsample_twice
from accelerated.reassemble import reassemble_stages


def create_model(
    name: str,
    task: str = "depth",
    readout: str | None = None,
    taps: list[int | str] | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
) -> DPT:
    """Return a new DPT (or MiDaS) in training mode, its decoder random, its encoder random or (`pretrained`) timm's for ImageNet.

    Arguments are those of `configuration`. Raises ValueError for names, readouts, taps or classes that no DPT has,
    ConnectionError where the ImageNet weights cannot be fetched.
    """
    model = from_config(configuration(name, task, readout, taps, num_classes))
    if pretrained:
        load_imagenet(model.backbone, model.config)
    return model


def from_config(config: Config) -> DPT:
    """Return a new model of `config` with random weights, in training mode: a DPT, or a `MiDaS` where it has an "encoder".

    Raises ValueError for a configuration of which no model can be built.
    """
    if "encoder" in config:
        from accelerated.midas import MiDaS

        return MiDaS(config)
    return DPT(config)


class DPT(nn.Module):
    """A dense prediction transformer, built from its configuration alone, which it carries as `config`.

    `state_dict()` has exactly the keys of the reference's parameters. Raises ValueError for a configuration that makes no DPT.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        validate(config)
        self.config = copy.deepcopy(config)
        self.segments: bool = config["task"] == "segmentation"
        self.assemble(config)

    def assemble(self, config: Config) -> None:
        """Make the modules."""
        self.patch_size: int = config["patch_size"]
        self.backbone = Backbone(config)
        self.reassemble = reassemble_stages(config)
        self.fusion = fusion_blocks(config)
        if self.segments:
            self.head: nn.Module = SegmentationHead(config)
            self.auxiliary = SegmentationHead(config)
        else:
            self.head = DepthHead(config)

    def forward(self, image: Tensor) -> Tensor | Segmentation:
        """Raise ValueError for an image that is not (B, 3, H, W) with H and W multiples of the patch size."""
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"the image has shape {tuple(image.shape)}: expected (B, 3, H, W)")
        height, width, patch = image.shape[2], image.shape[3], self.patch_size
        if height % patch or width % patch:
            raise ValueError(f"the image is {height} x {width} pixels: expected multiples of the patch size, {patch}")
        grid = (height // patch, width // patch)
        features = self.backbone(image)
        stages = [stage(feature, grid) for stage, feature in zip(self.reassemble, features, strict=True)]
        fused = fuse(self.fusion, stages)
        finest = upsample_twice(fused[0])
        if not self.segments:
            inverse = self.head(finest)
            if "metric_scale" not in self.config:
                return inverse
            return metric_depth(inverse, self.config["metric_scale"], self.config["metric_shift"])
        if self.training:
            auxiliary = self.auxiliary(upsample(fused[1], stages[0].shape[-2:]))
            return Segmentation(self.head(finest), auxiliary)
        return Segmentation(upsample_twice(self.head(finest)), None)

    def backbone_parameters(self) -> Iterator[nn.Parameter]:
        """The encoder's parameters: the paper trains them with the smaller learning rate (section 4)."""
        return self.backbone.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """Every other parameter."""
        return (parameter for name, parameter in self.named_parameters() if not name.startswith("backbone."))
