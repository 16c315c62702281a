"""Everything that needs a GPU, in one command: its tests, then the benchmark of the kernels, written as JSON.

    python -m tests.gpu --output runs/gpu        # tests.json and kernels.json there

It runs by the Python it is called with, and needs no network: torch, timm, CuPy, NumPy, ml_dtypes, hypothesis, pytest and a C++
compiler. Only files with a test marked `gpu` are read, so what other tests import may be missing. The benchmark is the quick one,
so that all is done within nine minutes; `python -m benchmarks.kernels` alone takes longer. Status 0 if every test passed and the
kernels kept what the benchmark promises of them.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def cuda_devices() -> int:
    """How many CUDA devices the driver offers, asked without importing torch or CuPy."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


class Outcomes:
    """A pytest plugin that keeps what became of every test."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            test = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.outcome != "passed":
                test["message"] = report.longreprtext or str(report.longrepr)
            self.tests.append(test)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.tests.append({"test": report.nodeid, "outcome": "not collected", "message": report.longreprtext})


def machine() -> dict[str, Any]:
    """The GPU, the driver, and the versions that a figure depends on."""
    import cupy
    import numpy
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda": torch.version.cuda,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cupy": cupy.__version__,
        "numpy": numpy.__version__,
        "processors": os.cpu_count(),
    }


def marked() -> list[str]:
    """The files that have a test for a GPU."""
    return [str(path) for path in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def run_tests(processes: int) -> tuple[int, Outcomes]:
    outcomes = Outcomes()
    parallel = ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []
    options = ["-m", "gpu", "--quiet", "--continue-on-collection-errors", "-p", "no:cacheprovider", *parallel]
    return int(pytest.main([*options, *marked()], plugins=[outcomes])), outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the results (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="of the tests (default: %(default)s)")
    parser.add_argument("--no-benchmark", action="store_true", help="the tests alone")
    options = parser.parse_args(arguments)
    if cuda_devices() == 0:
        print("tests.gpu: no CUDA device: nothing was run", file=sys.stderr)
        return 2
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"tests.gpu: --output {options.output}: {error.strerror}", file=sys.stderr)
        return 2
    began = time.monotonic()
    status, outcomes = run_tests(options.processes)
    counts = {kind: sum(t["outcome"] == kind for t in outcomes.tests) for kind in sorted({t["outcome"] for t in outcomes.tests})}
    result = {"machine": machine(), "status": status, "seconds": round(time.monotonic() - began), "counts": counts}
    path = options.output / "tests.json"
    path.write_text(json.dumps({**result, "tests": outcomes.tests}, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {counts} in {result['seconds']} s")
    if options.no_benchmark:
        return status
    command = [sys.executable, "-m", "benchmarks.kernels", "--quick", "--json", str(options.output / "kernels.json")]
    return subprocess.run(command, check=False).returncode or status


if __name__ == "__main__":
    sys.exit(main())
