"""Arithmetic of a run's memory and traffic: what a model and its adapter take, by part and by way of spreading them.

Weights, adapter and optimiser are counted, on a model without storage. Activations are what transformers' Llama-like
layers save for the backward pass under bf16 autocast with a frozen base, and what the method adds to it, see
`saved_inputs`. The head's part follows TRL's chunked head. Pure functions; `fura_rl.plan` makes a plan of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from fura_rl.adapter import FuraLayer
from fura_rl.adapter.product_input import can_gate
from fura_rl.errors import FuraError
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.checks import check_target_modules
from fura_rl.trainer.methods import adapter_config

PLANNED_METHODS = ("fura", "svd", "lora", "oft", "full")
PLANNED_MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # whose layers save what `layer_bytes` counts
BF16_COPIES = "bf16 copies (autocast)"
ZERO3_LIVE = 1_000_000_000  # DeepSpeed's default stage3_max_live_parameters
HEAD_ROWS, HEAD_COLUMNS = 4096, 32768  # the tile of logits that TRL 1.16's head computes at a time


@dataclass(frozen=True)
class Strategy:
    """How a run is spread over GPUs.

    Attributes:
        zero: DeepSpeed's ZeRO stage; 0 without DeepSpeed.
        fsdp: Whether FSDP2 splits the parameters.
        offload: Whether what ZeRO splits waits in main memory: the optimiser's part, at stage 3 the parameters too.
        bucket: DeepSpeed's `reduce_bucket_size`, in numbers.
    """

    zero: int = 0
    fsdp: bool = False
    offload: bool = False
    bucket: int = 500_000_000

    @property
    def splits_weights(self) -> bool:
        return self.fsdp or self.zero == 3


# By the names of configs/accelerate/.
STRATEGIES = {
    "single_gpu": Strategy(),
    "ddp": Strategy(),
    "zero1": Strategy(1),
    "zero2": Strategy(2),
    "zero2_offload": Strategy(2, offload=True),
    "zero3": Strategy(3),
    "zero3_offload": Strategy(3, offload=True),
    "fsdp2": Strategy(fsdp=True),
}


@dataclass(frozen=True)
class ModelSizes:
    """What the arithmetic needs to know of a model and its adapter.

    Attributes:
        weights: Parameters of the base.
        trained: Parameters of the adapter that are trained.
        basis: Frozen float32 entries of the adapter.
        layers, hidden, intermediate, query, key_value, vocabulary: Shape of a Llama-like model (widths in features).
        head_norms: Whether queries and keys are normalised, as in Qwen3.
        matrices: (out, in) of each linear layer but the head: what bitsandbytes quantises.
        gated: Whether FuRA's kernels hand the gradient of the MLP's product on to its two factors.
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
    matrices: tuple[tuple[int, int], ...] = ()
    gated: bool = False

    @classmethod
    def of(cls, name: str, adapter: AdapterArguments, revision: str = "main") -> ModelSizes:
        """Sizes of a model by name or path, whose weights are not loaded.

        Raises:
            FuraError: It cannot be read, is not Llama-like, or the method is not one that is planned for.
        """
        if adapter.method not in PLANNED_METHODS:
            raise FuraError(f"plan knows the methods {', '.join(PLANNED_METHODS)}, not {adapter.method!r}.")
        try:
            config = AutoConfig.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise FuraError(f"Cannot read the configuration of {name!r}: {str(error).splitlines()[0]}") from error
        if config.model_type not in PLANNED_MODELS:
            raise FuraError(f"plan knows Llama-like models, and {name} is a {config.model_type}.")
        if getattr(config, "quantization_config", None) is not None:
            raise FuraError(f"plan knows bases that bitsandbytes quantises while loading; {name} is quantised.")
        with torch.device("meta"):
            base = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # `from_config` would split it under ZeRO-3
            check_target_modules(base, adapter)
            weights = sum(p.numel() for p in base.parameters())
            head_norms = any(".q_norm." in key for key, _ in base.named_parameters())
            linear = [(key, m) for key, m in base.named_modules() if isinstance(m, nn.Linear) and key != "lm_head"]
            matrices = tuple((layer.out_features, layer.in_features) for _, layer in linear)
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
            gated=config.hidden_act in ("silu", "swish") and _is_gated(model),
            matrices=matrices,
        )


def _is_gated(model: nn.Module) -> bool:
    """Whether what the adapter's `down_proj` reads is made by layers of its own, and its blocks are not too large."""
    layers = {key: module for key, module in model.named_modules() if isinstance(module, FuraLayer)}
    down = [blocks for key, m in layers.items() if key.endswith("down_proj") for blocks in m.named_blocks(None)]
    return any(layer.is_gate_or_up for layer in layers.values()) and all(
        blocks.is_plain and blocks.side == "input" and can_gate(blocks.block_size) for blocks in down
    )


