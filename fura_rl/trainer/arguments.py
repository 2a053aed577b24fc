"""Options of `train_grpo` beside the trainer's own: the model, the adapter and the data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or path of a causal LM."})
    model_revision: str = field(default="main", metadata={"help": "Revision on the hub."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Weights' dtype: float32, bfloat16, float16; auto is bfloat16 on CUDA, float32 on CPU."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of transformers, e.g. sdpa."})


@dataclass
class AdapterArguments:
    """The FuRA adapter, see `fura_rl.adapter.FuraConfig`."""

    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Module names to adapt, or all-linear."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Module names to leave alone."})
    block_size: str = field(
        default="closest", metadata={"help": "Block width: closest, head, full, or a number that divides `in`."}
    )
    side: str = field(default="input", metadata={"help": "Which side is adapted: input or output."})
    singular_values: str = field(default="trainable", metadata={"help": "trainable, frozen or merged."})


@dataclass
class DataArguments:
    """The training problems."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a JSONL/Parquet file with problem and answer."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
