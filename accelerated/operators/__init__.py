"""The kernels as PyTorch operators, `torch.ops.dpt.*`: with gradients, under autocast, torch.compile and CUDA graphs.

On a GPU an operator is its kernel, queued on torch's current stream; on the CPU it is the kernel's emulation, which is slow:
`accelerated.use_kernels` chooses between them and torch. Every result is allocated by torch, and so is what the kernels need on
the way. Errors are those of `kernels`. A kernel is compiled and loaded at its first use, which must come before a capture.
"""

from __future__ import annotations

from accelerated.operators import autocast
from accelerated.operators.arrays import as_array, cupy_for
from accelerated.operators.losses import depth_loss, upsampled_cross_entropy
from accelerated.operators.measures import confusion, least_squares
from accelerated.operators.network import attention, read_project, upsample_add

autocast.register()

__all__ = [
    "as_array",
    "attention",
    "confusion",
    "cupy_for",
    "depth_loss",
    "least_squares",
    "read_project",
    "upsample_add",
    "upsampled_cross_entropy",
]
