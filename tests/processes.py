"""Work in a child of the test's process, which may be killed, or be one rank of several."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable

import pytest


def in_child(work: Callable[[], int]) -> int:
    """Run `work` in a child of this process, whose exit status it gives; return the child's id."""
    with warnings.catch_warnings():
        # Other threads of this process hold no lock of ours: torch runs one thread here, and a child that waits is ended.
        warnings.filterwarnings("ignore", ".*use of fork.*", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 70
        try:
            status = work()
        finally:
            os._exit(status)
    return child


def ended(child: int, seconds: float = 180) -> int:
    """Wait for a child; its exit status, or minus the signal that ended it. One that takes longer is killed, and fails."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"a child took longer than {seconds:g} seconds")
