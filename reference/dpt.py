"""The whole dense prediction transformer (paper section 3 and figure 1).

    image (B, 3, H, W), normalised --encode--> four taps --reassemble--> maps at 1/4, 1/8, 1/16, 1/32
                                   --fusion--> (B, D^, H/2, W/2) --head-->
        depth:         inverse depth (B, H, W), or with "metric_scale" and "metric_shift" in the configuration metres
        segmentation:  logits (B, K, H, W), or in training logits (B, K, H/2, W/2) and auxiliary (B, K, H/4, W/4)

H and W are any multiples of the patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from . import nn
from .configs import TASKS, Config
from .embed import embed
from .fusion import Statistics, deepest_fusion, fusion
from .heads import depth_head, metric_depth, segmentation_head, upsample_logits
from .midas import SIDE, midas
from .parameters import Grads, Observe, Params, is_trainable, merge
from .reassemble import reassemble, to_fusion_width
from .resnet import resnet
from .transformer import encoder

RESNET_TAPS = ("R0", "R1")


class Segmentation(NamedTuple):
    """What a segmentation model returns, and what its vjp takes (None: a zero gradient)."""

    logits: np.ndarray | None
    auxiliary: np.ndarray | None


def check_image(image: np.ndarray, multiple: int) -> None:
    """Raise ValueError or TypeError unless `image` is a finite float (B, 3, H, W) whose sides are multiples of `multiple`."""
    if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
        raise ValueError(f"an image of shape {image.shape} was given: expected (B, 3, H, W)")
    if image.dtype not in (np.float32, np.float64):
        raise TypeError(f"an image of dtype {image.dtype} was given: expected float32 or float64")
    if image.shape[2] % multiple or image.shape[3] % multiple:
        raise ValueError(
            f"an image of {image.shape[2]} x {image.shape[3]} pixels was given: both sides must be multiples of {multiple}"
        )
    if not np.isfinite(image).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(image))[0])
        raise ValueError(f"the image holds {image[where]} at {where}: expected finite values")


def check_taps(config: Config) -> None:
    """Raise ValueError unless the taps are four: increasing block indices, of which the first two may be "R0", "R1" (Hybrid)."""
    taps = list(config["taps"])
    blocks = [tap for tap in taps if isinstance(tap, int)]
    maps = [tap for tap in taps if not isinstance(tap, int)]
    known = maps == [] or (maps == list(RESNET_TAPS) == taps[:2] and config["embedding"] == "resnet")
    increasing = all(a < b for a, b in pairwise(blocks)) and all(0 <= tap < config["depth"] for tap in blocks)
    if len(taps) != 4 or not known or not increasing:
        raise ValueError(
            f"taps {taps} were given: expected four increasing block indices below {config['depth']}"
            + (', or "R0", "R1" and two of them' if config["embedding"] == "resnet" else "")
        )


def encode(
    params: Params, image: np.ndarray, config: Config, observe: Observe | None = None
) -> tuple[list[np.ndarray], Callable]:
    """Run the backbone and return what the taps read: tokens (B, P + N, D), or for "R0" and "R1" maps (B, C, h, w).

    `vjp([dtap, ...]) -> (dimage, grads)`. `observe` is given "resnet.R{k}", "embed", "attention.{block}" and "tap.{tap}".
    """
    maps, x, resnet_vjp = [], image, None
    if config["embedding"] == "resnet":
        stages, resnet_vjp = resnet(
            params,
            "backbone.patch_embed.backbone",
            image,
            config["resnet_layers"],
            config["resnet_groups"],
            config["weight_standardization"],
            observe,
        )
        maps, x = stages, stages[-1]
    elif config["embedding"] != "patch":
        raise ValueError(f"unknown embedding {config['embedding']!r}: expected 'patch' or 'resnet'")
    tokens, embed_vjp = embed(params, "backbone", x, config["prefix_tokens"])
    taps = config["taps"]
    blocks = [tap for tap in taps if isinstance(tap, int)]
    if observe is not None:
        observe("embed", tokens)
    tapped, encoder_vjp = encoder(
        params, "backbone.blocks", tokens, blocks, config["num_heads"], config["layer_norm_eps"], observe
    )
    outputs = maps[: len(taps) - len(blocks)] + tapped
    if observe is not None:
        for tap, output in zip(taps, outputs, strict=True):
            observe(f"tap.{tap}", output)

    def vjp(dtaps: Sequence[np.ndarray]) -> tuple[np.ndarray, Grads]:
        skips = len(taps) - len(blocks)
        dtokens, encoder_grads = encoder_vjp(dtaps[skips:])
        dx, embed_grads = embed_vjp(dtokens)
        if resnet_vjp is None:
            return dx, merge(encoder_grads, embed_grads)
        dstages: list[np.ndarray | None] = [None] * len(maps)
        dstages[:skips] = dtaps[:skips]
        dstages[-1] = dx
        dimage, resnet_grads = resnet_vjp(dstages)
        return dimage, merge(encoder_grads, embed_grads, resnet_grads)

    return outputs, vjp


def decode(
    params: Params,
    taps: Sequence[np.ndarray],
    grid: tuple[int, int],
    config: Config,
    training: bool = False,
    statistics: Statistics | None = None,
    observe: Observe | None = None,
) -> tuple[list[np.ndarray], Callable]:
    """Reassemble the taps and fuse them: the outputs of fusion blocks 0 (finest) to 3 (deepest).

    `vjp([dfused, ...]) -> (dtaps, grads)`, None standing for zero. `observe` is given "reassemble.{k}" and "fusion.{k}".
    """
    maps, map_vjps = [], []
    for k, tap in enumerate(taps):
        prefix = f"reassemble.{k}"
        if isinstance(config["taps"][k], int):
            y, vjp_k = reassemble(params, prefix, tap, grid, k, config["readout"], config["prefix_tokens"])
        else:
            y, vjp_k = to_fusion_width(params, prefix, tap)
        maps.append(y)
        map_vjps.append(vjp_k)
        if observe is not None:
            observe(prefix, y)
    sizes = [(2 * maps[0].shape[2], 2 * maps[0].shape[3])] + [(m.shape[2], m.shape[3]) for m in maps[:3]]
    x, deepest_vjp = deepest_fusion(params, "fusion.3", maps[3], sizes[3], training, statistics)
    fused, fusion_vjps = [x], list[Callable]()
    for k in (2, 1, 0):
        x, vjp_k = fusion(params, f"fusion.{k}", x, maps[k], sizes[k], training, statistics)
        fused.insert(0, x)
        fusion_vjps.insert(0, vjp_k)
    if observe is not None:
        for k, y in enumerate(fused):
            observe(f"fusion.{k}", y)

    def vjp(dfused: Sequence[np.ndarray | None]) -> tuple[list[np.ndarray], Grads]:
        dmaps, grads = [], []
        dx = np.zeros_like(fused[0])
        for k in range(3):
            dfused_k = dfused[k]
            dx, dskip, block_grads = fusion_vjps[k](dx if dfused_k is None else dx + dfused_k)
            dmaps.append(dskip)
            grads.append(block_grads)
        dfused_3 = dfused[3]
        dx, block_grads = deepest_vjp(dx if dfused_3 is None else dx + dfused_3)
        pulled = [map_vjps[k](dmap) for k, dmap in enumerate([*dmaps, dx])]
        return [dtap for dtap, _ in pulled], merge(block_grads, *grads, *(map_grads for _, map_grads in pulled))

    return fused, vjp


def apply(
    params: Params,
    image: np.ndarray,
    config: Config,
    training: bool = False,
    statistics: Statistics | None = None,
    dropout_masks: Mapping[str, np.ndarray] | None = None,
    observe: Observe | None = None,
) -> tuple[Any, Callable]:
    """Run the model of `config` on a normalised `image` (B, 3, H, W), float32 or float64 as the parameters.

    Depth: inverse depth (B, H, W), up to scale and shift; or metres, where the configuration has "metric_scale". Segmentation:
    `Segmentation(logits, auxiliary)`: logits (B, K, H, W) and None, or with `training` logits (B, K, H/2, W/2) and auxiliary
    (B, K, H/4, W/4).
    `vjp(doutput) -> (dimage, grads)`, doutput of the output's structure; grads has every trainable parameter's key.
    `training` makes batch norm use the batch's statistics and, where `statistics` is given, fills it with the updated running
    ones; `dropout_masks` {"head", "auxiliary"} are boolean maps of what dropout keeps. A configuration with an "encoder" is a
    convolutional MiDaS's (`reference.midas`), and runs that.
    Raises ValueError or TypeError for an image, taps, readout or task that do not fit, KeyError for a missing parameter.
    """
    if "encoder" in config:
        check_image(image, SIDE)
        return midas(params, image, config, training, statistics, observe)
    check_image(image, config["patch_size"])
    check_taps(config)
    if config["task"] not in TASKS:
        raise ValueError(f"unknown task {config['task']!r}: expected one of {', '.join(TASKS)}")
    taps, encode_vjp = encode(params, image, config, observe)
    grid = image.shape[2] // config["patch_size"], image.shape[3] // config["patch_size"]
    fused, decode_vjp = decode(params, taps, grid, config, training, statistics, observe)
    output: Any
    if config["task"] == "depth":
        output, head_vjp = _depth(params, fused, config)
    elif training:
        output, head_vjp = _training_segmentation(params, fused, config["dropout"], statistics, dropout_masks or {})
    else:
        output, head_vjp = _segmentation(params, fused)

    def vjp(doutput: Any) -> tuple[np.ndarray, Grads]:
        dfused, head_grads = head_vjp(doutput)
        dtaps, decode_grads = decode_vjp(dfused)
        dimage, encode_grads = encode_vjp(dtaps)
        grads = merge(head_grads, decode_grads, encode_grads)
        untouched = {key: np.zeros_like(p) for key, p in params.items() if is_trainable(key) and key not in grads}
        return dimage, merge(grads, untouched)

    return output, vjp


def forward(params: Params, image: np.ndarray, config: Config, observe: Observe | None = None) -> Any:
    """The output of `apply` alone, for inference: nothing is kept for a vjp, so it needs little memory beside the parameters."""
    with nn.without_vjps():
        return apply(params, image, config, observe=observe)[0]


def _depth(params: Params, fused: Sequence[np.ndarray], config: Config) -> tuple[np.ndarray, Callable]:
    inverse, head_vjp = depth_head(params, "head", fused[0])
    metric = "metric_scale" in config
    depth, metric_vjp = metric_depth(inverse, config["metric_scale"], config["metric_shift"]) if metric else (inverse, None)

    def vjp(ddepth: np.ndarray) -> tuple[list[np.ndarray | None], Grads]:
        dx, grads = head_vjp(ddepth if metric_vjp is None else metric_vjp(ddepth))
        return [dx, None, None, None], grads

    return depth, vjp


def _segmentation(params: Params, fused: Sequence[np.ndarray]) -> tuple[Segmentation, Callable]:
    half, head_vjp = segmentation_head(params, "head", fused[0])
    logits, upsample_vjp = upsample_logits(half)

    def vjp(doutput: Segmentation) -> tuple[list[np.ndarray | None], Grads]:
        dx, grads = head_vjp(upsample_vjp(doutput.logits))
        return [dx, None, None, None], grads

    return Segmentation(logits, None), vjp


def _training_segmentation(
    params: Params, fused: Sequence[np.ndarray], rate: float, statistics: Statistics | None, masks: Mapping[str, np.ndarray]
) -> tuple[Segmentation, Callable]:
    logits, head_vjp = segmentation_head(params, "head", fused[0], True, statistics, masks.get("head"), rate)
    auxiliary, auxiliary_vjp = segmentation_head(params, "auxiliary", fused[1], True, statistics, masks.get("auxiliary"), rate)

    def vjp(doutput: Segmentation) -> tuple[list[np.ndarray | None], Grads]:
        dlogits, dauxiliary = doutput
        dx, grads = head_vjp(np.zeros_like(logits) if dlogits is None else dlogits)
        dpenultimate, auxiliary_grads = auxiliary_vjp(np.zeros_like(auxiliary) if dauxiliary is None else dauxiliary)
        return [dx, dpenultimate, None, None], merge(grads, auxiliary_grads)

    return Segmentation(logits, auxiliary), vjp
