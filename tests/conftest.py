"""How the tests run: one thread per process, the examples hypothesis draws, and what happens without a GPU."""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # before anything imports NumPy or torch, which read them once

import pytest
from hypothesis import HealthCheck, settings

from tests.gpu import cuda_devices

# The same examples on every machine and every run: a failure is the change's, never the draw's. No deadlines: machines differ.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    print_blob=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
# Different examples each time, many of them; failing ones are kept in .hypothesis and tried first the next time.
settings.register_profile("explore", parent=settings.get_profile("default"), derandomize=False, max_examples=500)
# `make schedules`: orders of threads for each rung of a kernel.
settings.register_profile("schedules", parent=settings.get_profile("default"), max_examples=50)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and cuda_devices() == 0:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
