"""`fura-rl plan`: what a run will need of a GPU's memory and of the network, before anything is loaded.

Weights, adapter and optimiser are counted on a model without storage. Activations are what transformers' Llama-like
layers save for the backward pass under bf16 autocast with a frozen base, and what the method adds to it, see
`saved_inputs`. `tests/test_plan.py` compares them with measured peaks. Logits and the engine's overhead are estimates
that no measurement has been compared with yet; the table says so.
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
PLANNED_METHODS = ("fura", "svd", "lora", "oft", "full")


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
            model = base if peft_config is None else get_peft_model(base, peft_config)
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


def saved_inputs(sizes: ModelSizes, method: str | None, rank: int = 32) -> int:
    """Bytes of a token's inputs that a layer of a method saves, beyond what the frozen model saves (None: nothing).

    FuRA saves the input of `q/k/v` and of `gate/up`, full fine-tuning that of `down_proj` too, whose two factors serve
    FuRA's kernels (blocks of at most 256, so not "svd"); that of `o_proj` is saved by attention. PEFT's LoRA casts the
    input in each of the seven projections and saves each copy, and r numbers more; its OFT turns each.
    """
    if method is None:
        return 0
    if method in ("lora", "oft"):
        return 2 * (5 * sizes.hidden + sizes.query + sizes.intermediate + (7 * rank if method == "lora" else 0))
    return 2 * (2 * sizes.hidden + (0 if method == "fura" else sizes.intermediate))


def layer_bytes(sizes: ModelSizes, method: str | None = "fura", rank: int = 32) -> int:
    """Bytes that a layer saves for each token: norms in float32, attention, the MLP, and the method's inputs."""
    norms = 4 * (2 * sizes.hidden + (sizes.query + sizes.key_value if sizes.head_norms else 0))
    attention = 2 * (2 * sizes.query + 2 * sizes.key_value)
    mlp = 2 * 3 * sizes.intermediate
    return norms + attention + mlp + saved_inputs(sizes, method, rank)


def activation_bytes(
    sizes: ModelSizes, tokens: int, *, checkpointing: bool, method: str | None = "fura", rank: int = 32
) -> int:
    """Bytes of activations of one forward and backward pass over `tokens` tokens, without the head."""
    layer = layer_bytes(sizes, method, rank)
    gradients = 2 * 2 * sizes.intermediate  # of gate and up, alive at the same time
    if checkpointing:  # each layer's input, and one layer in full
        return tokens * (2 * sizes.hidden * sizes.layers + layer + gradients)
    return tokens * (layer * sizes.layers + gradients)


def trained_parts(sizes: ModelSizes, weight_bytes: float, method: str, shards: int = 1) -> dict[str, float]:
    """Bytes of the base, and of what is trained with its gradients and AdamW's moments."""
    if method != "full":
        return {
            "base weights": sizes.weights * weight_bytes / shards,
            "adapter, its basis": 4.0 * (sizes.trained + sizes.basis),
            "adapter's gradients, AdamW": 12.0 * sizes.trained,
        }
    parts = {
        "weights": sizes.weights * weight_bytes / shards,
        "gradients, AdamW": 3 * sizes.weights * weight_bytes / shards,
    }
    return parts if weight_bytes == 2 else {**parts, "bf16 copies (autocast)": 2.0 * sizes.weights / shards}


def trainer_parts(
    sizes: ModelSizes,
    training: FuraGRPOConfig,
    weight_bytes: float,
    prompt_tokens: int,
    batch: int,
    shards: int = 1,
    *,
    method: str = "fura",
    rank: int = 32,
) -> dict[str, float]:
    """Bytes by part of the trainer's share of one GPU, for micro-batches of `batch` rollouts."""
    completion = training.max_completion_length or 0
    tokens = batch * (prompt_tokens + completion)
    checkpointing = training.gradient_checkpointing
    largest = sizes.hidden * max(sizes.intermediate, sizes.query)
    return {
        **trained_parts(sizes, weight_bytes, method, shards),
        "activations": float(activation_bytes(sizes, tokens, checkpointing=checkpointing, method=method, rank=rank)),
        "logits (estimate)": float(LOGIT_BYTES * batch * completion * sizes.vocabulary),
        "merge of the largest matrix": 0.0 if method == "full" else 6.0 * largest,  # float32, and in the engine's bf16
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
    if model.dtype == "float32" or (adapter.method == "full" and model.dtype == "auto"):  # as load_model does
        weight_bytes = 4.0
    shards = gpus if shard_weights else 1

    def parts_of(batch: int) -> dict[str, float]:
        return trainer_parts(
            sizes, training, weight_bytes, prompt_tokens, batch, shards, method=adapter.method, rank=adapter.lora_r
        )

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
        if adapter.method == "full" and "adapter" in name:
            continue
        console.print(f"{name}: {size / 2**20:,.0f} MiB")
    console.print(f"largest per_device_train_batch_size that fits: {largest_batch(room, parts_of)}")
    if total > gpu_memory * GIB:
        console.print(
            f"This does not fit into {gpu_memory:g} GiB: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps), set gradient_checkpointing, or lower vllm_gpu_memory_utilization."
        )
        raise typer.Exit(1)
