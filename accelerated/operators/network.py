"""The operators within the network: attention, Read-project, and upsampling with a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelerated.operators.arrays import accumulator, as_array, cupy_for, fresh, read
from kernels import attention as attention_kernel
from kernels import fusion, reassemble


@torch.library.custom_op("dpt::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.attention.attend`: out (B, heads, N, d) and, for the gradient, lse (B, heads, N)."""
    out, lse = fresh(q, q.shape), fresh(q, q.shape[:-1], accumulator(q.dtype))
    with cupy_for(q):
        attention_kernel.attend(read(q), read(k), read(v), as_array(out), as_array(lse))
    return out, lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return fresh(q, q.shape), fresh(q, q.shape[:-1], accumulator(q.dtype))


@torch.library.custom_op("dpt::attention_backward", mutates_args=())
def attention_backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.attention.attend_backward`: the gradients in q, k and v."""
    gradients = fresh(q, q.shape), fresh(k, k.shape), fresh(v, v.shape)
    with cupy_for(q):
        dq, dk, dv = map(as_array, gradients)
        attention_kernel.attend_backward(read(q), read(k), read(v), read(out), read(lse), read(dout), (dq, dk, dv))
    return gradients


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fresh(q, q.shape), fresh(k, k.shape), fresh(v, v.shape)


def _attention_saves(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _attention_gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return attention_backward(*ctx.saved_tensors, dout)


attention.register_autograd(_attention_gradients, setup_context=_attention_saves)


@torch.library.custom_op("dpt::read_project", mutates_args=())
def read_project(tokens: Tensor, readout: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """`kernels.reassemble.read_project`: tokens (B, N, D) and readout (B, D) behind their products to (B, D, height, width)."""
    out = fresh(tokens, (tokens.shape[0], tokens.shape[2], height, width))
    with cupy_for(tokens):
        reassemble.read_project(read(tokens), read(readout), read(bias), (height, width), as_array(out))
    return out


@read_project.register_fake
def _(tokens: Tensor, readout: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return fresh(tokens, (tokens.shape[0], tokens.shape[2], height, width))


@torch.library.custom_op("dpt::read_project_backward", mutates_args=())
def read_project_backward(dout: Tensor, tokens: Tensor, readout: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.reassemble.read_project_backward`: the gradients in tokens, readout and bias."""
    gradients = fresh(tokens, tokens.shape), fresh(readout, readout.shape), fresh(bias, bias.shape)
    with cupy_for(tokens):
        out = reassemble.ReadGradients(*map(as_array, gradients))
        reassemble.read_project_backward(read(dout), read(tokens), read(readout), read(bias), out)
    return gradients


@read_project_backward.register_fake
def _(dout: Tensor, tokens: Tensor, readout: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return fresh(tokens, tokens.shape), fresh(readout, readout.shape), fresh(bias, bias.shape)


def _read_project_saves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _read_project_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*read_project_backward(dout, *ctx.saved_tensors), None, None)


read_project.register_autograd(_read_project_gradients, setup_context=_read_project_saves)


@torch.library.custom_op("dpt::upsample_add", mutates_args=())
def upsample_add(x: Tensor, skip: Tensor) -> Tensor:
    """`kernels.fusion.upsample_add`: x (B, C, h, w) resized to skip (B, C, H, W), plus skip, in the memory format of skip."""
    out = torch.empty_like(skip, memory_format=_format(skip))
    with cupy_for(skip):
        arrays = (_as_laid_out(tensor, _format(skip)) for tensor in (x, skip, out))
        fusion.upsample_add(*arrays, layout=_LAYOUTS[_format(skip)])
    return out


@upsample_add.register_fake
def _(x: Tensor, skip: Tensor) -> Tensor:
    return torch.empty_like(skip, memory_format=_format(skip))


@torch.library.custom_op("dpt::upsample_backward", mutates_args=())
def upsample_backward(dout: Tensor, height: int, width: int) -> Tensor:
    """`kernels.fusion.upsample_backward`: the gradient in x (B, C, height, width), in the memory format of dout."""
    layout = _format(dout)
    dx = torch.empty((*dout.shape[:2], height, width), dtype=dout.dtype, device=dout.device, memory_format=layout)
    with cupy_for(dout):
        fusion.upsample_backward(_as_laid_out(dout, layout), (height, width), _as_laid_out(dx, layout), layout=_LAYOUTS[layout])
    return dx


@upsample_backward.register_fake
def _(dout: Tensor, height: int, width: int) -> Tensor:
    shape = (*dout.shape[:2], height, width)
    return torch.empty(shape, dtype=dout.dtype, device=dout.device, memory_format=_format(dout))


_LAYOUTS = {torch.contiguous_format: "channels_first", torch.channels_last: "channels_last"}


def _format(tensor: Tensor) -> torch.memory_format:
    """channels_last where that is how the tensor lies and no other way, else contiguous."""
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _as_laid_out(tensor: Tensor, layout: torch.memory_format) -> Any:
    """The array of a map: (B, C, H, W), or (B, H, W, C) for channels_last."""
    tensor = tensor.contiguous(memory_format=layout)
    return as_array(tensor.permute(0, 2, 3, 1) if layout == torch.channels_last else tensor)


def _upsample_add_saves(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.size = inputs[0].shape[2:]


def _upsample_add_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
    return upsample_backward(dout, *ctx.size), dout


upsample_add.register_autograd(_upsample_add_gradients, setup_context=_upsample_add_saves)
