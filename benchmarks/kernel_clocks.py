"""Clocks for `benchmarks.kernels`: of the CPU, and of a CUDA device with its memory and what limits it."""

from __future__ import annotations

import collections
import functools
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DEVICE = "cuda"
PARTS = ("forward", "backward", "both")
OTHER_BYTES = 2**28  # at least, to read between runs; more than the L2 cache of any GPU
ENOUGH = 0.5  # seconds of one form in one part, after which it is not run again once there are three figures


class Passes(NamedTuple):
    """One form of an operation: `forward()` returns a state, `backward(state)` the gradients; None where there is no gradient."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None
    results: Callable[[Any], tuple[torch.Tensor, ...]]  # the values in a state


class Run(NamedTuple):
    """What is timed, `run(prepare())`, of which `prepare` is not."""

    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Times(NamedTuple):
    """Median seconds: of the device's work, and, on a GPU, of a call from its beginning until its work is done."""

    seconds: float
    call_seconds: float | None


def run_of(part: str, passes: Passes) -> Run | None:
    """How this part is run; None where the form has no such part."""
    if part == "forward":
        return Run(lambda: None, lambda _: passes.forward())
    backward = passes.backward
    if backward is None:
        return None
    if part == "backward":
        return Run(passes.forward, backward)
    return Run(lambda: None, lambda _: backward(passes.forward()))


class Clock:
    """The CPU's clock."""

    device = "cpu"

    def interleaved(self, runs: dict[str, Run], repeats: int) -> dict[str, Times]:
        """Median times of each, run in turns, after one turn that is not counted. A slow one takes part in fewer turns."""
        samples: dict[str, list[Times]] = collections.defaultdict(list)
        for turn in range(repeats + 1):
            for name, run in runs.items():
                taken = samples[name]
                if len(taken) >= 3 and sum(times.call_seconds or times.seconds for times in taken) > ENOUGH:
                    continue
                times = self.once(run)
                if turn:
                    taken.append(times)
        return {name: _median(taken) for name, taken in samples.items()}

    def once(self, run: Run) -> Times:
        """One run."""
        state = run.prepare()
        started = time.perf_counter()
        run.run(state)
        return Times(time.perf_counter() - started, None)

    def finish(self) -> None:
        """Wait until all that was begun is done."""

    def extra_memory(self, passes: Passes, gradients: int) -> dict[str, int]:
        """Bytes that each part takes at its peak beyond inputs and their gradients; empty where that is not measured."""
        return {}


def _median(taken: list[Times]) -> Times:
    calls = [times.call_seconds for times in taken if times.call_seconds is not None]
    return Times(statistics.median(times.seconds for times in taken), statistics.median(calls) if calls else None)


class GpuClock(Clock):
    """The clock of a CUDA device, which is torch's current one.

    Every run begins with inputs that the L2 cache does not hold. The seconds of the device's work are taken between two events
    on its stream, behind a wait that is long enough for the CPU to queue the whole run: gaps in which the device would wait for
    Python do not count, except in a run that itself waits for the device. In the seconds of a call they all count.
    """

    def __init__(self) -> None:
        self.device = DEVICE
        cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
        self.other = torch.ones(max(OTHER_BYTES, 4 * cache) // 4, device=DEVICE)
        self.cycles_per_second = 1.0
        cycles = 2**24
        took = [self.seconds(lambda: torch.cuda._sleep(cycles), ahead=0.0) for _ in range(3)]
        self.cycles_per_second = cycles / statistics.median(took)

    def finish(self) -> None:
        torch.cuda.synchronize()

    def once(self, run: Run) -> Times:
        """The run twice: as a call on its own, and behind a wait."""
        state = run.prepare()
        self._read_other_memory()
        self.finish()
        started = time.perf_counter()
        run.run(state)
        queued = time.perf_counter() - started
        self.finish()
        call = time.perf_counter() - started
        del state
        state = run.prepare()
        return Times(self.seconds(lambda: run.run(state), queued), call)

    def seconds(self, run: Callable[[], Any], ahead: float) -> float:
        """The device's seconds for a run that takes the CPU about `ahead` seconds to queue."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._read_other_memory()
        self.finish()
        if ahead:
            torch.cuda._sleep(int(self.cycles_per_second * min(2 * ahead + 2e-4, 0.1)))
        start.record()
        run()
        end.record()
        self.finish()
        return start.elapsed_time(end) / 1e3

    def extra_memory(self, passes: Passes, gradients: int) -> dict[str, int]:
        """Bytes at the peak, by torch's allocator. Backward alone: beyond what the forward pass kept, too."""
        self.finish()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state = passes.forward()
        self.finish()
        forward = torch.cuda.max_memory_allocated() - before
        if passes.backward is None:
            return {"forward": forward}
        kept = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        result = passes.backward(state)
        self.finish()
        backward = torch.cuda.max_memory_allocated() - before - gradients
        del state, result
        return {"forward": forward, "backward": max(0, backward - kept), "both": max(forward, backward)}

    def _read_other_memory(self) -> None:
        """Fill the L2 cache with what no run needs. It is read, not written, so that nothing is left to be written back."""
        self.other.sum()


class Limits(NamedTuple):
    """What the card reached when asked for nothing else: bytes per second copied, operations per second by dtype."""

    copied: float
    products: dict[str, float]


def limits(clock: GpuClock, megabytes: int = 512, side: int = 8192, repeats: int = 15) -> Limits:
    """Measure both: copies of large buffers, in turn, reading and writing counted; products of square matrices of random numbers.

    float32 products are float32 throughout (no TF32). Medians, after runs that are not counted.
    """
    pairs = [torch.randn(2, megabytes * 2**18, device=DEVICE) for _ in range(4)]
    copies = [clock.seconds(functools.partial(to.copy_, source), 1e-4) for to, source in pairs * (1 + -(-repeats // 4))]
    copied = pairs[0].nbytes / statistics.median(copies[4:])
    del pairs
    products = {}
    for name in ("float32", "float16", "bfloat16"):
        a, b = (torch.randn(side, side, device=DEVICE).to(getattr(torch, name)) for _ in range(2))
        out = torch.empty_like(a)
        times = [clock.seconds(functools.partial(torch.mm, a, b, out=out), 1e-4) for _ in range(repeats + 3)]
        products[name] = 2 * side**3 / statistics.median(times[3:])
    return Limits(copied, products)


def shares(seconds: float, moved: int, operations: int, dtype: str, found: Limits | None) -> tuple[float | None, float | None]:
    """A run's bytes per second divided by those of a copy, and its operations per second by those of a large product."""
    if found is None or not math.isfinite(seconds) or seconds <= 0:
        return None, None
    product = operations / seconds / found.products[dtype] if operations else None
    return moved / seconds / found.copied, product


def versions() -> dict[str, str]:
    """The card's name, and the versions of what runs on it."""
    import cupy

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {
        "hardware": torch.cuda.get_device_properties(DEVICE).name,
        "driver": driver,
        "CUDA": str(torch.version.cuda),
        "CuPy": cupy.__version__,
    }
