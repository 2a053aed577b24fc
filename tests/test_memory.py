"""The arithmetic of a plan against counted tensors, TRL's head, and peaks measured on an H100 (docs/performance.md)."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

from fura_rl.errors import FuraError
from fura_rl.memory import (
    HEAD_COLUMNS,
    HEAD_ROWS,
    STRATEGIES,
    ModelSizes,
    Strategy,
    activation_bytes,
    adapter_parts,
    base_bytes,
    bucket_bytes,
    full_parts,
    gathered_bytes,
    head_bytes,
    layer_bytes,
    network_bytes,
    weight_passes,
)
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import adapter_config

GIB = 2**30
ONE = STRATEGIES["single_gpu"]


def layers_of(count, hidden, intermediate, query, key_value, *, head_norms, trained=0, basis=0):
    """Decoder layers without embedding and head, as docs/performance.md measured them."""
    layer = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
    layer += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    weights = count * sum(out * width for out, width in layer)
    return ModelSizes(
        weights, trained, basis, count, hidden, intermediate, query, key_value, 0, head_norms, tuple(layer * count)
    )


QWEN3_1_7B = layers_of(28, 2048, 6144, 2048, 1024, head_norms=True)
QWEN2_5_7B = layers_of(28, 3584, 18944, 3584, 512, head_norms=True)  # the benchmark's layers are Qwen3's in this shape
FURA_LAYER = {"1.7b": 39_051_264 // 28, "7b": 118_171_648 // 28}
ALIGNED_LAYER = {"7b": 30_732_288 // 8}  # blocks of 128 in down_proj instead of 148
LORA_LAYER = {"1.7b": 34_865_152 // 28, "7b": 32 * (4 * 3584 + 2 * 512 + 2 * 3584 + 3 * (3584 + 18944))}


def measured(size, layers, method, *, tokens=16_384, checkpointing=False, bits=None, zero=0, gated=None):
    """The arithmetic's GiB for a run of benchmarks/train_step.py or benchmarks/quantized.py."""
    whole = {"1.7b": QWEN3_1_7B, "7b": QWEN2_5_7B}[size]
    gated = size == "1.7b" if gated is None else gated  # blocks of 148 are too large
    blocks = ALIGNED_LAYER if size == "7b" and gated else FURA_LAYER
    trained = layers * {"fura": blocks, "lora": LORA_LAYER, "oft": {"1.7b": 7_999_488 // 28}}.get(method, {}).get(
        size, 0
    )
    sizes = replace(
        whole, weights=whole.weights * layers // 28, layers=layers, trained=trained,
        basis=trained if method == "fura" else 0, gated=gated, matrices=whole.matrices[: 7 * layers],
    )  # fmt: skip
    total = activation_bytes(
        sizes, tokens, checkpointing=checkpointing, method=method, quantised=bits is not None, zero=zero
    )
    if method == "full":
        return (total + sum(full_parts(sizes, 2, ONE).values())) / GIB
    strategy = Strategy(zero)
    total += bucket_bytes(strategy, method) if method else 0
    return (total + base_bytes(sizes, 2, bits) + sum(adapter_parts(sizes, method or "fura", strategy).values())) / GIB


@pytest.mark.parametrize(
    ("size", "layers", "method", "options", "gib"),
    [
        ("1.7b", 28, None, {}, 36.79),
        ("1.7b", 28, "fura", {}, 35.57),
        ("1.7b", 28, "lora", {}, 53.16),
        ("1.7b", 28, "oft", {}, 53.38),
        ("1.7b", 28, "full", {}, 56.76),
        ("1.7b", 28, None, {"checkpointing": True}, 6.22),
        ("1.7b", 28, "fura", {"checkpointing": True}, 6.81),
        ("1.7b", 28, "lora", {"checkpointing": True}, 7.40),
        ("1.7b", 28, "fura", {"checkpointing": True, "tokens": 32_768}, 10.37),
        ("1.7b", 8, "fura", {"tokens": 32_768}, 20.39),
        ("1.7b", 8, "lora", {"tokens": 32_768}, 30.66),
        ("7b", 8, "fura", {}, 28.97),
        ("7b", 8, "fura", {"gated": True}, 24.36),
        ("7b", 8, "lora", {}, 37.28),
        ("1.7b", 16, "fura", {"bits": 4}, 19.52),
        ("1.7b", 16, "lora", {"bits": 4}, 25.49),
        ("7b", 6, "fura", {"bits": 4}, 20.20),
        ("7b", 6, "fura", {"bits": 4, "gated": True}, 16.75),
        ("7b", 6, "lora", {"bits": 4}, 22.98),
        ("1.7b", 8, "fura", {"zero": 2}, 12.08),
        ("1.7b", 8, "lora", {"zero": 2}, 14.26),
        ("1.7b", 8, None, {"zero": 3}, 13.62),
        ("1.7b", 8, "fura", {"zero": 3}, 19.17),
        ("1.7b", 8, "lora", {"zero": 3}, 14.59),
    ],
)
def test_peaks_are_within_ten_percent_of_the_measured_ones(size, layers, method, options, gib):
    assert measured(size, layers, method, **options) == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("strategy", "gpus", "prompt", "gib"),
    [("ddp", 1, 194, 14.01), ("ddp", 2, 173, 13.48), ("zero2", 2, 173, 14.84), ("fsdp2", 2, 173, 13.18)],
)
def test_peaks_of_a_grpo_step_are_within_five_percent(strategy, gpus, prompt, gib):
    """Qwen2.5-Coder-0.5B, 32 rollouts of at most 256 tokens, without the engine (docs/scaling.md)."""
    shape = [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)]
    sizes = ModelSizes(
        494_032_768, 13_246_464, 13_246_464, 24, 896, 4864, 896, 128, 151_936, False, tuple(shape * 24), gated=True
    )  # fmt: skip
    strategy = STRATEGIES[strategy]
    weights = base_bytes(sizes, 2) / (gpus if strategy.splits_weights else 1)
    parts = [weights, *adapter_parts(sizes, "fura", strategy, gpus).values(), bucket_bytes(strategy)]
    parts += [gathered_bytes(sizes, base_bytes(sizes, 2), strategy), head_bytes(sizes, 32 * 256)]
    parts += [activation_bytes(sizes, 32 * (prompt + 256), checkpointing=False, padded=True)]
    assert sum(parts) / GIB == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_frozen_layer_saves_is_counted(padded):
    config = AutoConfig.for_model(
        "qwen2", vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.model.requires_grad_(False)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1
    inputs = torch.randn(2, 40, 64, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(inputs_embeds=inputs, attention_mask=mask)
    # one row for each token, not the weights, nor what a row has but one number of, nor the norm after the last layer
    numbers = {t.untyped_storage().data_ptr(): t for t in saved if t.shape[0] == 2 and t.numel() > 2 * 40 * 8}
    sizes = layers_of(1, 64, 128, 64, 16, head_norms=False)
    assert sum(t.nbytes for t in numbers.values() if t.shape != (2, 1, 40, 40)) - 2 * 40 * 64 * 4 == 2 * 40 * (
        layer_bytes(sizes, None, padded=padded)
    )


def adapted(tiny_model, method, dtype=torch.float32):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    config = adapter_config(AdapterArguments(method=method))
    return base, base if config is None else get_peft_model(base, config)


def test_sizes_are_those_of_the_model(tiny_model):
    sizes = ModelSizes.of(str(tiny_model), AdapterArguments())
    assert sizes.trained == 129_024
    assert (sizes.layers, sizes.hidden, sizes.intermediate, sizes.query, sizes.key_value) == (3, 256, 512, 256, 128)
    assert sizes.head_norms and len(sizes.matrices) == 3 * 7


@pytest.mark.parametrize(
    ("options", "gated"),
    [
        ({}, True),
        ({"block_size": "128"}, True),
        ({"block_size": "256"}, False),
        ({"side": "output"}, False),
        ({"basis": "identity", "singular_values": "frozen"}, False),
        ({"target_modules": ["q_proj", "down_proj"]}, False),
        ({"target_modules": ["gate_proj", "up_proj"]}, False),
        ({"method": "lora"}, False),
    ],
)
def test_whose_gradient_goes_to_gate_and_up(tiny_model, options, gated):
    assert ModelSizes.of(str(tiny_model), AdapterArguments(**options)).gated == gated


@pytest.mark.parametrize("method", ["fura", "svd", "lora", "oft", "full"])
def test_bytes_of_parameters_gradients_and_optimiser_are_the_real_ones(tiny_model, method):
    base, model = adapted(tiny_model, method, torch.bfloat16 if method != "full" else torch.float32)
    weights = sum(p.nbytes for p in base.parameters() if method == "full" or not p.requires_grad)
    trained = [p for p in model.parameters() if p.requires_grad]
    buffers = sum(b.nbytes for name, b in model.named_buffers() if ".fura_" in name)
    optimizer = torch.optim.AdamW(trained)
    ids = torch.arange(8).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    state = sum(s[name].nbytes for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    state += sum(p.grad.nbytes for p in trained)

    sizes = ModelSizes.of(str(tiny_model), AdapterArguments(method=method))
    if method == "full":
        parts = full_parts(sizes, 4, ONE)
        assert parts["weights"] == weights and parts["gradients, AdamW"] == state
    else:
        parts = adapter_parts(sizes, method, ONE)
        assert base_bytes(sizes) == weights
        assert parts["adapter, its basis"] == sum(p.nbytes for p in trained) + buffers
        assert parts["adapter's gradients, AdamW"] == state


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_of_a_quantised_base_are_the_real_ones(tiny_model, bits):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16, quantization_config=config)

    def stored(parameter):
        state = getattr(parameter, "quant_state", None)
        if state is None:
            rows = getattr(parameter, "SCB", None)
            return parameter.nbytes + (0 if rows is None else rows.nbytes)
        inner = state.state2
        return parameter.nbytes + sum(
            t.nbytes for t in (state.absmax, state.code, state.offset, inner.absmax, inner.code)
        )

    sizes = ModelSizes.of(str(tiny_model), AdapterArguments())
    assert base_bytes(sizes, 2, bits) == sum(stored(p) for p in model.parameters())


def test_a_large_model_is_counted_without_storage(tmp_path):
    """Qwen2.5-7B's published number of parameters, and the trained ones of docs/scale.md."""
    Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152_064, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    sizes = ModelSizes.of(str(tmp_path), AdapterArguments())
    assert sizes.weights == 7_615_616_512
    assert round(sizes.trained / 1e6) == round(sizes.basis / 1e6) == 118
    assert base_bytes(sizes, 2, 4) < 0.37 * base_bytes(sizes)  # embedding and head stay in bf16


def test_the_head_is_computed_in_tiles_of_trls_size():
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    assert (HEAD_ROWS, HEAD_COLUMNS) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
    few, many = head_bytes(QWEN3_1_7B, 4096), head_bytes(QWEN3_1_7B, 65_536)
    assert few == 2**28 + 8 * 4096 * 2048 and many - few == 8 * (65_536 - 4096) * 2048


def test_what_each_strategy_splits():
    sizes = replace(QWEN3_1_7B, trained=1_000, basis=1_000)

    def bytes_a_parameter(name, method="fura"):
        value, state = adapter_parts(sizes, method, STRATEGIES[name], 4).values()
        return value / 1_000, state / 1_000

    assert bytes_a_parameter("ddp") == (8, 12)
    assert bytes_a_parameter("zero1") == (8, 4 + 12 / 4)
    assert bytes_a_parameter("zero2") == (8, 16 / 4)
    assert bytes_a_parameter("zero2_offload") == (8, 4 / 4)
    assert bytes_a_parameter("zero3") == (4 + 4 / 4, 16 / 4)
    assert bytes_a_parameter("zero3_offload") == (4, 4 / 4)
    assert bytes_a_parameter("fsdp2") == (4 + 4 / 4, 12 / 4)
    assert bytes_a_parameter("zero1", "lora") == (2 + 4, 2 + 12 / 4)
    assert gathered_bytes(sizes, 2.0 * sizes.weights, Strategy()) == 0
    assert gathered_bytes(sizes, 2.0 * sizes.weights, Strategy(fsdp=True)) == 2 * 2 * sizes.weights / 28
    assert gathered_bytes(sizes, 2.0 * sizes.weights, Strategy(3)) == 2e9
    assert bucket_bytes(STRATEGIES["zero2"]) == 2e9 and bucket_bytes(STRATEGIES["ddp"]) == 0


def test_full_finetuning_needs_sixteen_bytes_a_weight_and_its_bf16_copy():
    weights = QWEN3_1_7B.weights
    assert sum(full_parts(QWEN3_1_7B, 4, ONE).values()) == 18 * weights
    assert sum(full_parts(QWEN3_1_7B, 4, Strategy(1), 8).values()) == (2 + 2 + 12 / 8) * weights
    assert sum(full_parts(QWEN3_1_7B, 4, Strategy(2), 8).values()) == (2 + 14 / 8) * weights
    assert sum(full_parts(QWEN3_1_7B, 4, Strategy(3), 8).values()) == 2 * weights
    assert sum(full_parts(QWEN3_1_7B, 4, Strategy(fsdp=True), 8).values()) == 2 * weights


def test_network_of_a_step():
    sizes = replace(QWEN3_1_7B, trained=39_051_264)
    weights = 2.0 * sizes.weights
    assert network_bytes(sizes, weights, ONE, 1, 3) == {"gradients and updates": 0}
    for name in ("ddp", "zero1", "zero2"):
        (sent,) = network_bytes(sizes, weights, STRATEGIES[name], 4, 3).values()
        assert sent == 4 * 39_051_264 * 1.5
    passes = weight_passes(micro_batches=8, engine=True, reference=False)
    assert passes == 24
    split = network_bytes(sizes, weights, Strategy(3), 4, passes)
    assert split["gradients"] == 4 * 39_051_264 * 0.75
    assert split["weights, gathered 24 times"] == 24 * 0.75 * (weights + 4 * 39_051_264)
    fsdp = Strategy(fsdp=True)  # an adapter's gradients are summed in float32, those of all weights in bf16
    assert network_bytes(sizes, weights, fsdp, 4, passes) == split
    assert network_bytes(sizes, weights, fsdp, 4, passes, "full")["gradients"] == 2 * sizes.weights * 0.75
    quantised = network_bytes(sizes, base_bytes(sizes, 2, 4), fsdp, 4, passes)
    assert sum(quantised.values()) < 0.4 * sum(split.values())


def test_what_is_not_planned_for_is_said(tiny_model, tmp_path):
    with pytest.raises(FuraError, match="plan knows the methods fura, svd, lora, oft, full, not 'dora'"):
        ModelSizes.of(str(tiny_model), AdapterArguments(method="dora"))
    with pytest.raises(FuraError, match="Cannot read the configuration of"):
        ModelSizes.of("/no/such/model", AdapterArguments())
    with pytest.raises(FuraError, match="no linear module 'qproj'"):
        ModelSizes.of(str(tiny_model), AdapterArguments(target_modules=["qproj"]))
    AutoConfig.for_model("gpt2", n_layer=1, n_embd=32, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(FuraError, match=r"plan knows Llama-like models, and .* is a gpt2"):
        ModelSizes.of(str(tmp_path), AdapterArguments())
