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
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the base to NF4 (double quantisation) with bitsandbytes: QFuRA."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to int8 with bitsandbytes."})


@dataclass
class AdapterArguments:
    """The method and its adapter: FuRA's options as in `fura_rl.adapter.FuraConfig`, the others' as in PEFT."""

    method: str = field(
        default="fura",
        metadata={
            "help": "fura; svd (one block a layer); lora, dora, pissa, oft, randlora (PEFT's); full (no adapter)."
        },
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Module names to adapt, or all-linear."}
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Module names to leave alone."})
    block_size: str = field(
        default="closest", metadata={"help": "Block width: closest, aligned, head, full, or a divisor of `in`."}
    )
    side: str = field(default="input", metadata={"help": "Which side is adapted: input or output."})
    singular_values: str = field(default="trainable", metadata={"help": "trainable, frozen or merged."})
    basis: str = field(default="svd", metadata={"help": "svd; identity or random as controls."})
    train_bias: bool = field(default=False, metadata={"help": "Train the biases of adapted layers too."})
    lora_r: int = field(default=32, metadata={"help": "Rank of lora, dora, pissa and randlora."})
    lora_alpha: int = field(default=64, metadata={"help": "Scaling of lora, dora, pissa and randlora."})
    oft_block_size: int = field(default=32, metadata={"help": "Block size of oft."})


@dataclass
class DataArguments:
    """The training problems."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or a JSONL/Parquet file with problem and answer."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
