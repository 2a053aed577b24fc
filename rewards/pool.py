"""A pool of worker processes that can be killed, with a deadline for each request and for the batch."""

from __future__ import annotations

import atexit
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError

_WORKER = Path(__file__).with_name("worker.py")
_HEADER = struct.Struct(">I")
# A fresh worker imports sympy: half a second when idle, longer on a busy machine. No answer is to blame for it.
_START_TIMEOUT_S = 120.0
CLOSED = "This verifier is closed; create a new MathVerifier to grade more answers."


class _Worker:
    """One process and its two pipes."""

    def __init__(self, memory_limit: int, number: int) -> None:
        self.number = number
        # Popen neither runs Python between fork and exec nor lets file descriptors through: safe with threads, with
        # CUDA initialised, and under any multiprocessing start method.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(os.getpid()), str(memory_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C in the terminal reaches the parent only
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self.ready = False
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self.request: int | None = None
        self._buffer = b""

    def send(self, index: int, message: dict[str, Any], deadline: float) -> None:
        body = json.dumps(message).encode()
        self.request, self.deadline = index, deadline
        self.stdin.write(_HEADER.pack(len(body)) + body)  # a few kilobytes: one write to an empty pipe

    def receive(self) -> dict[str, Any] | None:
        """A whole message, or None if more bytes are to come.

        Raises:
            EOFError: The process is gone.
        """
        chunk = os.read(self.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        self._buffer += chunk
        if len(self._buffer) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._buffer)
        if len(self._buffer) < _HEADER.size + size:
            return None
        body = self._buffer[_HEADER.size : _HEADER.size + size]
        self._buffer = self._buffer[_HEADER.size + size :]
        return json.loads(body)

    def kill(self) -> None:
        """End the process, without waiting until the system has cleared it away."""
        self.process.kill()
        self.abandon()

    def abandon(self) -> None:
        """Close the pipes only: what a forked child does with its parent's workers."""
        self.stdin.close()
        self.stdout.close()


