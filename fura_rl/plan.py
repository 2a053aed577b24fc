"""`fura-rl plan`: what a run will need of a GPU's memory and of the network, before anything is loaded.

Weights, adapter and optimiser are counted on a model without storage. Activations are what transformers' Llama-like
layers save for the backward pass under bf16 autocast with a frozen base (design of the adapter: only the input of each
adapted product comes on top). `tests/test_plan.py` compares them with measured peaks. Logits and the engine's
overhead are estimates that no measurement has been compared with yet; the table says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from fura_rl.errors import FuraError
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.config import FuraGRPOConfig
from fura_rl.trainer.methods import adapter_config

GIB = 2**30
LOGIT_BYTES = 10  # bf16 logits, scaled, log-softmax, and two gradients
CONTEXT_BYTES = 1.0 * GIB  # CUDA context and the allocator's slack
PLANNED_METHODS = ("fura", "svd")


@dataclass(frozen=True)
class ModelSizes:
    """What the arithmetic needs to know of a model and its adapter.

    Attributes:
        weights: Parameters of the base.
        trained: Parameters of the adapter that are trained, in float32.
        basis: Frozen float32 entries of the adapter.
        layers, hidden, intermediate, query, key_value, vocabulary: Shape of a Llama-like model (widths in features).
        head_norms: Whether queries and keys are normalised, as in Qwen3.
    """

    weights: int
    trained: int
    basis: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    vocabulary: int
    head_norms: bool

    @classmethod
    def of(cls, name: str, adapter: AdapterArguments) -> ModelSizes:
        """Sizes of a model by name or path, whose weights are not loaded.

        Raises:
            FuraError: It is not Llama-like, or the method is not one that is planned for.
        """
        if adapter.method not in PLANNED_METHODS:
            raise FuraError(f"plan knows the methods {', '.join(PLANNED_METHODS)}, not {adapter.method!r}.")
        try:
            config = AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise FuraError(f"Cannot read the configuration of {name!r}: {str(error).splitlines()[0]}") from error
        if not hasattr(config, "intermediate_size") or not hasattr(config, "num_key_value_heads"):
            raise FuraError(f"plan knows Llama-like models, and {name} is a {config.model_type}.")
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
            weights = sum(p.numel() for p in base.parameters())
            head_norms = any(".q_norm." in key for key, _ in base.named_parameters())
            peft_config = adapter_config(adapter)
            assert peft_config is not None
            model = get_peft_model(base, peft_config)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            weights=weights,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            basis=sum(b.numel() for key, b in model.named_buffers() if ".fura_" in key),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=config.num_attention_heads * head,
            key_value=config.num_key_value_heads * head,
            vocabulary=config.vocab_size,
            head_norms=head_norms,
        )


def layer_bytes(sizes: ModelSizes, adapted: bool = True) -> int:
    """Bytes that a layer saves for each token: norms in float32, attention, the MLP, and the adapter's inputs."""
    norms = 4 * (2 * sizes.hidden + (sizes.query + sizes.key_value if sizes.head_norms else 0))
    attention = 2 * (2 * sizes.query + 2 * sizes.key_value)
    mlp = 2 * 3 * sizes.intermediate
    inputs = 2 * (2 * sizes.hidden + sizes.intermediate) if adapted else 0  # q/k/v share one, gate/up another
    return norms + attention + mlp + inputs


def activation_bytes(sizes: ModelSizes, tokens: int, *, checkpointing: bool, adapted: bool = True) -> int:
    """Bytes of activations of one forward and backward pass over `tokens` tokens, without the head."""
    layer = layer_bytes(sizes, adapted)
    gradients = 2 * 2 * sizes.intermediate  # of gate and up, alive at the same time
    if checkpointing:  # each layer's input, and one layer in full
        return tokens * (2 * sizes.hidden * sizes.layers + layer + gradients)
    return tokens * (layer * sizes.layers + gradients)


