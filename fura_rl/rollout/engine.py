"""TRL's vLLM generation with FuRA's sync: the merged policy is streamed into the engine, the trainer is never touched.

How it departs from TRL 1.16's `VLLMGeneration`:
- weights come from `merged_weights` (no `merge_adapter` in place, nothing to undo after an error);
- after the first push into an engine of this process, adapted layers are merged straight into its storage (`in_place`);
  tensors that no adapter touches stay in the engine, unless sleeping made it lose them;
- vLLM's CPU build packs its linear weights, so there what goes by name goes through `reload_weights`;
- sleeping can keep the weights in main memory (level 1) instead of dropping them (level 2);
- every engine argument can be set (`vllm_engine_kwargs`), and the engine computes in the trainer's dtype by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import broadcast_object_list
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from fura_rl.availability import set_engine_environment
from fura_rl.errors import FuraError
from fura_rl.rollout import shared, vllm_names
from fura_rl.rollout.in_place import InPlaceMerge
from fura_rl.rollout.merged import checkpoint_name, merged_weights
from fura_rl.rollout.probe import score_in_process, score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of, check_model


def trainer_dtype(model: torch.nn.Module, autocast_bf16: bool = False) -> torch.dtype:
    """The floating dtype that the trainer's matrix products read the base weights in."""
    if autocast_bf16:
        return torch.bfloat16
    floating = [p for p in model.parameters() if p.dtype.is_floating_point]
    return next((p.dtype for p in floating if not p.requires_grad), floating[0].dtype)


