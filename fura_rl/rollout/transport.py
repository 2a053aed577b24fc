"""Transport `adapter`: a trainer sends only what it trains to a server, which merges it into the base that it has.

The first push carries the whole adapter, so that the server knows basis and singular values; later ones carry what
was trained since, by default as int8 (`change`). Every push comes back with the server's version and a checksum of what
was merged, and every rollout must be stamped with that version:
- a server that was restarted has the base's weights and another instance name: it gets the whole adapter again, as
  does one that holds another adapter than the one that was pushed last;
- a server whose weights somebody else has changed is refused, as is one whose base the adapter does not fit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import requests
import torch
from peft import PeftModel
from trl.generation.vllm_client import VLLMClient

from fura_rl.adapter import FuraLayer
from fura_rl.adapter.base_weight import whole
from fura_rl.adapter.blocks import FuraBlocks
from fura_rl.errors import FuraError
from fura_rl.rollout.change import LARGEST_ERROR
from fura_rl.rollout.client import REQUIRE_HEADER, VERSION_HEADER, FuraClient, ServerLostError, Tries
from fura_rl.rollout.merged import GatherFunction, checkpoint_name
from fura_rl.rollout.payload import FAMILY, TRAINED, Adapter, StaleUpdateError, Tensors, pack, pack_update
from fura_rl.rollout.phases import Phases

logger = logging.getLogger(__name__)

FORMS = ("int8", "exact")  # in which later pushes carry what was trained
BUSY = (502, 503, 504)
HEARTBEAT_S = 60.0  # a long generation is interrupted by nothing else than by a server that says nothing for this long


def check_model(model: torch.nn.Module) -> None:
    """Raises FuraError if the model trains what this transport does not send."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".fura_blocks." not in name:
            raise FuraError(
                f"vllm_transport: adapter sends FuRA blocks only, but {checkpoint_name(name)} is trained too: use "
                "vllm_transport: merged, or leave out modules_to_save."
            )


@dataclass
class _Snapshot:
    """Frozen tensors of some blocks on the CPU, and how to see that the blocks still have them."""

    sources: list[tuple[torch.Tensor, int, int]]  # kept, with address and version: no other tensor can look the same
    tensors: Tensors

    def __init__(self, frozen: dict[str, torch.Tensor]) -> None:
        self.sources = [(value, value.data_ptr(), value._version) for value in frozen.values()]
        self.tensors = {key: value.detach().cpu().clone() for key, value in frozen.items()}

    def is_current(self, frozen: dict[str, torch.Tensor]) -> bool:
        return list(self.tensors) == list(frozen) and all(
            value is source and (value.data_ptr(), value._version) == (address, version)
            for value, (source, address, version) in zip(frozen.values(), self.sources, strict=True)
        )


_snapshots: WeakKeyDictionary[FuraBlocks, _Snapshot] = WeakKeyDictionary()


def _frozen(blocks: FuraBlocks) -> Tensors:
    """The tensors that training leaves alone, on the CPU: the same objects until `refresh_basis` changes them."""
    frozen = {key: value for key, value in blocks.named_buffers() if value is not None}
    snapshot = _snapshots.get(blocks)
    if snapshot is None or not snapshot.is_current(frozen):
        snapshot = _snapshots[blocks] = _Snapshot(frozen)
    return snapshot.tensors


@torch.no_grad()
def adapter_of(model: PeftModel, gather: GatherFunction) -> Adapter:
    """The model's active adapter as data on the CPU. Every rank must take part where parameters are sharded.

    Frozen tensors are the same objects as of the last call, if nothing has written to the layers' own.

    Raises:
        FuraError: the model has none, or several at once.
    """
    found: dict[str, FuraBlocks] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FuraLayer):
            continue
        active = layer.named_blocks(None)
        if len(active) != 1:
            raise FuraError(
                f"vllm_transport: adapter needs one active adapter, {checkpoint_name(name)} has {len(active)}."
            )
        (blocks,) = active
        found[checkpoint_name(name)] = blocks
    if not found:
        raise FuraError("vllm_transport: adapter needs a model with FuRA adapters: use vllm_transport: merged.")
    family = dict(zip(FAMILY, (blocks.side, blocks.singular_values, blocks.basis_kind), strict=True))
    names = sorted(found)
    shapes = [_trained_shapes(found[name]) for name in names]
    trained = _collect([found[name] for name in names], shapes, gather)
    parts = iter(trained.split([shape.numel() for of_module in shapes for shape in of_module.values()]))
    modules = {
        name: {**_frozen(found[name]), **{key: next(parts).view(shape) for key, shape in of_module.items()}}
        for name, of_module in zip(names, shapes, strict=True)
    }
    return Adapter(family, modules).with_trained(trained)