def trainer_parts(
    sizes: ModelSizes, training: FuraGRPOConfig, weight_bytes: float, prompt_tokens: int, batch: int, shards: int = 1
) -> dict[str, float]:
    """Bytes by part of the trainer's share of one GPU, for micro-batches of `batch` rollouts."""
    completion = training.max_completion_length or 0
    tokens = batch * (prompt_tokens + completion)
    return {
        "base weights": sizes.weights * weight_bytes / shards,
        "adapter, its basis": 4.0 * (sizes.trained + sizes.basis),
        "adapter's gradients, AdamW": 12.0 * sizes.trained,
        "activations": float(activation_bytes(sizes, tokens, checkpointing=training.gradient_checkpointing)),
        "logits (estimate)": float(LOGIT_BYTES * batch * completion * sizes.vocabulary),
        "CUDA context (estimate)": CONTEXT_BYTES,
    }


def largest_batch(room: float, parts_of: Any) -> int:
    """The largest number of rollouts in a micro-batch whose parts fit into `room` bytes; 0 if not even one does."""
    batch = 0
    while batch < 4096 and sum(parts_of(batch + 1).values()) <= room:
        batch += 1
    return batch


def network_bytes(sizes: ModelSizes, gpus: int) -> dict[str, float]:
    """Bytes that a GPU sends in an optimiser step, and what a sync sends to a rollout server."""
    return {
        "gradients, a GPU (ring all-reduce)": 4.0 * sizes.trained * 2 * (gpus - 1) / gpus,
        "sync to a server, merged": 2.0 * sizes.weights,
        "sync to a server, adapter only": 4.0 * sizes.trained,
    }


def plan_command(
    context: typer.Context,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of one, in GiB.")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(help="Length of a prompt.")] = 256,
    shard_weights: Annotated[bool, typer.Option(help="Base weights split over the GPUs (ZeRO-3, FSDP2).")] = False,
) -> None:
    """Memory by part, bytes over the network and the largest batch that fits: --config RECIPE [--option value ...].

    Exit status 1 if the recipe does not fit.
    """
    from fura_rl.train_grpo import parse

    _, training, model, adapter = parse(context.args)
    assert model.model_name_or_path is not None  # checked by parse
    sizes = ModelSizes.of(model.model_name_or_path, adapter)
    weight_bytes = 0.55 if model.load_in_4bit else 1.0 if model.load_in_8bit else 2.0  # NF4 with its scales: 4.4 bits
    shards = gpus if shard_weights else 1

    def parts_of(batch: int) -> dict[str, float]:
        return trainer_parts(sizes, training, weight_bytes, prompt_tokens, batch, shards)

    colocated = training.use_vllm and training.vllm_mode == "colocate"
    engine = training.vllm_gpu_memory_utilization * gpu_memory * GIB if colocated else 0.0
    parts = {**parts_of(training.per_device_train_batch_size), "engine (its share of the GPU)": engine}
    total, room = sum(parts.values()), gpu_memory * GIB - engine
    console = Console()
    table = Table("part", "GiB")
    for name, size in [*parts.items(), ("total", total)]:
        table.add_row(name, f"{size / GIB:.2f}")
    console.print(table)
    if colocated:
        cache = engine - 2.0 * sizes.weights / training.vllm_tensor_parallel_size
        token = 4 * sizes.layers * sizes.key_value
        console.print(
            f"of the engine's share, weights leave {cache / GIB:.1f} GiB: {cache / token:,.0f} tokens of cache"
        )
    for name, size in network_bytes(sizes, gpus).items():
        console.print(f"{name}: {size / 2**20:,.0f} MiB")
    console.print(f"largest per_device_train_batch_size that fits: {largest_batch(room, parts_of)}")
    if total > gpu_memory * GIB:
        console.print(
            f"This does not fit into {gpu_memory:g} GiB: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps), set gradient_checkpointing, or lower vllm_gpu_memory_utilization."
        )
        raise typer.Exit(1)
