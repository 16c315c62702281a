"""The encoder: embedding, position embedding and transformer blocks (paper section 3.1), built from timm's modules.

In: image (B, 3, H, W), H and W multiples of the patch size p. Out: the four tapped features, each either tokens (B, P + N, D)
with the P prefix tokens first and N = H/p * W/p, or, for the Hybrid's "R0" and "R1", maps (B, C, H/4, W/4) and (B, C, H/8, W/8).

The modules and their parameter names are timm's; the forward pass is ours, because timm's own cannot do what the paper does: its
`dynamic_img_size` resizes positions with antialiased bicubic, and its features of the hybrid hold no ResNet stages.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.norm_act import GroupNormAct
from timm.layers.padding import pad_same
from timm.layers.patch_embed import PatchEmbed
from timm.layers.std_conv import StdConv2dSame
from timm.models.deit import VisionTransformerDistilled
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from accelerated.attention import Attention
from accelerated.configs import Config


class DeviationConv2dSame(StdConv2dSame):
    """StdConv2dSame with the weight standardisation that the authors' files were trained with: (w - mean) / (std + 1e-5).

    timm's has (w - mean) / sqrt(var + 1e-8). Both divide by the number of elements per output channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.same_pad:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


_STANDARDIZED_CONVOLUTIONS: dict[str, Any] = {
    "variance": partial(StdConv2dSame, eps=1e-8),
    "deviation": DeviationConv2dSame,
}


class Backbone(nn.Module):
    """The part of a timm vision transformer that DPT reads: no final norm, no classifier.

    Sources: paper section 3.1 and 3.4 (positions resized linearly); the authors' code (bilinear, align_corners=False, no
    antialias; taps before the final norm). Initialised as timm does.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        vit: Any = _vision_transformer(config)
        self.cls_token: nn.Parameter = vit.cls_token
        if config["prefix_tokens"] == 2:
            self.dist_token: nn.Parameter = vit.dist_token
        self.pos_embed: nn.Parameter = vit.pos_embed
        self.patch_embed: Any = vit.patch_embed
        # Blocks after the last tap would be dead weight.
        self.blocks = vit.blocks[: max(tap for tap in config["taps"] if isinstance(tap, int)) + 1]
        self.taps = list(config["taps"])
        self.prefix_tokens: int = config["prefix_tokens"]
        self.stored_grid: int = config["image_size"] // config["patch_size"]

    def forward(self, image: Tensor) -> list[Tensor]:
        features, patches = self.embed(image)
        tokens = self.with_prefix(patches.flatten(2).transpose(1, 2))
        tokens = tokens + self.positions(patches.shape[-2], patches.shape[-1])
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in self.taps:
                features.append(tokens)
        return features

    def embed(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the tapped ResNet maps (none for a plain transformer) and the patches (B, D, H/p, W/p)."""
        if not isinstance(self.patch_embed, HybridEmbed):
            return [], self.patch_embed.proj(image)
        resnet: Any = self.patch_embed.backbone
        first = resnet.stages[0](resnet.stem(image))
        second = resnet.stages[1](first)
        maps = [first, second] if self.taps[0] == "R0" else []
        return maps, self.patch_embed.proj(resnet.stages[2](second))

    def with_prefix(self, patches: Tensor) -> Tensor:
        """Put the readout token, and the distillation token where there is one, before the patches (B, N, D)."""
        prefix = [self.cls_token] if self.prefix_tokens == 1 else [self.cls_token, self.dist_token]
        return torch.cat([*(token.expand(patches.shape[0], -1, -1) for token in prefix), patches], dim=1)

    def positions(self, height: int, width: int) -> Tensor:
        """The position embedding (1, P + height * width, D): its patch part resized to the grid, its prefix part kept."""
        side = self.stored_grid
        if (height, width) == (side, side):
            return self.pos_embed
        prefix, patches = self.pos_embed[:, : self.prefix_tokens], self.pos_embed[:, self.prefix_tokens :]
        grid = patches.transpose(1, 2).reshape(1, -1, side, side)
        grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)


def load_imagenet(backbone: Backbone, config: Config) -> None:
    """Fill `backbone` with timm's ImageNet weights for `config["backbone"]`; timm downloads them, or finds them in its cache.

    Raises ValueError where timm has none for this configuration, ConnectionError where they cannot be had.
    """
    import timm

    name = config["backbone"]
    if not timm.is_model_pretrained(name):
        raise ValueError(f"{config['name']} has no ImageNet weights: timm knows none for {name!r}, expected pretrained=False")
    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client, urllib and the cache each raise errors of their own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConnectionError(f"the ImageNet weights of {name} could not be fetched through timm: {reason[0]}") from error
    wanted = backbone.state_dict()
    found = {key: value for key, value in vit.state_dict().items() if key in wanted}
    if {key: value.shape for key, value in found.items()} != {key: value.shape for key, value in wanted.items()}:
        raise ValueError(f"{config['name']} is not of the dimensions of {name}: its ImageNet weights do not fit")
    backbone.load_state_dict(found)


def _vision_transformer(config: Config) -> VisionTransformer:
    kind = VisionTransformer if config["prefix_tokens"] == 1 else VisionTransformerDistilled
    hybrid = config["embedding"] == "resnet"
    vit = kind(
        img_size=config["image_size"],
        patch_size=1 if hybrid else config["patch_size"],  # the ResNet's last map has one position per patch
        embed_layer=partial(HybridEmbed, backbone=_resnet(config)) if hybrid else PatchEmbed,
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
        mlp_ratio=(config["mlp_dim"] + 0.5) / config["embed_dim"],  # timm truncates the product: a half keeps it exact
        norm_layer=partial(nn.LayerNorm, eps=config["layer_norm_eps"]),
        num_classes=0,
    )
    for block in vit.blocks:
        block.attn.__class__ = Attention  # the same parameters, made by timm; not all its versions take a class of attention
    return vit


def _resnet(config: Config) -> ResNetV2:
    """The Hybrid's BiT-style ResNet: post-activation bottlenecks a quarter as wide (rounded to 8s), TF 'SAME' padding."""
    return ResNetV2(
        layers=config["resnet_layers"],
        channels=tuple(config["resnet_widths"]),
        stem_chs=config["resnet_stem_width"],
        stem_type="same",
        preact=False,
        conv_layer=_STANDARDIZED_CONVOLUTIONS[config["weight_standardization"]],
        norm_layer=partial(GroupNormAct, num_groups=config["resnet_groups"]),
        num_classes=0,
        global_pool="",
    )