def base_bytes(sizes: ModelSizes, dtype_bytes: int = 2, quantised_bits: int | None = None) -> int:
    """Bytes of the base's weights; with 4 or 8 bits, those of all matrices but embedding and head are bitsandbytes'.

    NF4 with double quantisation: half a byte a weight, for each 64 of them a byte, for each 256 of these a float32,
    and a layer's tables of 16 and 256 float32 and one offset. int8: a byte a weight and a float32 a row.
    """
    if quantised_bits is None:
        return sizes.weights * dtype_bytes
    rest = sizes.weights - sum(out * width for out, width in sizes.matrices)
    if quantised_bits == 8:
        return rest * dtype_bytes + sum(out * width + 4 * out for out, width in sizes.matrices)
    groups = [-(-out * width // 64) for out, width in sizes.matrices]
    tables = 4 * (16 + 256 + 1) * len(groups)
    halves = sum((out * width + 1) // 2 for out, width in sizes.matrices)
    return rest * dtype_bytes + halves + sum(g + 4 * -(-g // 256) for g in groups) + tables


def saved_inputs(sizes: ModelSizes, method: str | None, rank: int = 32, quantised: bool = False, zero: int = 0) -> int:
    """Bytes of a token's inputs that a layer of a method saves, beyond what the frozen model saves (None: nothing).

    FuRA saves the input of `q/k/v` and of `gate/up`, full fine-tuning that of `down_proj` too, whose two factors serve
    FuRA's kernels (blocks of at most 256, so not "svd"); that of `o_proj` is saved by attention. PEFT's LoRA casts the
    input in each of the seven projections and saves each copy, and r numbers more; its OFT turns each. On a quantised
    base, and under DeepSpeed, PEFT's LoRA does not cast. With ZeRO-3 DeepSpeed's linear layer saves what it is given,
    of frozen weights too: FuRA's seven transformed inputs.
    """
    inputs = 2 * (2 * sizes.hidden + sizes.intermediate)  # of q/k/v, gate/up and down_proj
    each = 2 * (5 * sizes.hidden + sizes.query + sizes.intermediate)  # of all seven
    if method is None:
        return inputs if zero == 3 else 0
    if method == "lora" and (quantised or zero):
        return inputs + 2 * 7 * rank
    if method in ("lora", "oft"):
        return each + (2 * 7 * rank if method == "lora" else 0)
    if method == "full":
        return inputs
    own = 2 * 2 * sizes.hidden if method == "fura" else inputs
    return own + (each if zero == 3 else 0)


def keeps_act(sizes: ModelSizes, method: str | None, zero: int = 0) -> bool:
    """Whether a layer keeps `silu(gate)`. Not where FuRA hands the gradient of `silu(gate) * up` on to `gate` and `up`;
    with ZeRO-3 DeepSpeed puts a function of its own before each layer, so that FuRA does not see that product."""
    return not (sizes.gated and method == "fura") or zero == 3


def layer_bytes(
    sizes: ModelSizes,
    method: str | None = "fura",
    rank: int = 32,
    quantised: bool = False,
    zero: int = 0,
    padded: bool = False,
) -> int:
    """Bytes that a layer saves for each token: norms in float32, attention, the MLP, and the method's inputs.

    Where sequences are padded, transformers repeats keys and values for each query head before torch's attention, which
    saves them so.
    """
    norms = 4 * (2 * sizes.hidden + (sizes.query + sizes.key_value if sizes.head_norms else 0))
    attention = 2 * (2 * sizes.query + 2 * (sizes.query if padded else sizes.key_value))
    mlp = 2 * (3 if keeps_act(sizes, method, zero) else 2) * sizes.intermediate
    return norms + attention + mlp + saved_inputs(sizes, method, rank, quantised, zero)


def activation_bytes(
    sizes: ModelSizes,
    tokens: int,
    *,
    checkpointing: bool,
    method: str | None = "fura",
    rank: int = 32,
    quantised: bool = False,
    zero: int = 0,
    padded: bool = False,
) -> int:
    """Bytes of activations of one forward and backward pass over `tokens` tokens, without the head."""
    layer = layer_bytes(sizes, method, rank, quantised, zero, padded)
    gradients = 2 * 2 * sizes.intermediate  # of gate and up, alive at the same time
    if checkpointing:  # each layer's input, and one layer in full
        return tokens * (2 * sizes.hidden * sizes.layers + layer + gradients)
    return tokens * (layer * sizes.layers + gradients)


def head_bytes(sizes: ModelSizes, tokens: int, *, trained: bool = False) -> int:
    """Bytes of TRL's head for `tokens` tokens that are scored: one bf16 tile of logits, the hidden states, their
    gradient in float32 and in their own dtype, and with a trained head its gradient in float32. No logits are kept."""
    tile = 2 * min(tokens, HEAD_ROWS) * HEAD_COLUMNS
    return tile + 8 * tokens * sizes.hidden + (4 * sizes.vocabulary * sizes.hidden if trained else 0)


def adapter_parts(sizes: ModelSizes, method: str, strategy: Strategy, gpus: int = 1) -> dict[str, float]:
    """Bytes on one GPU of an adapter with its frozen basis, and of its gradients and optimiser.

    FuRA keeps its numbers in float32 wherever it runs; DeepSpeed trains others in bf16. DeepSpeed's AdamW has a
    float32 copy besides the moments.
    """
    a, shards = sizes.trained, gpus
    own = 4 if strategy.zero == 0 or method in ("fura", "svd") else 2
    value = own * a / (shards if strategy.splits_weights else 1)
    gradient = own * a / (shards if strategy.splits_weights or strategy.zero == 2 else 1)
    state = (12 if strategy.zero else 8) * a / (shards if strategy.zero or strategy.fsdp else 1)
    if strategy.offload:
        state, value = 0.0, 0.0 if strategy.zero == 3 else value
    return {"adapter, its basis": value + 4.0 * sizes.basis, "adapter's gradients, AdamW": gradient + state}


def full_parts(sizes: ModelSizes, dtype_bytes: int, strategy: Strategy, gpus: int = 1) -> dict[str, float]:
    """Bytes on one GPU of weights that are all trained, with gradients and optimiser."""
    p = sizes.weights
    if strategy.zero:  # bf16, and AdamW on a float32 copy
        weights = 2 * p / (gpus if strategy.zero == 3 else 1)
        gradients, state = 2 * p / (gpus if strategy.zero >= 2 else 1), 12 * p / gpus
        if strategy.offload:
            state, weights = 0.0, 0.0 if strategy.zero == 3 else weights
        return {"weights": float(weights), "gradients, AdamW": gradients + state}
    shards = gpus if strategy.fsdp else 1
    parts = {"weights": p * dtype_bytes / shards, "gradients, AdamW": 3.0 * p * dtype_bytes / shards}
    copies = dtype_bytes == 4 and not strategy.fsdp  # FSDP2 casts what it gathers
    return {**parts, BF16_COPIES: 2.0 * p} if copies else parts


def gathered_bytes(sizes: ModelSizes, weight_bytes: float, strategy: Strategy) -> float:
    """Bytes of split weights that are whole on a GPU at the same time. FSDP2: two layers (one is fetched ahead), the
    embedding and the head. ZeRO-3 lets go of none before it holds a billion."""
    if not strategy.splits_weights:
        return 0.0
    if strategy.zero == 3:
        return weight_bytes / sizes.weights * min(sizes.weights, ZERO3_LIVE)
    matrices = sum(out * width for out, width in sizes.matrices)
    return weight_bytes / sizes.weights * (2 * matrices / sizes.layers + (sizes.weights - matrices))


def bucket_bytes(strategy: Strategy, method: str = "fura") -> float:
    """Bytes of the buffers in which DeepSpeed collects gradients before it sums them over ranks: one of the gradients'
    dtype, and under ZeRO-3 one of bf16 in any case (both seen in measured peaks)."""
    if not strategy.zero:
        return 0.0
    numbers = 4 if method in ("fura", "svd") else 2
    return float(strategy.bucket * (numbers + (2 if strategy.zero == 3 and numbers == 4 else 0)))


def weight_passes(*, micro_batches: int, engine: bool, reference: bool) -> int:
    """How often a step reads all weights: forward and backward of each micro-batch, and its log-probs where a vLLM
    engine sampled, and those of the reference model."""
    return micro_batches * (2 + engine + reference)


def network_bytes(
    sizes: ModelSizes, weight_bytes: float, strategy: Strategy, gpus: int, passes: int, method: str = "fura"
) -> dict[str, float]:
    """Bytes that one GPU sends in a step, by reason (ring algorithms).

    Args:
        weight_bytes: Of all base weights.
        passes: Times that a step reads all weights, see `weight_passes`.
    """
    ring = (gpus - 1) / gpus
    own = 4 if strategy.zero == 0 or method in ("fura", "svd") else 2
    trained = 2.0 * sizes.weights if method == "full" and (strategy.zero or strategy.fsdp) else own * sizes.trained
    if not strategy.splits_weights:  # all-reduce; under ZeRO a reduce-scatter, and an all-gather of what was updated
        return {"gradients and updates": 2 * ring * trained}
    gathered = trained if method == "full" else weight_bytes + trained
    return {
        "gradients": ring * trained,
        f"weights, gathered {passes} times": passes * ring * gathered,
        "weights, gathered for the sync": ring * gathered,
    }
