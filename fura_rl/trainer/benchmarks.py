"""Benchmarks inside a training run: which sampler, and which sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fura_rl.errors import FuraError
from fura_rl.eval import PRESETS, Sampling, TransformersSampler, VLLMSampler

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
    """A sampler on the run's live engine, or on the policy itself where there is no engine."""
    tokenizer = trainer.processing_class
    if not trainer.use_vllm:
        model = trainer.accelerator.unwrap_model(trainer.model)
        yield TransformersSampler(model, tokenizer, batch_size=trainer.args.per_device_eval_batch_size)
    elif trainer.vllm_mode == "colocate":
        with trainer.vllm_generation.awake() as llm:
            yield VLLMSampler(llm, tokenizer)
    else:
        raise FuraError("Benchmarks during training need a colocated engine; use `fura-rl eval --server URL` instead.")
