"""The operators of evaluation: alignment by least squares, and the confusion matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelerated.operators.arrays import accumulator, as_array, cupy_for, fresh, read
from kernels import alignment
from kernels import confusion as confusion_kernel


@torch.library.custom_op("dpt::least_squares", mutates_args=())
def least_squares(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.alignment.least_squares`: scale (B,), shift (B,), singular (B,)."""
    results = _least_squares_results(prediction)
    with cupy_for(prediction):
        alignment.least_squares(read(prediction), read(target), read(mask), alignment.LeastSquares(*map(as_array, results)))
    return results


@least_squares.register_fake
def _(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _least_squares_results(prediction)


def _least_squares_results(prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, real = prediction.shape[:1], accumulator(prediction.dtype)
    return fresh(prediction, images, real), fresh(prediction, images, real), fresh(prediction, images, torch.bool)


def _least_squares_saves(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs, *output)


def _least_squares_gradients(ctx: Any, dscale: Tensor, dshift: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
    """With x, y centred and V = sum x^2: ds/dp = (y - 2 s x) / V and dt/dp = -mean(p) ds/dp - s / M; 0 where singular."""
    prediction, target, mask, scale, _, singular = ctx.saved_tensors
    mask = mask.bool()
    count = mask.sum((1, 2), keepdim=True).clamp(min=1)

    def centred(d: Tensor) -> tuple[Tensor, Tensor]:
        d = torch.where(mask, d, 0.0).double()
        mean = d.sum((1, 2), keepdim=True) / count
        return torch.where(mask, d - mean, 0.0), mean

    (x, mean), (y, _) = centred(prediction), centred(target)
    s, ds, dt = (per_image.double()[:, None, None] for per_image in (scale, dscale, dshift))
    constant = singular[:, None, None]
    variance = torch.where(constant, 1.0, (x * x).sum((1, 2), keepdim=True))
    gradient = (ds - mean * dt) * (y - 2 * s * x) / variance - dt * s / count
    return torch.where(mask & ~constant, gradient, 0.0).to(prediction.dtype), None, None


least_squares.register_autograd(_least_squares_gradients, setup_context=_least_squares_saves)


@torch.library.custom_op("dpt::confusion", mutates_args=())
def confusion(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """`kernels.confusion.confusion`: pixels counted by true and predicted class, (num_classes, num_classes) int64."""
    counts = fresh(label, (num_classes, num_classes), torch.int64)
    with cupy_for(label):
        confusion_kernel.confusion(read(prediction), read(label), num_classes, ignore_index, out=as_array(counts))
    return counts


@confusion.register_fake
def _(prediction: Tensor, label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return fresh(label, (num_classes, num_classes), torch.int64)
