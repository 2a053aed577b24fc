"""Swapping adapters into a `vllm.LLM` of this process.

llm = LLM("Qwen/Qwen2.5-Coder-0.5B", worker_extension_cls=WORKER_EXTENSION)
adapters = attach(llm)
adapters.swap("runs/gsm8k/checkpoint-200")
llm.generate(...)
adapters.off()
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.phases import Phases
from fura_rl.rollout.pristine import Keep
from fura_rl.rollout.vllm_names import WORKER_EXTENSION
from fura_rl.rollout.worker import FuraWorker, Reply, first_reply

__all__ = ["WORKER_EXTENSION", "AttachedAdapters", "attach"]


class AttachedAdapters:
    """The adapter merged into a `vllm.LLM`. Not to be used while another thread generates.

    Attributes:
        version: How many times the weights were changed; 0 is the base as it was loaded.
        checksum: SHA-256 of the merged adapter's tensors, "" for the base.
        seconds: Of the last change, by phase.
    """

    def __init__(self, llm: Any, keep: Keep = "cpu") -> None:
        self.llm = llm
        self.version = 0
        self.checksum = ""
        self.seconds: dict[str, float] = {}
        self._swapped: dict[str, str] = {}
        self._active: str | None = None
        if not vllm_names.has_extension(llm) and not vllm_names.runs_in_process(llm):
            raise FuraError(
                "This LLM runs its engine in another process: make it with "
                f"worker_extension_cls={WORKER_EXTENSION!r}, or set VLLM_ENABLE_V1_MULTIPROCESSING=0."
            )
        self._call("fura_setup", keep)

    def swap(self, path: str | Path, name: str | None = None) -> int:
        """Merges the adapter in `path` in place of whatever was merged before.

        Args:
            path: A folder that training or `save_adapter` wrote (forms full and delta).
            name: What `list` calls it; the folder's name if None.

        Returns:
            The new version.

        Raises:
            FuraError: the adapter does not fit this engine, or could not be merged. The old weights are in place.
        """
        name = name or Path(path).name
        self._change(str(Path(path).resolve()))
        self._swapped[name] = str(path)
        self._active = name
        return self.version

    def off(self) -> int:
        """Puts the base weights back, bit for bit. Returns the new version."""
        self._change(None)
        self._active = None
        return self.version

    def list(self) -> dict[str, bool]:
        """Every adapter swapped in so far by name, and whether it is the one that is merged now."""
        return {name: name == self._active for name in self._swapped}

    def _change(self, path: str | None) -> None:
        reply = self._call("fura_prepare", path)
        phases = Phases()
        try:
            self._call("fura_commit")
        except FuraError:
            self._call("fura_rollback")
            raise
        phases.end("merge")
        self.version += 1
        self.checksum = reply["checksum"]
        if not self.llm.reset_prefix_cache():
            raise FuraError("The prefix cache could not be reset: requests were running during the swap.")
        phases.end("prefix cache")
        self.seconds = {**reply["seconds"], **phases}

    def _call(self, method: str, *args: Any) -> Reply:
        target = method if vllm_names.has_extension(self.llm) else getattr(FuraWorker, method)
        return first_reply(self.llm.collective_rpc(target, args=args))


def attach(llm: Any, keep: Keep = "cpu") -> AttachedAdapters:
    """Makes a `vllm.LLM` swap FuRA adapters.

    Args:
        llm: Made with `worker_extension_cls=WORKER_EXTENSION`, or in-process.
        keep: Where base weights stay between swaps: "cpu" (pinned beside a GPU), "device", or "checkpoint", which
            reads the file each time and needs no memory. Weights that no adapter touches are never kept.

    Raises:
        FuraError: the engine is in another process and lacks the extension, is compiled on a CPU, or its checkpoint
            has no safetensors files.
    """
    return AttachedAdapters(llm, keep)
