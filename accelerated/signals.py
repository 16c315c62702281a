"""SIGTERM and SIGINT as a wish to stop, heard between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT is kept in `received`; a second one acts as if there were no block.

    In a thread that is not the main one, Python delivers no signals, and `received` stays None.
    """

    KINDS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for kind in self.KINDS:
                if signal.getsignal(kind) is not signal.SIG_IGN:  # what the parent ignores stays ignored
                    self._before[kind] = signal.signal(kind, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}
