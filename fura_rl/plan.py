"""What a run will need of memory and of the network: for `fura-rl plan`, and for the check before a run on a GPU.

Nothing is loaded. The arithmetic is `fura_rl.memory`'s; `tests/test_plan.py` compares it with peaks measured on a GPU
and with counted tensors. A plan has two phases: training (forward, backward, optimiser) and generating (sampling and
the sync before it). An engine in the same process holds its share of the GPU in both, unless it sleeps while training.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch

from fura_rl.errors import FuraError
from fura_rl.memory import (
    BF16_COPIES,
    ModelSizes,
    Strategy,
    activation_bytes,
    adapter_parts,
    base_bytes,
    bucket_bytes,
    full_parts,
    gathered_bytes,
    head_bytes,
    network_bytes,
    weight_passes,
)
from fura_rl.trainer.arguments import AdapterArguments, ModelArguments
from fura_rl.trainer.config import FuraGRPOConfig

GIB = 2**30
CONTEXT_BYTES = 1.0 * GIB  # CUDA context and the allocator's slack
MARGIN = 0.15  # a run is refused beyond it: the plan was within 12% of every measured peak
LARGEST_BATCH = 4096
OPTIMISERS = ("adamw_torch", "adamw_torch_fused")
SIZING_OPTIONS = ("cpu_offload_gb", "quantization")  # of an engine: not planned for
BUCKETS = "DeepSpeed's buckets"


@dataclass(frozen=True)
class Run:
    """What a plan is made of: sizes, options, and how the run is spread over GPUs of `memory` bytes."""

    sizes: ModelSizes
    training: FuraGRPOConfig
    model: ModelArguments
    adapter: AdapterArguments
    strategy: Strategy
    gpus: int
    memory: float
    prompt_tokens: int

    @property
    def dtype_bytes(self) -> int:
        """Of a weight that is not quantised, as `load_model` chooses its dtype on a GPU."""
        dtype = self.model.dtype
        if dtype == "auto":
            dtype = "float32" if self.adapter.method == "full" else "bfloat16"
        return 4 if dtype == "float32" else 2

    @property
    def quantised_bits(self) -> int | None:
        return 4 if self.model.load_in_4bit else 8 if self.model.load_in_8bit else None

    @property
    def weight_bytes(self) -> int:
        """Of all base weights."""
        return base_bytes(self.sizes, self.dtype_bytes, self.quantised_bits)

    @property
    def colocated(self) -> bool:
        return self.training.use_vllm and self.training.vllm_mode == "colocate"

    @property
    def engine_options(self) -> dict[str, Any]:
        """By vLLM's names, which win over TRL's."""
        options = self.training.vllm_engine_kwargs or {}
        assert isinstance(options, dict)  # the configuration has parsed it
        return options

    @property
    def engine_cache(self) -> float:
        """Bytes of the engine's KV cache if an option fixes them, whatever its share of the GPU is; else 0."""
        return float(self.engine_options.get("kv_cache_memory_bytes") or 0)

    @property
    def engine_part(self) -> str:
        """What a plan calls the engine."""
        return f"engine (its {'weights and cache' if self.engine_cache else 'share of the GPU'})"

    @property
    def engine_share(self) -> float:
        """Bytes of the GPU that an engine in the same process takes; 0 without one.

        Raises:
            FuraError: Its size is set by options that are not planned for.
        """
        if not self.colocated:
            return 0.0
        for name in SIZING_OPTIONS:
            if name in self.engine_options:
                raise FuraError(f"plan does not know an engine with {name}.")
        if self.engine_cache:
            return self.engine_weights + self.engine_cache
        share = self.engine_options.get("gpu_memory_utilization") or self.training.vllm_gpu_memory_utilization
        return self.memory * float(share)

    @property
    def engine_weights(self) -> float:
        return 2.0 * self.sizes.weights / self.training.vllm_tensor_parallel_size

    def parts(
        self, batch: int | None = None, checkpointing: bool | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Bytes of one GPU by part, while training and while generating; as the options say, or as given.

        Raises:
            FuraError: The optimiser or the engine is not planned for.
        """
        if self.training.optim not in OPTIMISERS:
            raise FuraError(f"plan does not know optim={str(self.training.optim)!r}, only {' and '.join(OPTIMISERS)}.")
        sizes, training, method = self.sizes, self.training, self.adapter.method
        batch = batch or training.per_device_train_batch_size
        checkpointing = training.gradient_checkpointing if checkpointing is None else checkpointing
        completion = training.max_completion_length or 0
        tokens = batch * (self.prompt_tokens + completion)
        full = method == "full"
        split = self.gpus if self.strategy.splits_weights else 1
        if full:
            held = full_parts(sizes, self.dtype_bytes, self.strategy, self.gpus)
            if training.beta:
                held["reference model"] = float(self.weight_bytes) / split
        else:
            away = self.strategy.zero == 3 and self.strategy.offload
            held = {"base weights": 0.0 if away else self.weight_bytes / split}
            held |= adapter_parts(sizes, method, self.strategy, self.gpus)
        if self.strategy.splits_weights:
            held["gathered layers (estimate)"] = gathered_bytes(sizes, self.weight_bytes, self.strategy)
        if bucket := bucket_bytes(self.strategy, method):
            held[BUCKETS] = bucket
        held["CUDA context (estimate)"] = CONTEXT_BYTES
        rank, quantised = self.adapter.lora_r, self.quantised_bits is not None
        zero = self.strategy.zero
        layers = activation_bytes(
            sizes, tokens, checkpointing=checkpointing, method=method, rank=rank, quantised=quantised, zero=zero,
            padded=True,
        )  # fmt: skip
        scored = head_bytes(sizes, batch * completion, trained=full)
        train = {**held, "activations": float(layers), "head": float(scored)}
        held.pop(BF16_COPIES, None)  # autocast frees them after a forward pass
        largest = max((out * width for out, width in sizes.matrices), default=0)
        generate = {**held, "merge of the largest matrix": 0.0 if full else 6.0 * largest}  # float32, engine's bf16
        if self.colocated:
            generate[self.engine_part] = self.engine_share
            if not training.vllm_enable_sleep_mode:
                train[self.engine_part] = self.engine_share
        return train, generate

    def peak(self, batch: int | None = None, checkpointing: bool | None = None) -> float:
        return max(sum(phase.values()) for phase in self.parts(batch, checkpointing))

    def largest_batch(self, checkpointing: bool | None = None) -> int:
        """The largest number of rollouts in a micro-batch that fits; 0 if not even one does."""
        batches = range(1, LARGEST_BATCH + 1)
        return bisect_right(batches, self.memory, key=lambda batch: self.peak(batch, checkpointing))

    def network(self) -> dict[str, float]:
        """Bytes that one GPU sends in a step, by reason."""
        training = self.training
        passes = weight_passes(
            micro_batches=training.gradient_accumulation_steps, engine=training.use_vllm, reference=bool(training.beta)
        )
        method = self.adapter.method
        sent = network_bytes(self.sizes, self.weight_bytes, self.strategy, self.gpus, passes, method)
        if training.use_vllm and training.vllm_mode == "server":
            adapter = training.vllm_transport == "adapter"
            words = "sync to a server, adapter only" if adapter else "sync to a server, merged"
            pushed = (1.0 if training.vllm_push == "int8" else 4.0) * self.sizes.trained
            sent[words] = pushed if adapter else 2.0 * self.sizes.weights
        return sent


def advice(run: Run, part: str) -> str:
    """What to change so that less of `part` is needed."""
    training, batch = run.training, run.largest_batch()
    if part in ("activations", "head"):
        ways = [] if training.gradient_checkpointing else ["set gradient_checkpointing"]
        now = training.per_device_train_batch_size
        if 0 < batch < now:
            smaller = f"lower per_device_train_batch_size from {now} to {batch} and raise gradient_accumulation_steps"
            ways.insert(0, smaller)
        return " or ".join(ways) or "lower max_completion_length"
    if part == BUCKETS:
        return "lower reduce_bucket_size in DeepSpeed's configuration"
    if part.startswith("engine"):
        sleep = "" if training.vllm_enable_sleep_mode else ", or set vllm_enable_sleep_mode"
        return f"lower {'kv_cache_memory_bytes' if run.engine_cache else 'vllm_gpu_memory_utilization'}{sleep}"
    several = "" if run.strategy.splits_weights else ", or split the weights over GPUs with ZeRO-3 or FSDP2"
    if run.adapter.method == "full":
        return f"train an adapter (method: fura){several}"
    return ("set load_in_4bit" if run.quantised_bits is None else "train a smaller model") + several


def misfit(run: Run, margin: float = 0.0) -> str | None:
    """Why a run does not fit, and what to change, in one sentence; None if it fits within `margin` (a share)."""
    if run.colocated and run.engine_weights >= run.engine_share:
        return (
            f"The engine's share of the GPU is {run.engine_share / GIB:.1f} GiB, and its weights alone take "
            f"{run.engine_weights / GIB:.1f}: raise vllm_gpu_memory_utilization or vllm_tensor_parallel_size."
        )
    peak = run.peak()
    if peak <= run.memory * (1 + margin):
        return None
    phases = dict(zip(("training", "generating"), run.parts(), strict=True))
    phase, parts = max(phases.items(), key=lambda item: sum(item[1].values()))
    part = max(parts, key=lambda name: parts[name])
    return (
        f"This does not fit into {run.memory / GIB:.4g} GiB: with completions of full length, {phase} needs "
        f"{peak / GIB:.1f}, most of it for {part} ({parts[part] / GIB:.1f}): {advice(run, part)}."
    )


def strategy_of(training: FuraGRPOConfig) -> Strategy:
    """How this process's launcher and options spread the run.

    Raises:
        FuraError: In a way that is not planned for.
    """
    plugin = training.deepspeed_plugin
    if plugin is not None:
        zero = plugin.deepspeed_config.get("zero_optimization", {})
        offloads = [zero.get(f"offload_{what}") or {} for what in ("optimizer", "param")]
        offload = any(o.get("device") not in (None, "none") for o in offloads)
        given = zero.get("reduce_bucket_size")
        bucket = int(given) if isinstance(given, int | float) else Strategy.bucket
        return Strategy(plugin.zero_stage, offload=offload, bucket=bucket)
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise FuraError("plan does not know FSDP with parameters in main memory.")
    return Strategy(fsdp=bool(training.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true")


def check_memory(
    training: FuraGRPOConfig, model: ModelArguments, adapter: AdapterArguments, memory: float | None = None
) -> None:
    """Refuses a run that cannot fit its GPU, before anything is loaded. What is not planned for is not refused.

    Counted with empty prompts and completions of full length, which any batch may have; refused only beyond `MARGIN`.
    Nothing happens without a GPU, or with `check_memory: false`.

    Args:
        memory: Of the GPU in bytes; what CUDA says if None.

    Raises:
        FuraError: The run cannot fit.
    """
    if not training.check_memory or (memory is None and training.device.type != "cuda"):
        return
    memory = memory or torch.cuda.mem_get_info(training.device)[1]
    assert model.model_name_or_path is not None  # checked by the parser
    try:
        sizes = ModelSizes.of(model.model_name_or_path, adapter, model.model_revision)
        run = Run(sizes, training, model, adapter, strategy_of(training), training.world_size, memory, prompt_tokens=0)
        reason = misfit(run, MARGIN)
    except FuraError:  # what is wrong, and not only unknown here, is said when the model is loaded
        return
    if reason is not None:
        raise FuraError(f"{reason.rstrip('.')}; check_memory: false starts it all the same.")
