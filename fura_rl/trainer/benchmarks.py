"""Benchmarks inside a training run: which sampler, and which sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.integrations import is_deepspeed_zero3_enabled

from fura_rl.errors import FuraError
from fura_rl.eval import PRESETS, Sampling, TransformersSampler, VLLMSampler
from fura_rl.eval.distributed import ShardedSampler

if TYPE_CHECKING:
    from fura_rl.trainer.config import FuraGRPOConfig
    from fura_rl.trainer.grpo import FuraGRPOTrainer


def benchmark_sampling(args: FuraGRPOConfig, benchmark: str) -> Sampling:
    """The preset's sampling for a benchmark, with what the configuration overrides."""
    if args.benchmark_preset not in PRESETS:
        raise FuraError(f"Unknown benchmark_preset {args.benchmark_preset!r}: use one of {', '.join(PRESETS)}.")
    changes: dict[str, Any] = {
        "max_tokens": args.benchmark_max_tokens,
        "temperature": args.benchmark_temperature,
        "n": args.benchmark_samples,
        "seed": args.seed,
    }
    sampling = PRESETS[args.benchmark_preset][benchmark]
    return replace(sampling, **{key: value for key, value in changes.items() if value is not None})


@contextmanager
def make_sampler(trainer: FuraGRPOTrainer) -> Iterator[Any]:
    """A sampler on the run's live engines, every rank's; on the policy itself where there is no engine.

    Yields None on ranks other than 0, once they have served all that rank 0 asked for.
    """
    with _own_sampler(trainer) as own:
        if trainer.accelerator.num_processes == 1:
            yield own
            return
        group = trainer.args.vllm_tensor_parallel_size if trainer.use_vllm else 1
        with ShardedSampler(own, group) as sampler:
            if trainer.accelerator.is_main_process:
                yield sampler
            else:
                sampler.serve()
                yield None


@contextmanager
def _own_sampler(trainer: FuraGRPOTrainer) -> Iterator[Any]:
    tokenizer = trainer.processing_class
    if not trainer.use_vllm:
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise FuraError(
                "Benchmarks on a sharded policy need the vLLM engine: set use_vllm, or leave benchmarks out."
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        yield TransformersSampler(model, tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
    elif trainer.vllm_mode == "colocate":
        with trainer.vllm_generation.awake() as llm:
            yield VLLMSampler(llm, tokenizer)
    else:
        raise FuraError("Benchmarks during training need a colocated engine; use `fura-rl eval --server URL` instead.")