class FuraVLLMGeneration(VLLMGeneration):
    """A vLLM engine that samples from the merged policy.

    Args:
        engine_kwargs: Arguments of `vllm.LLM` that override TRL's (colocate mode).
        transport: How weights reach a server: "merged" (TRL's NCCL path) or "adapter" (`fura_rl.rollout.transport`).
        push: How "adapter" sends what was trained: "int8" or "exact".
        sleep_level: 1 keeps the sleeping engine's weights in main memory, 2 (as TRL) drops them.
        rounding: How merged weights become bfloat16: "nearest" or "stochastic" (`fura_rl.rollout.merged.cast`).
        *args, **kwargs: As for `trl.generation.vllm_generation.VLLMGeneration`.

    Attributes:
        version: How many times weights were pushed.
    """

    def __init__(
        self,
        *args: Any,
        engine_kwargs: dict[str, Any] | None = None,
        transport: str = "merged",
        push: str = "int8",
        rounding: str = "nearest",
        sleep_level: int = 2,
        **kwargs: Any,
    ) -> None:
        if sleep_level not in (1, 2):
            raise FuraError(f"vllm_sleep_level is 1 or 2, not {sleep_level!r}.")
        self.sleep_level = sleep_level
        self.engine_kwargs = engine_kwargs or {}
        self.transport = transport
        self.push = push
        if rounding not in ("nearest", "stochastic"):
            raise FuraError(f"sync_rounding is nearest or stochastic, not {rounding!r}.")
        self.rounding = rounding
        self.version = 0
        self._packed = False  # whether linear weights are repacked at load, as vLLM's CPU build does
        self._in_place: InPlaceMerge | None = None  # once the engine has all weights
        self._llm_weights_sleeping: bool = False
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        if self.transport not in ("merged", "adapter"):
            raise FuraError(f"vllm_transport is merged or adapter, not {self.transport!r}.")
        self._check_tied_head()
        if self.transport == "adapter" and self.mode != "server":
            raise FuraError("vllm_transport: adapter needs vllm_mode: server.")
        if self._sends_adapter:
            return self._connect()
        if self.mode != "colocate":
            return super()._init_vllm()
        on_cpu = self.accelerator.device.type == "cpu"
        set_engine_environment()
        defaults: dict[str, Any] = {"dtype": str(self._trainer_dtype()).removeprefix("torch.")}
        if on_cpu:
            defaults["enforce_eager"] = True  # compiling for a CPU takes longer than it saves
        make_llm = vllm_generation.LLM

        def llm(**trl_kwargs: Any) -> Any:
            made = shared.engine(make_llm, {**trl_kwargs, **defaults, **self.engine_kwargs})
            if self.enable_sleep_mode:  # TRL asks for level 2, and wakes what a probe has woken before
                made.sleep = lambda level=2: type(made).sleep(made, level=self.sleep_level)
                made.wake_up = lambda tags: vllm_names.wake_up(made, tags)
            return made

        # TRL fixes the arguments in the middle of this method. Beside a bitsandbytes policy it would quantise the
        # engine too, which could not load merged weights; ours gets the dequantised base that the trainer reads.
        with (
            patch.object(vllm_generation, "LLM", llm),
            patch.object(vllm_generation, "is_bitsandbytes_available", lambda: False),
        ):
            super()._init_vllm()
        self._packed = on_cpu

    def _trainer_dtype(self) -> torch.dtype:
        on_cpu = self.accelerator.device.type == "cpu"
        return trainer_dtype(self.model, self.accelerator.mixed_precision == "bf16" and not on_cpu)

    @property
    def _sends_adapter(self) -> bool:
        return self.mode == "server" and self.transport == "adapter"

    def _connect(self) -> None:
        check_model(self.model)
        if self.accelerator.is_main_process:
            url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
            self.vllm_client = AdapterVLLMClient(url, connection_timeout=self.server_timeout, form=self.push)
        self.accelerator.wait_for_everyone()

    def _iter_named_params(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What TRL streams to a server, and what the first push loads into a colocated engine: the merged policy."""
        return self._stream()

    def _check_tied_head(self) -> None:
        """An engine whose head is its embedding has no place for one of the two that was trained apart."""
        if not getattr(self.model.config, "tie_word_embeddings", False):
            return
        for name, _ in self.model.named_parameters():
            if "modules_to_save." in name and ("lm_head" in name or "embed_tokens" in name):
                raise FuraError(
                    f"{checkpoint_name(name)} is trained apart from the weight that it is tied to, which the engine "
                    "cannot hold: leave it out of modules_to_save, or untie the model (tie_word_embeddings)."
                )

    def _stream(self, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if self._dist.fsdp_version == 1:
            raise FuraError("FuRA cannot sync from FSDP1's flat shards: set fsdp_version: 2, or use DDP or ZeRO.")
        return merged_weights(self.model, gather=self._dist.gather_params, rounding=self._random_bits(), **options)

    def _random_bits(self) -> torch.Generator | None:
        """For stochastic rounding; by version, so that the engines of all ranks get the same weights."""
        if self.rounding != "stochastic":
            return None
        return torch.Generator(self.accelerator.device).manual_seed(self.version)

    def sync_weights(self) -> None:
        """Push the merged policy into the engine and drop its prefix cache."""
        if self._sends_adapter:
            adapter = adapter_of(self.model, self._dist.gather_params)  # every rank takes part
            if self.accelerator.is_main_process:
                self.vllm_client.push(adapter)
        elif self.mode == "server":
            super().sync_weights()
        else:
            self._sync_in_process()
        self.version += 1

    def _sync_in_process(self) -> None:
        """By the loader the first time and after a loss; else adapted layers in place, and by name what remains."""
        lost = False
        if self.enable_sleep_mode and vllm_names.is_asleep(self.llm, "weights"):
            vllm_generation.empty_cache()  # as TRL does, against running out of memory
            self.llm.wake_up(tags=["weights"])
            lost = self.sleep_level == 2
        self._llm_weights_sleeping = False
        if self._in_place is None or lost or (self._packed and not self._in_place.complete):
            self._load(self._stream())  # lost are biases too, and what no adapter touches; packed layers load whole
        else:
            self._in_place.write(self._random_bits())
            if not self._in_place.complete:
                self._load(self._stream(only_adapted=True, skip=self._in_place.names))
        if self._in_place is None:
            self._in_place = InPlaceMerge(self.model, vllm_names.model_of(self.llm))
        self.llm.reset_prefix_cache()

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Through vLLM's loader, which takes one tensor after the other, and need not have all."""
        if self._packed:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            self.llm.apply_model(_repack_tied_head)
        else:
            model: Any = vllm_names.model_of(self.llm)
            model.load_weights(weights)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probs (natural, without temperature) of the tokens after the first of each sequence.

        Every rank calls it with the same sequences, just after a sync; each gets the answer.
        """
        if self.mode != "server":
            if self.enable_sleep_mode:
                self.llm.wake_up(tags=["kv_cache"])  # its weights are awake; the next generation puts both to sleep
            return score_in_process(self.llm, sequences)
        answer = score_on_server(self.vllm_client, sequences) if self.accelerator.is_main_process else None
        (answer,) = broadcast_object_list([answer])
        return answer

    def mismatch(self) -> str | None:
        """How a colocated engine differs from the trainer by its options, in words; None if it does not."""
        if self.mode == "server":
            return None
        config = self.llm.llm_engine.model_config
        own = self.model.name_or_path
        if config.dtype != (dtype := self._trainer_dtype()):
            return f"the engine computes in {config.dtype}, the trainer in {dtype} (vllm_engine_kwargs)"
        if config.model != own:
            return f"the engine was started from {config.model}, the trainer from {own} (vllm_engine_kwargs)"
        return None

    @contextmanager
    def awake(self) -> Iterator[Any]:
        """The colocated `vllm.LLM`, with its weights and KV cache in memory for the length of the block."""
        if self.enable_sleep_mode:
            if self._llm_weights_sleeping:
                self.sync_weights()
            self.llm.wake_up(tags=["kv_cache"])
        yield self.llm
        if self.enable_sleep_mode:
            self.llm.sleep(level=self.sleep_level)
            self._llm_weights_sleeping = True


def _repack_tied_head(model: torch.nn.Module) -> None:
    """`reload_weights` skips a head that is tied to the embedding and would leave its packed copy stale."""
    head = getattr(model, "lm_head", None)
    if head is not None and getattr(model.config, "tie_word_embeddings", False):
        head.quant_method.process_weights_after_loading(head)
