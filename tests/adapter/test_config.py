"""What a `FuraConfig` says, and what it refuses."""

import logging
from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from peft.utils import PeftType
from tiny_nets import fura_layers, tiny_llama, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

import fura_rl
from fura_rl.adapter import AdapterError, FuraConfig
from fura_rl.errors import FuraError


def block_sizes(model: nn.Module) -> dict[str, set[int]]:
    """Block sizes by the last part of the layers' names."""
    sizes: dict[str, set[int]] = {}
    for name, layer in fura_layers(model).items():
        sizes.setdefault(name.rsplit(".", 1)[1], set()).add(layer.block_size["default"])
    return sizes


def adapt(model: nn.Module, **options) -> nn.Module:
    return get_peft_model(model, FuraConfig(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"side": "both"},
        {"singular_values": "learned"},
        {"basis": "svf"},
        {"saved_form": "tiny"},
        {"block_size": "half"},
        {"block_size": 0},
        {"block_size": True},
        {"block_size": {"q_proj": -3}},
        {"block_size": {"q_proj": "most"}},
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        {"layers_pattern": "layers"},
    ],
)
def test_contradictions_are_refused_with_a_sentence(options):
    with pytest.raises(AdapterError) as error:
        FuraConfig(**options)
    assert isinstance(error.value, FuraError) and isinstance(error.value, ValueError)
    assert str(error.value).startswith("FuraConfig: ") and str(error.value).endswith(".")


def test_defaults():
    config = FuraConfig()
    assert config.peft_type is PeftType.FURA
    assert (config.side, config.block_size, config.singular_values, config.basis) == (
        "input",
        "closest",
        "trainable",
        "svd",
    )
    assert fura_rl.FuraConfig is FuraConfig


def test_closest_head_full_int_and_dict():
    # hidden 32, MLP 48, 4 heads of 8 (2 for keys and values)
    closest = {"q_proj": {8}, "k_proj": {8}, "v_proj": {8}, "o_proj": {8}, "gate_proj": {8}, "up_proj": {8}}
    assert block_sizes(adapt(tiny_llama(), target_modules="all-linear")) == {**closest, "down_proj": {8}}
    full = block_sizes(adapt(tiny_llama(), target_modules="all-linear", block_size="full"))
    assert full["q_proj"] == {32} and full["k_proj"] == {16} and full["down_proj"] == {24}  # k 16 x 32, down 32 x 48
    assert block_sizes(adapt(tiny_llama(), target_modules=["q_proj"], block_size=4)) == {"q_proj": {4}}
    rules = {"q_proj": 4, r"layers\.1\.mlp\.up_proj": "full", "v_proj": "closest"}
    sizes = block_sizes(adapt(tiny_llama(), target_modules="all-linear", block_size=rules))
    assert sizes["q_proj"] == {4} and sizes["up_proj"] == {8, 32} and sizes["v_proj"] == {8}


def test_head_blocks_follow_the_heads():
    heads_of_24 = dict(hidden_size=64, head_dim=24, num_attention_heads=4, num_key_value_heads=2)
    model = tiny_llama(**heads_of_24)
    inputs = block_sizes(adapt(model, target_modules="all-linear", block_size="head"))
    assert inputs["o_proj"] == {24}  # its input is 4 heads of 24; "closest" would give 12
    assert inputs["q_proj"] == {8}  # its input is the residual stream
    model = tiny_llama(**heads_of_24)
    outputs = block_sizes(adapt(model, target_modules="all-linear", block_size="head", side="output"))
    assert outputs["q_proj"] == outputs["k_proj"] == outputs["v_proj"] == {24}
    assert outputs["o_proj"] == {8}


def test_head_blocks_of_t5_and_gpt2():
    t5 = T5ForConditionalGeneration(T5Config(d_model=32, d_ff=40, d_kv=16, num_layers=1, num_heads=3, vocab_size=50))
    assert block_sizes(adapt(t5, target_modules=["o"], block_size="head")) == {"o": {16}}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=2, n_layer=1, vocab_size=50))
    sizes = block_sizes(adapt(gpt2, target_modules=r".*attn\.c_proj", block_size="head"))
    assert sizes == {"c_proj": {24}}


def test_default_targets_and_all_linear():
    assert set(block_sizes(adapt(tiny_llama()))) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert "lm_head" not in block_sizes(adapt(tiny_llama(), target_modules="all-linear"))
    with pytest.raises(ValueError, match="target_modules"):
        adapt(nn.Sequential(nn.Linear(4, 4)))


def test_layers_to_transform_and_exclude_modules():
    model = adapt(
        tiny_llama(), target_modules=["q_proj", "up_proj"], layers_to_transform=[1], exclude_modules=["up_proj"]
    )
    assert [name.removeprefix("base_model.model.") for name in fura_layers(model)] == [
        "model.layers.1.self_attn.q_proj"
    ]


@pytest.mark.parametrize(
    ("target", "reason"),
    [("embed_tokens", "is an embedding"), ("norm", "is not supported. FuRA multiplies linear layers")],
)
def test_other_layers_are_refused(target, reason):
    with pytest.raises(TypeError, match=reason):
        adapt(tiny_llama(), target_modules=[target])


def test_multihead_attention_is_refused_rather_than_ignored():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(TypeError, match="reads its weight without calling it"):
        adapt(Attention(), target_modules=["out_proj"])


def test_int_that_does_not_divide_is_refused():
    with pytest.raises(AdapterError, match="block_size 5 does not divide the layer's width 32"):
        adapt(tiny_llama(), target_modules=["q_proj"], block_size=5)


def test_round_trip_through_json(tmp_path):
    config = FuraConfig(
        target_modules=["q_proj"], side="output", block_size={"q_proj": 4, "o_proj": "full"}, train_bias=True
    )
    config.save_pretrained(tmp_path)
    assert FuraConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "inference_mode": False}


def test_train_bias_adds_a_difference_to_layers_with_a_bias():
    model = adapt(tiny_llama(attention_bias=True), target_modules=["q_proj", "up_proj"], train_bias=True)
    biases = {name.rsplit(".", 1)[1]: layer.fura_blocks["default"].bias for name, layer in fura_layers(model).items()}
    assert biases["up_proj"] is None and biases["q_proj"].shape == (32,) and not biases["q_proj"].any()
    base_biases = [p for n, p in model.named_parameters() if n.endswith("base_layer.bias")]
    assert base_biases and not any(p.requires_grad for p in base_biases)


def test_modules_to_save_are_trained_in_full():
    model = adapt(tiny_llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head.modules_to_save" in name for name in trained)
    assert {name.rsplit(".", 1)[1] for name in trained if "q_proj" in name} == {"core", "scale"}


@pytest.fixture
def adapter_log(caplog) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO, logger="fura_rl.adapter")
    yield caplog


def test_no_basis_is_computed_for_the_identity(adapter_log):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data.fill_(torch.nan)  # would be refused by the SVD
    adapted = adapt(model, target_modules=["q_proj"], basis="identity")
    assert all(layer.fura_blocks["default"].basis is None for layer in fura_layers(adapted).values())
    with pytest.raises(AdapterError, match="NaN"):
        adapt(tiny_llama_with_nan(), target_modules=["q_proj"])


def tiny_llama_with_nan() -> nn.Module:
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    return model


def test_generate_works():
    model = adapt(tiny_llama()).eval()
    assert model.generate(input_ids=tokens(2, 4), max_new_tokens=3, do_sample=False).shape == (2, 7)
