"""The operators of training: the depth loss, and cross-entropy with the upsampling of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelerated.operators.arrays import accumulator, as_array, cupy_for, fresh, read
from kernels import cross_entropy, losses


@torch.library.custom_op("dpt::depth_loss", mutates_args=())
def depth_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, kept: float, scales: int, gradient_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.losses.depth_loss`: the loss, a scalar, and, for the gradient, residual, numbers and counts."""
    loss, residual, numbers, counts = _depth_results(prediction)
    with cupy_for(prediction):
        out = as_array(loss.view(1)), as_array(residual), as_array(numbers), as_array(counts)
        losses.depth_loss(read(prediction), read(target), read(mask), kept, scales, gradient_weight, out=out)
    return loss, residual, numbers, counts


@depth_loss.register_fake
def _(prediction: Tensor, target: Tensor, mask: Tensor, kept: float, scales: int, gradient_weight: float) -> tuple[Tensor, ...]:
    return _depth_results(prediction)


def _depth_results(prediction: Tensor) -> tuple[Tensor, ...]:
    shapes = {**losses.saved_shapes(tuple(prediction.shape)), "loss": ()}
    real = accumulator(prediction.dtype)
    return tuple(fresh(prediction, shape, torch.int32 if name == "counts" else real) for name, shape in shapes.items())


@torch.library.custom_op("dpt::depth_loss_backward", mutates_args=())
def depth_loss_backward(
    dloss: Tensor,
    prediction: Tensor,
    residual: Tensor,
    numbers: Tensor,
    counts: Tensor,
    scales: int,
    gradient_weight: float,
) -> Tensor:
    """`kernels.losses.depth_loss_backward`: the gradient in the prediction."""
    out = fresh(prediction, prediction.shape)
    with cupy_for(prediction):
        saved = losses.DepthSaved(read(residual), read(numbers), read(counts), scales, gradient_weight, rung=2)
        losses.depth_loss_backward(read(dloss.view(1)), read(prediction), saved, as_array(out))
    return out


@depth_loss_backward.register_fake
def _(dloss: Tensor, prediction: Tensor, *_: Any) -> Tensor:
    return fresh(prediction, prediction.shape)


def _depth_loss_saves(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], *output[1:])
    ctx.options = inputs[4:]


def _depth_loss_gradients(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (depth_loss_backward(dloss, *ctx.saved_tensors, *ctx.options), None, None, None, None, None)


depth_loss.register_autograd(_depth_loss_gradients, setup_context=_depth_loss_saves)


@torch.library.custom_op("dpt::cross_entropy", mutates_args=())
def upsampled_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.cross_entropy.cross_entropy`: the loss, a scalar, and, for the gradient, log_sum_exp and totals.

    Never waits for the GPU: a label that is no class makes loss and gradient NaN.
    """
    loss, log_sum_exp, totals = _cross_entropy_results(logits, labels)
    with cupy_for(logits):
        out = cross_entropy.CrossEntropy(as_array(loss.view(1)), as_array(log_sum_exp), as_array(totals))
        cross_entropy.cross_entropy(read(logits), read(labels), ignore_index, out=out, wait=False)
    return loss, log_sum_exp, totals


@upsampled_cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    return _cross_entropy_results(logits, labels)


def _cross_entropy_results(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    real = accumulator(logits.dtype)
    return fresh(logits, (), real), fresh(logits, labels.shape, real), fresh(logits, (3,), torch.float64)


@torch.library.custom_op("dpt::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, loss: Tensor, log_sum_exp: Tensor, totals: Tensor, ignore_index: int
) -> Tensor:
    """`kernels.cross_entropy.cross_entropy_backward`: the gradient in the logits."""
    out = fresh(logits, logits.shape)
    with cupy_for(logits):
        forward = cross_entropy.CrossEntropy(read(loss.view(1)), read(log_sum_exp), read(totals))
        gradient = read(dloss.view(1))
        cross_entropy.cross_entropy_backward(gradient, read(logits), read(labels), forward, ignore_index, out=as_array(out))
    return out


@cross_entropy_backward.register_fake
def _(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return fresh(logits, logits.shape)


def _cross_entropy_saves(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.ignore_index = inputs[2]


def _cross_entropy_gradients(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.ignore_index), None, None


upsampled_cross_entropy.register_autograd(_cross_entropy_gradients, setup_context=_cross_entropy_saves)
