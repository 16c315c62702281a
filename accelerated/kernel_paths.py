"""Which way an operation is computed: by its CUDA kernel or composed from torch, and the switch that says so.

    with accelerated.use_kernels("host"):        # tensors on the CPU go through the kernels, emulated: slow, to prove them
        loss = depth_loss(model(image), target, mask)
    print(accelerated.kernel_report())

Without the switch, torch computes what is on the CPU, and on a GPU all but the operations whose kernel measured faster.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import NamedTuple

import torch

OPERATIONS = {
    "attention": "torch.nn.functional.scaled_dot_product_attention",
    "read_project": "sum, GELU and transposition, one after the other",
    "upsample_add": "torch.nn.functional.interpolate, then the sum",
    "depth_loss": "sorts and sums",
    "cross_entropy": "torch.nn.functional.interpolate, then its cross_entropy",
    "least_squares": "masked sums",
    "confusion": "torch.bincount",
}
"""The operations that have a kernel, and what torch does instead."""

FASTER: dict[str, str] = {}
"""What `python -m benchmarks.kernels` found faster than torch on a GPU: the operation and the figure. Empty: none is measured."""

NO_CUPY = "kernels on a GPU need CuPy, which is not installed: install the project with its extra cuda13, or cuda12"

PLACES = ("auto", "host", "cuda", "none")

HAS_CUPY = importlib.util.find_spec("cupy") is not None
_place = "auto"


class Path(NamedTuple):
    """How an operation is computed for tensors of one type of device, "cpu" or "cuda": by "kernel" or "torch", and why."""

    operation: str
    device: str
    by: str
    reason: str


class KernelReport(tuple[Path, ...]):
    """A `Path` for each operation and type of device; printed, a table."""

    def __str__(self) -> str:
        rows = [("operation", "device", "by", "because"), *self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)


@contextlib.contextmanager
def use_kernels(place: str) -> Iterator[None]:
    """Within the block, in all threads: "host", "cuda" (every operation on tensors there by its kernel), "none" or "auto".

    "host": tensors on the CPU, by the emulation, which is slow and needs a C++ compiler. "cuda": tensors on a GPU, which needs
    CuPy. "none": torch alone. "auto", as without the block: on a GPU, what measured faster. Raises ValueError for another word,
    ImportError where CuPy is missing, RuntimeError where there is no GPU.
    """
    global _place
    if place not in PLACES:
        raise ValueError(f"place is {place!r}: expected one of {', '.join(PLACES)}")
    if place == "cuda" and not HAS_CUPY:
        raise ImportError(NO_CUPY)
    if place == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("kernels on a GPU need a CUDA device, and torch finds none")
    before, _place = _place, place
    try:
        yield
    finally:
        _place = before


def by_kernel(operation: str, device: str) -> bool:
    """Whether `operation` on tensors of this type of device is computed by its kernel."""
    if _place == "auto":
        return device == "cuda" and operation in FASTER and HAS_CUPY
    return (_place, device) in (("host", "cpu"), ("cuda", "cuda"))


def kernel_report() -> KernelReport:
    """How each operation that has a kernel is computed now, on the CPU and on a GPU, and why."""
    return KernelReport(
        Path(operation, device, "kernel" if by_kernel(operation, device) else "torch", _reason(operation, device))
        for operation in OPERATIONS
        for device in ("cpu", "cuda")
    )


def _reason(operation: str, device: str) -> str:
    composed = f"(torch: {OPERATIONS[operation]})"
    if _place != "auto":
        return f'use_kernels("{_place}")' + ("" if by_kernel(operation, device) else f" {composed}")
    if device == "cpu":
        return f"emulated kernels are slow {composed}"
    if operation not in FASTER:
        return f"the kernel has not measured faster on a GPU {composed}"
    return FASTER[operation] if HAS_CUPY else f"CuPy is not installed {composed}"
