"""How fast the reference's convolutions are beside PyTorch's: `python -m benchmarks.convolutions [--threads N] [--backward]`.

Every shape that DPT-Large, -Base and -Hybrid have at 384 x 384, batch 1, float32. Both forms run in turns; printed are the
median times, ours divided by PyTorch's, and the share of the machine's best rate: the operations that the definition counts (two
for every product of a weight and a pixel) per second, divided by the best rate that NumPy's matrix product reaches here at a
large size. Winograd's way needs fewer operations than the definition counts, so its share can exceed 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits

from reference import nn


class Shape(NamedTuple):
    place: str
    channels: int
    outputs: int
    kernel: int
    side: int  # of the square x
    stride: int = 1
    padding: Any = 0
    transposed: bool = False


SAME = ((0, 1), (0, 1))  # TensorFlow's padding of an even side for 3x3 at stride 2
SHAPES = (
    Shape("fusion 0", 256, 256, 3, 96, padding=1),
    Shape("fusion 1", 256, 256, 3, 48, padding=1),
    Shape("fusion 2", 256, 256, 3, 24, padding=1),
    Shape("fusion 3", 256, 256, 3, 12, padding=1),
    Shape("fusion 0 project", 256, 256, 1, 192),
    Shape("fusion 1 project", 256, 256, 1, 96),
    Shape("head conv1", 256, 128, 3, 192, padding=1),
    Shape("head conv2", 128, 32, 3, 384, padding=1),
    Shape("head conv3", 32, 1, 1, 384),
    Shape("Large embed", 3, 1024, 16, 384, stride=16),
    Shape("Large reassemble 3 project", 1024, 1024, 1, 24),
    Shape("Large reassemble 3 resample", 1024, 1024, 3, 24, stride=2, padding=1),
    Shape("Large reassemble 0 resample", 256, 256, 4, 24, stride=4, transposed=True),
    Shape("Large reassemble 1 resample", 512, 512, 2, 24, stride=2, transposed=True),
    Shape("Large reassemble 1 out", 512, 256, 3, 48, padding=1),
    Shape("Large reassemble 2 out", 1024, 256, 3, 24, padding=1),
    Shape("Large reassemble 3 out", 1024, 256, 3, 12, padding=1),
    Shape("Base reassemble 0 resample", 96, 96, 4, 24, stride=4, transposed=True),
    Shape("Base reassemble 0 out", 96, 256, 3, 96, padding=1),
    Shape("Base reassemble 1 out", 192, 256, 3, 48, padding=1),
    Shape("Hybrid stem", 3, 64, 7, 384, stride=2, padding=((2, 3), (2, 3))),
    Shape("Hybrid stage 0", 64, 64, 3, 96, padding=1),
    Shape("Hybrid stage 0 widen", 64, 256, 1, 96),
    Shape("Hybrid stage 1 first", 128, 128, 3, 96, stride=2, padding=SAME),
    Shape("Hybrid stage 1", 128, 128, 3, 48, padding=1),
    Shape("Hybrid stage 2", 256, 256, 3, 24, padding=1),
)


def main() -> None:
    """Measure every shape and print its line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of both forms")
    parser.add_argument("--repeats", type=int, default=9, help="runs of each form, interleaved, after one that is not counted")
    parser.add_argument("--backward", action="store_true", help="time the gradients of x, weight and bias instead of the result")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with threadpool_limits(arguments.threads):
        best = best_rate()
        print(f"{arguments.threads} threads; the best product of matrices reaches {best / 1e9:.0f} GFLOP/s\n")
        print(f"{'':28}{'shape':>26}{'ours':>10}{'torch':>10}{'ratio':>7}{'share':>7}")
        for shape in SHAPES:
            ours, theirs, operations = measure(shape, arguments.backward, arguments.repeats)
            print(
                f"{shape.place:28}{describe(shape):>26}{1e3 * ours:7.2f} ms{1e3 * theirs:7.2f} ms"
                f"{ours / theirs:7.2f}{operations / ours / best:7.2f}",
                flush=True,
            )


def describe(shape: Shape) -> str:
    kind = "T" if shape.transposed else ""
    return f"{shape.channels}>{shape.outputs} {shape.kernel}x{shape.kernel}/{shape.stride}{kind} at {shape.side}"


def measure(shape: Shape, backward: bool, repeats: int) -> tuple[float, float, int]:
    """Return our and PyTorch's median time in seconds, and the operations that the definition counts."""
    rng = np.random.default_rng(0)
    channels = (shape.channels, shape.outputs) if shape.transposed else (shape.outputs, shape.channels)
    sizes = (1, shape.channels, shape.side, shape.side), (*channels, shape.kernel, shape.kernel), (shape.outputs,)
    arrays = [rng.standard_normal(size, np.float32) for size in sizes]
    tensors = [torch.from_numpy(array).requires_grad_(backward) for array in arrays]

    def ours() -> Any:
        if shape.transposed:
            return nn.conv_transpose2d(*arrays, shape.stride)
        return nn.conv2d(*arrays, shape.stride, shape.padding)

    def theirs() -> torch.Tensor:
        x, weight, bias = tensors
        if shape.transposed:
            return F.conv_transpose2d(x, weight, bias, shape.stride)
        if isinstance(shape.padding, int):
            return F.conv2d(x, weight, bias, shape.stride, shape.padding)
        (top, bottom), (left, right) = shape.padding
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, shape.stride)

    y, vjp = ours()
    result = theirs()
    operations = 2 * arrays[1].size * (shape.side**2 if shape.transposed else y[0, 0].size)
    if not backward:
        return *interleaved(lambda: ours()[0], theirs, repeats), operations
    dy = rng.standard_normal(y.shape, np.float32)
    grad = torch.from_numpy(dy)

    def their_gradients() -> Any:
        return torch.autograd.grad(result, tensors, grad, retain_graph=True)

    return *interleaved(lambda: vjp(dy), their_gradients, repeats), 2 * operations


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the median time of each, run in turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        for run, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def best_rate() -> float:
    """Return the operations per second of a large product of matrices in float32, the best of a few."""
    a, b = np.ones((1024, 1024), np.float32), np.ones((1024, 4096), np.float32)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * a.size * b.shape[1] / min(times)


if __name__ == "__main__":
    main()
