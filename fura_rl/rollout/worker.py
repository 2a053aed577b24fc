"""What runs inside vLLM's workers: methods that vLLM adds to its worker class (`--worker-extension-cls`).

Called through `collective_rpc`, on every rank. Mistakes of users come back as `{"error": sentence}`: an exception would
lose its type on the way, and with several ranks end the engine. `fura_prepare*` touch no weights and may run while
requests are served; between `fura_commit` and the reset of the prefix cache no request may run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.in_engine import InEngineAdapter, Merge, reason
from fura_rl.rollout.payload import Adapter, StaleUpdateError, read_folder, unpack
from fura_rl.rollout.phases import Phases
from fura_rl.rollout.pristine import PristineWeights, check_keep
from fura_rl.rollout.warm_up import warm_up

Reply = dict[str, Any]


def _reply(method: Callable[..., Reply | None]) -> Callable[..., Reply]:
    @wraps(method)
    def answer(self: Any, *args: Any) -> Reply:
        try:
            return method(self, *args) or {}
        except (FuraError, OSError) as error:  # OSError: a checkpoint that was deleted while it was read
            return {"error": str(error), "stale": isinstance(error, StaleUpdateError)}
        except (torch.OutOfMemoryError, MemoryError) as error:
            return {"error": f"The adapter was not merged, and the weights are as before: {reason(error)}."}

    return answer


class FuraWorker:
    """Mixed into a vLLM worker. Every name starts with `fura_`, as vLLM asks for names of its own."""

    @_reply
    def fura_setup(self, keep: str) -> Reply:
        """Prepares for swaps; `keep` says where base weights stay, see `PristineWeights`. Safe to call again."""
        if not hasattr(self, "fura_state"):
            self.fura_state = _State(self, keep)
        dtype = next(vllm_names.engine_model(self).parameters()).dtype
        return {"base": vllm_names.checkpoint_of(self)[0], "dtype": str(dtype).removeprefix("torch.")}

    @_reply
    def fura_prepare(self, path: str | None) -> Reply:
        """Reads and checks the adapter in a folder; None for the base."""
        return self.fura_state.prepare_saved(path)

    @_reply
    def fura_prepare_pushed(self, data: bytes) -> Reply:
        """Reads and checks an adapter that was sent as bytes (`payload.pack`), in full or as an update of the last."""
        return self.fura_state.prepare_pushed(data)

    @_reply
    def fura_commit(self) -> None:
        """Merges what was prepared."""
        self.fura_state.commit()

    @_reply
    def fura_rollback(self) -> None:
        """Undoes the last commit."""
        self.fura_state.engine.rollback()


class _State:
    """What a worker remembers between calls."""

    def __init__(self, worker: Any, keep: str) -> None:
        if vllm_names.compiles_on_cpu(worker):
            raise FuraError("On a CPU, adapters can be swapped only with enforce_eager (--enforce-eager).")
        model = vllm_names.engine_model(worker)
        name, revision = vllm_names.checkpoint_of(worker)
        device = next(model.parameters()).device
        pristine = PristineWeights(name, revision=revision, keep=check_keep(keep), device=device)
        self.engine = InEngineAdapter(model, pristine)
        self.pushed: tuple[Adapter, Adapter] | None = None  # what the next update changes, and the same on the device
        self.prepared_push: tuple[Adapter, Adapter] | None = None
        self.prepared: Merge | None = None
        if device.type == "cuda":
            linear = filter(vllm_names.is_plain_linear, model.modules())
            widths = [vllm_names.attribute(layer, "input_size") for layer in linear]
            warm_up(widths, next(model.parameters()).dtype, device)

    def prepare(self, adapter: Adapter | None, checksum: Future[str] | None, phases: Phases) -> Reply:
        """Checks an adapter, on the engine's device, against the engine."""
        self.prepared = self.prepared_push = None
        self.prepared = self.engine.prepare(adapter)
        phases.end("fit and D")
        reply = {"checksum": "" if checksum is None else checksum.result(), "layers": len(self.prepared.multipliers)}
        phases.end("checksum")
        return {**reply, "seconds": dict(phases)}  # of plain types: vLLM may be told to send classes by name

    def prepare_saved(self, path: str | None) -> Reply:
        phases = Phases()
        if path is None:
            return self.prepare(None, None, phases)
        adapter = read_folder(path, check=False)
        phases.end("read")
        with self._hashing(adapter) as checksum:
            there = adapter.to(self.engine.pristine.device)
            adapter.check_values(there)
            phases.end("to device and check")
            return self.prepare(there, checksum, phases)

    def prepare_pushed(self, data: bytes) -> Reply:
        phases, device = Phases(), self.engine.pristine.device
        if self.pushed is None:
            adapter = unpack(data)
            phases.end("read and check")
            there = adapter.to(device)
        else:
            held, held_there = self.pushed
            adapter = unpack(data, held)
            phases.end("read and check")
            update = adapter.shares_frozen(held)  # then frozen tensors need not travel again
            there = held_there.with_trained(adapter.trained.to(device)) if update else adapter.to(device)
        phases.end("to device")
        with self._hashing(adapter) as checksum:
            reply = self.prepare(there, checksum, phases)
        self.prepared_push = adapter, there
        return reply

    @contextmanager
    def _hashing(self, adapter: Adapter) -> Iterator[Future[str]]:
        """The adapter's checksum, which takes as long as everything else.

        It is made beside that, so every single operation there may have to wait for its turn in the interpreter: a few
        on many tensors at once are faster than many small ones.
        """
        with ThreadPoolExecutor(1) as beside:
            yield beside.submit(lambda: adapter.checksum)

    def commit(self) -> None:
        if self.prepared is None:
            raise FuraError("Nothing was prepared.")
        self.engine.commit(self.prepared)
        self.pushed = self.prepared_push or self.pushed
        self.prepared = self.prepared_push = None


def first_reply(replies: list[Reply]) -> Reply:
    """The reply of the first rank.

    Raises:
        StaleUpdateError, FuraError: a rank has refused; its sentence.
    """
    for reply in replies:
        if "error" in reply:
            raise (StaleUpdateError if reply.get("stale") else FuraError)(reply["error"])
    return replies[0]
