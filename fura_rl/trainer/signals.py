"""SIGTERM and Ctrl-C: finish the step, write a checkpoint, leave. A second one leaves at once.

Schedulers announce a preemption with SIGTERM and kill some time later.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

PR_SET_PDEATHSIG = 1  # Linux, <sys/prctl.h>
SAME_REQUEST_S = 2.0  # launchers pass a signal on that their children had from the scheduler, too


class Interrupted(BaseException):
    """Raised where nothing would be lost: before the first step and after the last one."""


class StopSignals:
    """Notes the first SIGTERM or SIGINT; one that comes later has its default effect. Use it as a context manager.

    Attributes:
        received: Name of the signal, or None.
        deferred: Whether a signal is only noted (while training), or raises `Interrupted` at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.deferred = False
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._handle)
        if launched_by_accelerate():
            follow_parent(signal.SIGUSR2)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number != signal.SIGUSR2 and time.monotonic() - self._since > SAME_REQUEST_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._since = time.monotonic()
        self.received = "the launcher's end" if number == signal.SIGUSR2 else signal.Signals(number).name
        if not self.deferred:
            raise Interrupted(self.received)
        print(
            f"\n{self.received}: this step is finished and a checkpoint written; a second signal stops at once.",
            file=sys.stderr,
            flush=True,
        )


def launched_by_accelerate() -> bool:
    """Whether the parent is `accelerate launch`, which dies of a SIGTERM without passing it on."""
    command = Path(f"/proc/{os.getppid()}/cmdline")
    return command.exists() and b"accelerate" in command.read_bytes()


def follow_parent(number: int) -> None:
    """Have the kernel send a signal to this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
