"""One colocated engine for the training runs that a process makes one after the other.

Starting an engine takes as long as a short run. A run's first push gives the engine all of that run's weights and drops
its cache, so what is left to hand over is what starting an engine does to the process: it seeds the random numbers,
from which an engine of this process samples, and sets threads and the precision of matrix products.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class OtherEngineError(Exception):
    """The run needs an engine with other arguments than the one that this process keeps."""


@dataclass(frozen=True)
class ProcessState:
    """What belongs to the whole process, and decides what is drawn and how it is rounded."""

    generators: tuple[Any, Any, torch.Tensor]  # of Python, NumPy and torch's CPU
    cuda_generators: list[torch.Tensor]
    threads: int
    precision: str

    @classmethod
    def capture(cls) -> ProcessState:
        """The state as it is now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        generators = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        return cls(generators, cuda, torch.get_num_threads(), torch.get_float32_matmul_precision())

    def restore(self) -> None:
        """Make it the process's state again."""
        random.setstate(self.generators[0])
        np.random.set_state(self.generators[1])
        torch.set_rng_state(self.generators[2])
        if self.cuda_generators:
            torch.cuda.set_rng_state_all(self.cuda_generators)
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)


class EngineShelf:
    """Keeps the first engine that is made, and hands it to whoever asks for one with the same arguments."""

    def __init__(self) -> None:
        self._kept: tuple[dict[str, Any], Any, ProcessState] | None = None

    def get(self, make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The kept engine, or the one that `make(**arguments)` returns.

        Raises:
            OtherEngineError: The kept one was made with other arguments.
        """
        if self._kept is None:
            engine = make(**arguments)
            self._kept = (arguments, engine, ProcessState.capture())
            return engine
        kept, engine, after_start = self._kept
        if kept != arguments:
            changed = sorted(k for k in kept.keys() | arguments.keys() if kept.get(k) != arguments.get(k))
            raise OtherEngineError(f"This process keeps an engine with other values of {', '.join(changed)}.")
        after_start.restore()
        return engine


_shelf: EngineShelf | None = None


@contextmanager
def engines_are_kept() -> Iterator[None]:
    """Within the block, trainers of this process share one colocated engine (not one that sleeps)."""
    global _shelf
    before, _shelf = _shelf, EngineShelf()
    try:
        yield
    finally:
        _shelf = before


def engine(make: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A `vllm.LLM` with these arguments: the kept one within `engines_are_kept`, else a new one."""
    if _shelf is None or arguments["enable_sleep_mode"]:
        return make(**arguments)
    return _shelf.get(make, arguments)
