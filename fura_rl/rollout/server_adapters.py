"""The adapter merged into a server's engine: swap, off, push, watch, each between requests and never in one."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.allowed import AllowedAdapters
from fura_rl.rollout.gate import Gate
from fura_rl.rollout.phases import Phases
from fura_rl.rollout.watch import newest_checkpoint
from fura_rl.rollout.worker import Reply, first_reply

logger = logging.getLogger("vllm.fura")  # below vLLM's own logger, whose format and level the server's user chose

SETTINGS_VARIABLE = "FURA_SERVE"
WATCH_SECONDS = 2.0


@dataclass
class ServeSettings:
    """How `fura-rl serve` was called; travels to the server's process as JSON in an environment variable.

    Attributes:
        named: Name -> folder of an adapter.
        folders: Folders below which adapters may be loaded.
        first: The adapter to start with, by name.
        keep: Where base weights stay, see `PristineWeights`.
        watch: A training run whose new checkpoints are swapped in.
        push: Whether adapters may be sent as bytes.
        drain_seconds: How long a change waits for requests in flight.
    """

    named: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    first: str | None = None
    keep: str = "cpu"
    watch: str | None = None
    push: bool = False
    drain_seconds: float = 600.0

    def to_environment(self) -> dict[str, str]:
        return {SETTINGS_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> ServeSettings:
        return cls(**json.loads(os.environ.get(SETTINGS_VARIABLE, "{}")))


class ServerAdapters:
    """Changes the weights of one engine.

    Args:
        engine: vLLM's `AsyncLLM`, with `FuraWorker` as its workers' extension.
        settings: What may be loaded.
        gate: Held open by each request.

    Attributes:
        instance: Names this start of the server: after a restart it is another.
        version: How often weights were changed since the start; 0 is the base.
        seconds: Of the last change, by phase.
    """

    def __init__(self, engine: Any, settings: ServeSettings, gate: Gate) -> None:
        self.engine = engine
        self.settings = settings
        self.gate = gate
        folders = [*settings.folders, *([settings.watch] if settings.watch else [])]
        self.allowed = AllowedAdapters(dict(settings.named), folders)  # type: ignore[arg-type]
        self.instance = uuid.uuid4().hex[:8]
        self.version = 0
        self.name: str | None = None
        self.path: str | None = None
        self.checksum = ""
        self.base = ""
        self.dtype = ""
        self.seconds: dict[str, float] = {}
        self.lost = False
        self._one_change = asyncio.Lock()

    @property
    def stamp(self) -> str:
        """What the current weights are called in the header of every response: `<instance>-<version>`."""
        return f"{self.instance}-{self.version}"

    def status(self) -> dict[str, Any]:
        return {
            "version": self.stamp,
            "name": self.name,
            "path": self.path,
            "checksum": self.checksum,
            "base": self.base,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "logprobs_mode": vllm_names.logprobs_mode(self.engine),
        }

    async def start(self) -> None:
        """Prepares the workers and merges the first adapter.

        Raises:
            FuraError: the adapter does not fit, or the workers cannot swap at all.
        """
        engine = await self._call("fura_setup", self.settings.keep)
        self.base, self.dtype = engine["base"], engine["dtype"]
        if self.settings.first is not None:
            await self.swap(self.settings.first)

    async def swap(self, adapter: str, name: str | None = None) -> dict[str, Any]:
        """Merges an adapter, given by name or path, in place of the current one."""
        path = self.allowed.find(adapter)
        named = adapter if adapter in self.allowed.named else path.name
        return await self._change("fura_prepare", str(path), name or named, str(path))

    async def off(self) -> dict[str, Any]:
        """Puts the base weights back."""
        return await self._change("fura_prepare", None, None, None)

    async def push(self, data: bytes, name: str) -> dict[str, Any]:
        """Merges an adapter that came as bytes (`payload.pack`)."""
        if not self.settings.push:
            raise FuraError("This server takes adapters from its own folders only: start it with --for-training.")
        return await self._change("fura_prepare_pushed", data, name, None)

    async def _change(self, prepare: str, argument: Any, name: str | None, path: str | None) -> dict[str, Any]:
        async with self._one_change:
            if self.lost:
                raise FuraError("An earlier change could not be undone: restart the server.")
            phases = Phases()
            reply = await self._call(prepare, argument)  # reads and checks while requests go on
            phases.end("prepare")
            async with self.gate.change(self.settings.drain_seconds):
                try:
                    # the gate has let every HTTP request finish; this also waits for what a server generates in the
                    # background, and empties the prefix cache
                    await asyncio.wait_for(vllm_names.pause(self.engine), self.settings.drain_seconds)
                    phases.end("requests in flight")
                    await self._commit()
                    phases.end("merge")
                    self.version += 1
                    self.name, self.path, self.checksum = name, path, reply["checksum"]
                except TimeoutError as error:
                    raise FuraError(
                        "Requests in the background took too long: the weights stay as they are."
                    ) from error
                finally:
                    await self.engine.resume_generation()
            phases.end("resume")
            of_worker = reply["seconds"]
            phases["prepare"] -= sum(of_worker.values())  # the way to the engine's process and back
            self.seconds = {**of_worker, "to the engine and back": phases.pop("prepare"), **phases}
            logger.info("Weights are now %s: %s", self.stamp, self.name or "the base")
            return self.status()

    async def _commit(self) -> None:
        try:
            await self._call("fura_commit")
        except Exception:
            self.lost = True
            await self._call("fura_rollback")  # raises if a rank has lost its weights
            self.lost = False
            raise

    async def _call(self, method: str, *args: Any) -> Reply:
        return first_reply(await vllm_names.ask_workers(self.engine, method, *args))

    async def watch(self, run: str | Path) -> None:
        """Swaps in each new checkpoint of a training run, for ever. What is refused is logged once and left."""
        seen: Path | None = None
        while True:
            newest = newest_checkpoint(run)
            if newest is not None and newest != seen:
                seen = newest
                try:
                    await self.swap(str(newest.resolve()))
                except FuraError as error:
                    logger.warning("Not swapped in: %s", error)
            await asyncio.sleep(WATCH_SECONDS)