class WorkerPool:
    """Up to `workers` processes, started when first needed.

    One batch runs at a time; other threads wait for their turn. A forked child starts its own processes.
    """

    def __init__(self, workers: int, memory_limit: int) -> None:
        self.size, self.memory_limit = workers, memory_limit
        self.closed = False
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._killed: list[_Worker] = []  # until the system reports their end
        self._begun = 0  # workers so far; each has the count before it as its number

    def _after_fork(self) -> None:
        for worker in self._workers:
            worker.abandon()
        self._reset()

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.process.pid for worker in self._workers]

    def start(self, wait: bool = True) -> None:
        """Start every worker that is not running, and wait until all are ready unless told otherwise.

        `run` does so itself for the workers that it needs.
        """
        with self._lock:
            if self.closed:
                raise FuraError(CLOSED)
            self._fill(self.size)
            self._greet()
            while wait and not all(worker.ready for worker in self._workers):
                self._check_start(time.monotonic())
                self._poll([], {}, deque(), time.monotonic() + 1.0)

    def _fill(self, count: int) -> None:
        while len(self._workers) < count:
            self._workers.append(_Worker(self.memory_limit, self._begun))
            self._begun += 1

    def _greet(self) -> None:
        """Give workers that no earlier batch waited for their time from now: their greeting may lie unread."""
        for worker in self._workers:
            if not worker.ready:
                worker.deadline = time.monotonic() + _START_TIMEOUT_S

    def _check_start(self, now: float) -> None:
        if any(not worker.ready and now >= worker.deadline for worker in self._workers):
            raise FuraError(f"A grading worker did not start within {_START_TIMEOUT_S:.0f} s.")

    def run(self, requests: Sequence[dict[str, Any]], timeout: float, batch_timeout: float) -> list[dict[str, Any]]:
        """Answer every request, in order of arrival as workers become free.

        Args:
            requests: What to send; each gets a `timeout` key.
            timeout: Seconds a worker may spend on one request before it is killed; after `k` overruns in a batch,
                `timeout / (1 + k)`.
            batch_timeout: Seconds for all of them, from the moment the first worker is ready.

        Returns:
            One reply per request: the worker's, or `{"error": "timeout"}`, or `{"error": "worker died"}`.

        Raises:
            FuraError: The pool is closed, or no worker could be started.
        """
        with self._lock:
            if self.closed:
                raise FuraError(CLOSED)
            return self._run(requests, timeout, batch_timeout)

    def _run(self, requests: Sequence[dict[str, Any]], timeout: float, batch_timeout: float) -> list[dict[str, Any]]:
        replies: list[dict[str, Any]] = [{"error": "timeout"} for _ in requests]
        waiting = deque(range(len(requests)))
        # A request whose worker died (killed by the system, say) is asked once more before it counts as an error: from
        # this number of workers on, as others may have died with it.
        fresh: dict[int, int] = {}
        batch_deadline = float("inf")
        overruns = 0
        wanted = min(self.size, len(requests))
        self._greet()
        try:
            while waiting or any(worker.request is not None for worker in self._workers):
                if waiting:
                    self._fill(wanted)
                now = time.monotonic()
                self._check_start(now)
                if batch_deadline == float("inf") and any(worker.ready for worker in self._workers):
                    batch_deadline = now + batch_timeout
                if now >= batch_deadline:
                    break
                for worker in list(self._workers):
                    if now >= worker.deadline:
                        self._drop(worker)
                        overruns += 1
                    elif worker.ready and worker.request is None:
                        index = next((index for index in waiting if worker.number >= fresh.get(index, 0)), None)
                        if index is None:
                            continue
                        waiting.remove(index)
                        try:
                            # Many overruns mean a collapsed policy: the next ones must not use up the batch.
                            allowed = timeout / (1 + overruns)
                            worker.send(index, {**requests[index], "timeout": allowed}, now + allowed)
                        except BrokenPipeError:
                            self._lost(worker, fresh, waiting, replies)
                self._poll(replies, fresh, waiting, min(batch_deadline, now + 1.0))
        except BaseException:  # KeyboardInterrupt too: a half-read reply must not answer the next batch
            self._stop()
            raise
        for worker in [worker for worker in self._workers if worker.request is not None]:
            self._drop(worker)
        self._fill(wanted)  # replacements start now, to be ready for the next batch
        return replies

    def _poll(self, replies: list[dict[str, Any]], fresh: dict[int, int], waiting: deque[int], latest: float) -> None:
        """Wait until some worker answers, dies or reaches its deadline."""
        busy = [worker for worker in self._workers if worker.request is not None or not worker.ready]
        if not busy:
            return
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            until = min(latest, *(worker.deadline for worker in busy))
            events = selector.select(max(0.0, until - time.monotonic()))
        for key, _ in events:
            worker = key.data
            try:
                message = worker.receive()
            except EOFError:
                self._lost(worker, fresh, waiting, replies)
                continue
            if message is None:
                continue
            worker.deadline = float("inf")
            if not worker.ready:
                worker.ready = True
                continue
            replies[worker.request] = message
            worker.request = None
            if message.get("retire"):
                self._drop(worker)

    def _lost(self, worker: _Worker, fresh: dict[int, int], waiting: deque[int], replies: list[dict[str, Any]]) -> None:
        """A worker died by itself: ask its request again, of a worker that begins later."""
        index = worker.request
        self._drop(worker)
        if not worker.ready:
            raise FuraError(
                "A grading worker ended while it started; is math-verify installed, and memory_limit at least 256 MiB?"
            )
        if index is not None:
            if index not in fresh:
                fresh[index] = self._begun
                waiting.appendleft(index)
                self._fill(len(self._workers) + 1)
            else:
                replies[index] = {"error": "worker died"}

    def _drop(self, worker: _Worker) -> None:
        worker.kill()
        self._workers.remove(worker)
        self._killed = [*(dying for dying in self._killed if dying.process.poll() is None), worker]

    def _stop(self) -> None:
        for worker in list(self._workers):
            self._drop(worker)
        for worker in self._killed:
            worker.process.wait()

    def close(self) -> None:
        """End every worker. Waits for a batch in another thread; a second call does nothing."""
        with self._lock:
            self.closed = True
            self._stop()


_pools: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool._stop()


def _forget_all() -> None:
    for pool in list(_pools):
        pool._after_fork()


os.register_at_fork(after_in_child=_forget_all)
