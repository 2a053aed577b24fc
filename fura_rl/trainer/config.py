"""`FuraGRPOConfig`: TRL's `GRPOConfig` plus what fura-rl adds, with defaults for verifiable rewards on math."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig


@dataclass
class FuraGRPOConfig(GRPOConfig):
    """Configuration of `FuraGRPOTrainer`.

    Every option of TRL's `GRPOConfig` exists here too. Changed defaults: `use_vllm=True` with a colocated engine,
    `vllm_importance_sampling_mode="token_truncate"` (a sequence-level mask drops long completions), `logging_steps=1`,
    `report_to="none"`, `gradient_checkpointing=False` (an adapter this small rarely needs it), no pinned memory (a
    problem has no tensors), a checkpoint every 50 steps of which the newest two stay, and `bf16` autocast only where
    CUDA is available.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "vllm_engine_kwargs", "guards"]  # noqa: RUF012 (TRL's name)

    # Changed defaults of TRL and transformers.
    use_vllm: bool = field(
        default=True,
        metadata={"help": "Generate with vLLM. If it cannot be imported, transformers generates, with a warning."},
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How engine/trainer mismatch is corrected: token_truncate, token_mask, sequence_truncate, "
            "sequence_mask."
        },
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many steps."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the parser reads the type in the middle)
        default="none", metadata={"help": "Trackers to report to, such as trackio, wandb or tensorboard."}
    )
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Look for tensors to pin in every problem; there are none."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass: less memory, more time."}
    )

    save_steps: float = field(default=50, metadata={"help": "Write a checkpoint every this many steps."})
    save_total_limit: int | None = field(
        default=2,
        metadata={"help": "Newest checkpoints to keep, besides the best by metric_for_best_model; 0 keeps all."},
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": "Logged metric whose best checkpoint is kept: eval_<benchmark>_accuracy, reward, ..."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Go on from a checkpoint: its path, or latest (from the start if there is none yet)."},
    )

    # Surviving.
    guards: dict | str | None = field(
        default=None,
        metadata={
            "help": "Changes to the guards against broken runs as a dict or JSON, such as {kl: {above: 5, action: "
            "rollback}, entropy: false}; guards are nonfinite, reward, entropy, length, kl."
        },
    )

    check_memory: bool = field(
        default=True,
        metadata={
            "help": "Refuse a run that `fura-rl plan` puts more than 15% above the GPU's memory; false starts it all "
            "the same."
        },
    )

    # Rollouts.
    vllm_engine_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "Further arguments of vllm.LLM as a dict or JSON, such as {enforce_eager: true}."},
    )
    vllm_sleep_level: int = field(
        default=2,
        metadata={
            "help": "What vllm_enable_sleep_mode does with the engine's weights between generations: 1 moves them to "
            "main memory, 2 drops them."
        },
    )
    vllm_transport: str = field(
        default="merged",
        metadata={
            "help": "How weights reach a vLLM server: merged (TRL's NCCL path, all weights), or adapter (only what is "
            "trained, over HTTP, to a server started by `fura-rl serve BASE --for-training`)."
        },
    )
    vllm_push: str = field(
        default="int8",
        metadata={
            "help": "How vllm_transport: adapter sends what a step has trained: int8 (its change, a quarter of the "
            "bytes, with errors that do not add up), or exact."
        },
    )
    sync_rounding: str = field(
        default="nearest",
        metadata={
            "help": "How merged weights are rounded to the engine's bfloat16: nearest, or stochastic, which keeps "
            "updates below half a spacing on average."
        },
    )
    max_logp_gap: float | None = field(
        default=0.5,
        metadata={
            "help": "Stop when the mean |log-prob difference| between engine and trainer, on fresh rollouts or on the "
            "fixed sequences of a probe, exceeds this; None never stops."
        },
    )
    probe_every: int = field(
        default=1,
        metadata={
            "help": "Compare engine and trainer on a few fixed sequences after a sync, every this many steps; 0 never "
            "does."
        },
    )

    # Prompts and rewards.
    prompt: str = field(
        default="qwen-boxed", metadata={"help": "Prompt template: boxed, qwen-boxed, plain, or a text file."}
    )
    rewards: list[str] = field(
        default_factory=lambda: ["accuracy"],
        metadata={"help": "Reward functions by name, or by import path my_pkg.my_module:my_reward."},
    )
    verifier_workers: int = field(default=2, metadata={"help": "Processes that compare answers."})
    verifier_timeout: float = field(default=5.0, metadata={"help": "Seconds that one comparison may take."})

    # Benchmarks, evaluated on the live engine before, during and after training.
    benchmarks: list[str] = field(
        default_factory=list, metadata={"help": "Benchmarks by name (math500, aime25, ...) or JSONL path."}
    )
    benchmark_data_dir: str | None = field(
        default=None, metadata={"help": "Directory of local benchmark files (math500.jsonl, ...) instead of the hub."}
    )
    benchmark_preset: str = field(default="greedy", metadata={"help": "Sampling preset: greedy, paper, avg32, long."})
    benchmark_steps: int | None = field(
        default=None, metadata={"help": "Evaluate the benchmarks every this many steps as well."}
    )
    benchmark_limit: int | None = field(default=None, metadata={"help": "Use only the first problems of each."})
    benchmark_max_tokens: int | None = field(
        default=None, metadata={"help": "Completion tokens in benchmarks; the preset's number if None."}
    )
    benchmark_temperature: float | None = field(
        default=None, metadata={"help": "Temperature in benchmarks; the preset's if None."}
    )
    benchmark_samples: int | None = field(
        default=None, metadata={"help": "Samples a problem in benchmarks; the preset's number if None."}
    )

    # Files.
    saved_completions: int = field(
        default=8, metadata={"help": "Rollouts of each step that are written to output_dir/completions."}
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end is not supported: metric_for_best_model keeps the best checkpoint, and "
                "summary.json names it."
            )
        if self.bf16 is None:  # type: ignore[has-type]
            self.bf16 = torch.cuda.is_available() and not self.fp16
        super().__post_init__()
