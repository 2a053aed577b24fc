"""Where the time of a change of weights goes."""

from __future__ import annotations

import time


class Phases(dict[str, float]):
    """Seconds by phase, one after the other. What a GPU still has to do counts for the phase that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.perf_counter()

    def end(self, phase: str) -> None:
        """Everything since the last phase was this one."""
        now = time.perf_counter()
        self[phase] = self.get(phase, 0.0) + now - self._last
        self._last = now