def _trained_shapes(blocks: FuraBlocks) -> dict[str, torch.Size]:
    """Of what is trained. ZeRO-3 remembers shapes beside its empty parameters."""
    found = {key: getattr(blocks, key) for key in TRAINED}
    return {key: torch.Size(getattr(p, "ds_shape", p.shape)) for key, p in found.items() if p is not None}


def _collect(all_blocks: list[FuraBlocks], shapes: list[dict[str, torch.Size]], gather: GatherFunction) -> torch.Tensor:
    """Everything that is trained, (N,) on the CPU, in the order of `Adapter.trained`."""
    core = all_blocks[0].core
    size = sum(shape.numel() for of_module in shapes for shape in of_module.values())
    trained = torch.empty(size, dtype=core.dtype, pin_memory=core.is_cuda)
    at = 0
    for blocks, of_module in zip(all_blocks, shapes, strict=True):
        with gather(list(blocks.parameters())):
            for key, shape in of_module.items():  # copies into pinned memory need not wait for one another
                part = trained[at : at + shape.numel()]
                part.copy_(whole(getattr(blocks, key)).detach().reshape(-1), non_blocking=True)
                at += shape.numel()
    if core.is_cuda:
        torch.cuda.synchronize(core.device)
    return trained


class AdapterVLLMClient(VLLMClient):
    """TRL's client of a vLLM server, for one that `fura-rl serve --for-training` started.

    Args:
        base_url: The server's address.
        connection_timeout: Seconds to wait for the server at the start, and for which a lost connection is tried again.
        form: How later pushes carry what was trained: "int8", as far as the engine's dtype cannot tell the
            difference (`change.LARGEST_ERROR`), or "exact".

    Attributes:
        stamp: Version of the server's weights after the last push.
        sent_bytes: Size of the last push.
        seconds: Of the last push, by phase, those of the server among them.

    Raises:
        FuraError: the server cannot be reached, or manages no adapters.
    """

    heartbeat = HEARTBEAT_S

    def __init__(self, base_url: str, connection_timeout: float = 240.0, form: str = "int8") -> None:
        if form not in FORMS:
            raise FuraError(f"vllm_push is {' or '.join(FORMS)}, not {form!r}.")
        self.form = form
        self.stamp = ""
        self.sent_bytes = 0
        self.seconds: dict[str, float] = {}
        self.patience = connection_timeout
        self._latest: Adapter | None = None  # the trainer's
        self._held: Adapter | None = None  # the server's, up to rounding the same
        self.manager = FuraClient(base_url, patience=connection_timeout)
        self.manager.version()
        super().__init__(base_url=self.manager.url, connection_timeout=connection_timeout)

    def push(self, adapter: Adapter) -> None:
        """Merges `adapter` into the server's weights.

        Raises:
            FuraError: it was made for another base, the server merged something else, or cannot be reached.
        """
        self._latest = adapter
        phases = Phases()
        now = self.manager.version()
        phases.end("ask for the version")
        if now["version"] == self.stamp and self._held is not None and adapter.shares_frozen(self._held):
            try:
                largest_error = LARGEST_ERROR.get(now["dtype"], 0.0) if self.form == "int8" else 0.0
                held, data = pack_update(adapter, self._held, largest_error)
                phases.end("pack")
                return self._send(held, data, phases)
            except StaleUpdateError as error:  # an answer was lost, or a rank of the server is ahead
                logger.warning("Sending the whole adapter to the server at %s: %s", self.base_url, error)
        data = pack(adapter)
        phases.end("pack")
        self._send(adapter, data, phases)

    def _send(self, adapter: Adapter, data: bytes, phases: Phases) -> None:
        with ThreadPoolExecutor(1) as beside:  # the server takes longer
            checksum = beside.submit(lambda: adapter.checksum)
            status = self.manager.push(data, name="training")
            phases.end("send")
        if status["checksum"] != checksum.result():
            raise FuraError(f"The server at {self.base_url} merged other tensors than those that were sent.")
        phases.end("compare checksums")
        phases["send"] -= sum(status["seconds"].values())  # beside what the server did
        self.seconds = {**phases, **{f"server: {phase}": value for phase, value in status["seconds"].items()}}
        self._held, self.stamp, self.sent_bytes = adapter, status["version"], len(data)

    def refresh(self) -> None:
        """Sends the last adapter again to a server that was restarted.

        Raises:
            FuraError: the server is the same, but somebody else has changed its weights.
        """
        now = self.manager.version()
        if now["version"] == self.stamp:
            return
        if _instance(now["version"]) == _instance(self.stamp):
            raise FuraError(
                f"Somebody else changed the weights of the server at {self.base_url}, now {now['name'] or 'the base'}: "
                "a training run needs a server of its own."
            )
        assert self._latest is not None
        logger.warning("The server at %s was restarted: sending the adapter again.", self.base_url)
        self.push(self._latest)

    def get_server_info(self) -> dict:
        """What TRL's trainer reads of it, without the development endpoints, which anybody could call."""
        return {"model_config": {"logprobs_mode": self.manager.version()["logprobs_mode"]}}

    def _get(self, url: str, **kwargs: Any) -> dict:
        return super()._get(url, headers=self.manager.headers, **kwargs)

    def _post(self, url: str, **kwargs: Any) -> dict:
        """Generates, on the version that was pushed last and no other."""
        tries = Tries(self.base_url, self.patience)
        while True:
            self.refresh()
            headers = {**self.manager.headers, REQUIRE_HEADER: self.stamp}
            try:
                response = self._post_while_alive(url, headers=headers, **kwargs)
            except (
                requests.ConnectionError,
                requests.exceptions.ChunkedEncodingError,
            ) as error:  # none, or half an answer
                tries.again(error)
                continue
            if response.status_code in BUSY:
                tries.again(f"it answered {response.status_code}")
            elif response.status_code == 409:  # other weights since `refresh`, which will say why
                tries.again(response.text)
            elif response.status_code != 200:
                raise FuraError(f"The server at {self.base_url} refused to generate: {response.text[:500]}")
            elif response.headers.get(VERSION_HEADER) != self.stamp:
                version = response.headers.get(VERSION_HEADER)
                raise FuraError(f"Rollouts of version {version} came back where {self.stamp} was asked for: not used.")
            else:
                return response.json()

    def _post_while_alive(self, url: str, **kwargs: Any) -> requests.Response:
        """However long the answer takes, as long as the server answers other questions meanwhile.

        Raises:
            ServerLostError: it hangs, or its machine is gone without a word.
        """
        # not through TRL's session, whose own retries would outlast and hide ours
        answer = _in_background(lambda: requests.post(url, timeout=None, **kwargs))
        while True:
            try:
                return answer.result(self.heartbeat)
            except NotYet:
                self._check_alive()

    def _check_alive(self) -> None:
        try:
            requests.get(f"{self.base_url}/health", timeout=self.heartbeat)
        except requests.Timeout as error:
            raise ServerLostError(
                f"The server at {self.base_url} hangs: it has not answered for {self.heartbeat:g} s."
            ) from error
        except requests.ConnectionError:
            pass  # the request itself will say so


def _in_background(call: Callable[[], requests.Response]) -> Future[requests.Response]:
    """The result of a call in a thread that does not keep the process from ending."""
    future: Future[requests.Response] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _instance(stamp: str) -> str:
    return stamp.rpartition("-")[0]
