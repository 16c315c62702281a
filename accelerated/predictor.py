"""From pictures to maps of their own size: preprocessing, the network, and the way back (the authors' inference code).

    predictor = Predictor("dpt_hybrid-midas-501f0c75.pt")
    depth = predictor(image)                    image (H, W, 3), uint8, or floating point in [0, 1]; depth (H, W) float32
    depths = predictor([first, second])         in one batch where both need the same network input

A picture is resized to `preprocess.network_shape` and normalised, in float64. What the network gives is resized to the picture
with the cubic filter, whose overshoot may go below 0 (or with `config["output_resize"]`); the class is that of the largest
resized logit. So a value belongs to the pixel of the picture at its row and column.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from accelerated.attention import attention_map, attention_maps
from accelerated.checkpoints import load_checkpoint
from accelerated.configs import Config
from accelerated.dpt import DPT
from accelerated.inference import SCALES, scaled_size, segment
from accelerated.placement import compiled, enough_memory, evaluating, find_device, find_dtype, placed, working_compiler
from accelerated.postprocess import FILTERS, at_least_float32, at_size, check_finite, classes_at_size
from accelerated.preprocess import check_image, network_shape, network_sides, resize_and_normalise

KITTI_CROP = (352, 1216)  # (height, width) of what KITTI's depth benchmark looks at: the middle of the bottom


class Predictor:
    """A model made ready to predict pictures: where it runs, in which precision, and at which size it looks.

    `model`: a DPT, which is left as it is (copied where it is not yet on `device` in `dtype`), or the path of a weight file or
    folder, which `load_checkpoint` opens as `name`. `device`: one of `placement.DEVICES`; "auto" takes a CUDA GPU where there is
    one. `dtype`: float32, bfloat16, float16 or float64, of the parameters and of the network's input; what the network gives is
    resized in float32, or float64. `compile`: through torch.compile, which takes its time once for every shape of input.
    `size`: the network size, or (height, width), in place of the configuration's. `batch_size`: how many pictures of the same
    network input are run at once; results do not depend on it, beyond rounding. `multi_scale`: segmentation by `segment`, the
    mean over scales, windows and mirror images; a picture larger than its largest scale is shrunk to that first. `kitti_crop`:
    of every picture, only the bottom-centre 352 x 1216 pixels are looked at, as KITTI's benchmark counts, and predicted.

    Raises ValueError for options that make no sense, FileNotFoundError and ValueError as `load_checkpoint`, and MemoryError
    where the device is too small for the model.
    """

    def __init__(
        self,
        model: DPT | str | os.PathLike[str],
        *,
        name: str | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        compile: bool = False,  # noqa: A002 (torch's own word for it)
        size: int | tuple[int, int] | None = None,
        batch_size: int = 1,
        multi_scale: bool = False,
        kitti_crop: bool = False,
    ) -> None:
        self.device, self.dtype = find_device(device), find_dtype(dtype)
        if not _is_count(batch_size):
            raise ValueError(f"batch_size is {batch_size!r}: expected a whole number of at least 1")
        self.batch_size, self.multi_scale, self.kitti_crop = batch_size, multi_scale, kitti_crop
        self.model: DPT = placed(_opened(model, name), self.device, self.dtype)
        self.config: Config = copy.deepcopy(self.model.config)
        if size is not None:
            self.config["network_size"] = _checked_size(size)
        if multi_scale:
            _check_multi_scale(self.config, self.model.patch_size)
        self._filter: str = self.config.get("output_resize", FILTERS[0])
        if self._filter not in FILTERS:
            raise ValueError(f"unknown output_resize {self._filter!r}: expected one of {', '.join(FILTERS)}")
        self._network: Any = compiled(self.model) if compile else self.model

    @property
    def task(self) -> str:
        """ "depth" or "segmentation"."""
        return self.config["task"]

    @property
    def metric(self) -> bool:
        """Whether the depth is in metres; otherwise it is inverse depth, up to an unknown scale and shift."""
        return "metric_scale" in self.config

    @overload
    def __call__(self, image: np.ndarray) -> np.ndarray: ...
    @overload
    def __call__(self, image: Sequence[np.ndarray]) -> list[np.ndarray]: ...
    def __call__(self, image: np.ndarray | Sequence[np.ndarray]) -> np.ndarray | list[np.ndarray]:
        """Predict one picture (H, W, 3), or each of a list of pictures of any sizes.

        A picture is RGB, uint8, or floating point in [0, 1]. Its prediction is (H, W): of a depth model, metres where `metric`,
        else inverse depth, float32 (float64 in that `dtype`); of a segmentation model, class ids, uint8 (uint16 beyond 256
        classes). Raises ValueError for a picture that is none (`check_image`), that `kitti_crop` finds too small, or that is so
        elongated that its network input is beyond `MAX_NETWORK_PIXELS`, and for a prediction that is not finite; MemoryError;
        and placement.CompilerError where `compile` was asked for, and there is no compiler.
        """
        if isinstance(image, list | tuple):
            return self._predict(image)
        return self._predict([image])[0]  # type: ignore[list-item]

    def stream(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Predict picture after picture, in order, holding no more than `batch_size` of them. Raises as a call does."""
        rest = iter(images)
        while batch := list(itertools.islice(rest, self.batch_size)):
            yield from self._predict(batch)

    def attention(
        self, image: np.ndarray, block: int, head: int | None = None, point: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Return where a token looks, (H, W) float32: the weight of each patch, resized to the picture with the bilinear filter.

        `block`: which of the transformer's, from 0. `head`: one of its heads, or None for their mean. `point`: a pixel (x, y),
        for the token of the patch that it lies in, or None for the readout token. The network's input is that of the
        prediction (with `multi_scale`, which has many, that without). Raises ValueError for a block, head or point that is not
        there, for a convolutional MiDaS, and as a call does.
        """
        self.check_attention(block, head)
        view = self.view(image)
        shape = network_shape(view.shape[0], view.shape[1], self.config)
        grid = (shape[0] // self.model.patch_size, shape[1] // self.model.patch_size)
        patch = None if point is None else _patch_under(point, view.shape, grid)
        inputs = self._inputs([view], shape)
        with evaluating(self.model), torch.inference_mode(), enough_memory(f"for the attention of an input of {_by(shape)}"):
            maps = attention_maps(self.model, inputs, [block])[f"attention.{block}"]
            weights = at_least_float32(attention_map(maps, grid, patch, self.config["prefix_tokens"])[0])
            weights = weights.mean(0, keepdim=True) if head is None else weights[head : head + 1]
            check_finite(weights, "attention")
            return at_size(weights, view.shape, "bilinear").float().cpu().numpy()

    def check_attention(self, block: int, head: int | None = None) -> None:
        """Raise ValueError where there is no such block or head, or no attention at all."""
        if "encoder" in self.config:
            raise ValueError(f"{self.config['name']} is a convolutional MiDaS, which has no attention: expected a DPT")
        _check_index("block", block, len(self.model.backbone.blocks))
        if head is not None:
            _check_index("head", head, self.config["num_heads"])

    def view(self, image: np.ndarray) -> np.ndarray:
        """Return what the predictor looks at: the picture, or where `kitti_crop` its part (352, 1216, 3); no copy.

        Raises ValueError as a call does.
        """
        check_image(image)
        if not self.kitti_crop:
            return image
        height, width = KITTI_CROP
        top, left = image.shape[0] - height, (image.shape[1] - width) // 2
        if top < 0 or left < 0:
            raise ValueError(f"a picture of {_by(image.shape)} pixels is too small for KITTI's crop: expected {_by(KITTI_CROP)}")
        return image[top:, left : left + width]

    def _predict(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        views = [self.view(image) for image in images]
        alike: dict[tuple[int, int], list[int]] = {}
        for index, view in enumerate(views):
            alike.setdefault(self._input_shape(view), []).append(index)
        found: dict[int, np.ndarray] = {}
        for shape, members in alike.items():
            for first in range(0, len(members), self.batch_size):
                batch = members[first : first + self.batch_size]
                inputs = self._inputs([views[index] for index in batch], shape)
                with enough_memory(f"for {len(batch)} at once, as network inputs of {_by(shape)}"):
                    for index, scores in zip(batch, self._scores(inputs), strict=True):
                        found[index] = self._result(scores, views[index].shape)
        return [found[index] for index in range(len(views))]

    def _input_shape(self, view: np.ndarray) -> tuple[int, int]:
        """The size at which the network sees a picture; for `segment`, its own, but no larger than the largest scale."""
        height, width = view.shape[:2]
        if not self.multi_scale:
            return network_shape(height, width, self.config)
        largest = math.ceil(self._base() * max(SCALES))
        return (height, width) if max(height, width) <= largest else scaled_size((height, width), largest, 1.0)

    def _base(self) -> int:
        """The longer side at scale 1 of `segment`: 520 pixels for windows of 480."""
        return math.ceil(network_sides(self.config)[0] * 13 / 12)

    def _inputs(self, views: Sequence[np.ndarray], shape: tuple[int, int]) -> Tensor:
        with enough_memory(f"to bring a picture to {_by(shape)}"):
            return torch.cat([
                resize_and_normalise(view, shape, self.config).to(device=self.device, dtype=self.dtype) for view in views
            ])  # fmt: skip

    @torch.inference_mode()
    def _scores(self, inputs: Tensor) -> Tensor:
        """Depth (B, 1, h, w), or for each class what grows with its probability (B, K, h, w), of a batch (B, 3, h, w)."""
        with evaluating(self.model), contextlib.ExitStack() as stack:
            if self._network is not self.model:
                stack.enter_context(working_compiler())
            if self.multi_scale:
                scores = segment(self._network, inputs, crop=network_sides(self.config)[0], base=self._base())
            else:
                output = self._network(inputs)
                scores = output.logits if self.task == "segmentation" else output[:, None]
        check_finite(scores, "prediction")
        return scores

    @torch.inference_mode()
    def _result(self, scores: Tensor, size: Sequence[int]) -> np.ndarray:
        resized = classes_at_size if self.task == "segmentation" else at_size
        return resized(scores, size, self._filter).cpu().numpy()


def _opened(model: object, name: str | None) -> Any:
    if isinstance(model, str | os.PathLike):
        return load_checkpoint(model, model=name)
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), dict):
        raise ValueError(f"the model is a {type(model).__name__}: expected a DPT, or the path of its weights")
    if name is not None:
        raise ValueError(f"name is {name!r}, which says what a weight file holds: expected None beside a model")
    return model


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1  # type: ignore[operator]


def _checked_size(size: object) -> int | list[int]:
    """As a configuration holds it."""
    if _is_count(size):
        return int(size)  # type: ignore[call-overload]
    if isinstance(size, tuple | list) and len(size) == 2 and all(map(_is_count, size)):
        return list(map(int, size))
    raise ValueError(f"size is {size!r}: expected a number of pixels of at least 1, or two, (height, width)")


def _check_multi_scale(config: Config, patch_size: int) -> None:
    if config["task"] != "segmentation":
        raise ValueError("multi_scale averages class probabilities: expected a segmentation model, and this one predicts depth")
    height, width = network_sides(config)
    if height != width or height % patch_size:
        raise ValueError(
            f"the network size is {height} x {width}: multi_scale needs a square window, a multiple of {patch_size} pixels"
        )


def _check_index(name: str, value: object, count: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise ValueError(f"{name} is {value!r}: expected a whole number from 0 to {count - 1}")


def _patch_under(point: tuple[int, int], size: Sequence[int], grid: tuple[int, int]) -> tuple[int, int]:
    """The row and column in the grid of the patch under the middle of the pixel (x, y), in a picture of `size`."""
    height, width = size[0], size[1]
    whole = isinstance(point, tuple | list) and len(point) == 2 and all(isinstance(n, Integral) for n in point)
    x, y = point if whole else (-1, -1)
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"point is {point}: expected (x, y), x from 0 to {width - 1} and y from 0 to {height - 1}")
    return (2 * y + 1) * grid[0] // (2 * height), (2 * x + 1) * grid[1] // (2 * width)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
