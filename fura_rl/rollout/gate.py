"""Which requests run on which weights: a request holds the gate open from its first byte in to its last byte out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fura_rl.errors import FuraError


class Gate:
    """Many requests, or one change of weights.

    A change closes the gate to new requests, which wait, and starts when those in flight have finished. So each request
    runs on one version from beginning to end. For one event loop.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._open = asyncio.Event()
        self._open.set()
        self._idle = asyncio.Event()
        self._idle.set()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """The time of one request; waits while weights change."""
        while not self._open.is_set():
            await self._open.wait()
        self.in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.in_flight -= 1
            if not self.in_flight:
                self._idle.set()

    @asynccontextmanager
    async def change(self, timeout: float) -> AsyncIterator[None]:
        """The time of one change; there may be only one at a time.

        Args:
            timeout: Seconds to wait for requests in flight.

        Raises:
            FuraError: they take longer. Nothing was changed, and held requests go on.
        """
        assert self._open.is_set()
        self._open.clear()
        try:
            await self._wait_until_idle(timeout)
            yield
        finally:
            self._open.set()

    async def _wait_until_idle(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError as error:
            raise FuraError(
                f"{self.in_flight} requests were still running after {timeout:g} s: the weights stay as they are."
            ) from error
