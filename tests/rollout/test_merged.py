"""The merged stream against PEFT's own merge, and against the base checkpoint's names and shapes."""

import pytest
import torch
from peft import LoraConfig, OFTConfig, RandLoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.rollout import merged_weights
from fura_rl.rollout.merged import cast

SHAPE = dict(
    vocab_size=64, hidden_size=48, intermediate_size=76, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=64,
)  # fmt: skip


def policy(config_class, tied: bool, seed: int = 0):
    """A random model with a FuRA adapter that has moved away from the base."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config_class(**SHAPE, tie_word_embeddings=tied))
    model = get_peft_model(base, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_stream_equals_peft_merge_and_leaves_the_trainer_alone(config_class, tied):
    model = policy(config_class, tied)
    base_names = set(AutoModelForCausalLM.from_config(config_class(**SHAPE, tie_word_embeddings=tied)).state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = [(name, tensor.clone()) for name, tensor in merged_weights(model)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} changed"

    names = [name for name, _ in stream]
    assert len(names) == len(set(names))
    assert set(names) == (base_names - {"lm_head.weight"} if tied else base_names)
    reference = model.merge_and_unload().state_dict()
    for name, tensor in stream:
        assert tensor.dtype == reference[name].dtype
        torch.testing.assert_close(tensor, reference[name], rtol=1e-6, atol=1e-6)


def test_only_adapted_leaves_out_frozen_tensors():
    model = policy(Qwen2Config, tied=True)
    everything = dict(merged_weights(model))
    adapted = dict(merged_weights(model, only_adapted=True))
    assert set(adapted) < set(everything)
    assert "model.embed_tokens.weight" not in adapted
    assert sum("_proj.weight" in name for name in adapted) == 7 * SHAPE["num_hidden_layers"]


def test_order_is_constant_and_dtype_is_cast_once():
    model = policy(Qwen3Config, tied=False)
    first = [name for name, _ in merged_weights(model)]
    exact = dict(merged_weights(model))
    again = list(merged_weights(model, dtype=torch.bfloat16))
    assert [name for name, _ in again] == first
    assert all(torch.equal(tensor, exact[name].to(torch.bfloat16)) for name, tensor in again)


def test_stochastic_rounding_is_right_on_average_and_picks_a_neighbour():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000) * 10 ** torch.linspace(-3, 3, 1000)
    draws = torch.stack([cast(values, torch.bfloat16, generator).double() for _ in range(4000)])
    down = (values.view(torch.int32) & -65536).view(torch.float32).double()  # towards zero
    up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    assert ((draws == down) | (draws == up)).all()
    spacing = (up - down).abs()
    # 4,000 draws of a Bernoulli variable: six standard errors
    assert ((draws.mean(0) - values.double()).abs() / spacing).max() < 6 * 0.5 / 4000**0.5
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf")])
    assert torch.equal(cast(exact, torch.bfloat16, generator).float(), exact)


def test_stochastic_rounding_keeps_updates_that_nearest_rounding_drops():
    model = policy(Qwen3Config, tied=False).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.002)  # the update is far below half a spacing of bfloat16
    base = {n: t.clone() for n, t in model.get_base_model().named_parameters() if "base_layer.weight" in n}
    exact, nearest, stochastic = 0.0, 0.0, 0.0
    random = dict(merged_weights(model, rounding=torch.Generator().manual_seed(0)))
    rounded, truth = dict(merged_weights(model)), dict(merged_weights(model, dtype=torch.float32))
    for name, weight in base.items():
        name, weight = name.replace(".base_layer", ""), weight.double()
        update = truth[name].double() - weight
        exact += float((update * update).sum())
        nearest += float(((rounded[name].double() - weight) * update).sum())
        stochastic += float(((random[name].double() - weight) * update).sum())
    assert abs(nearest / exact) < 0.5
    assert stochastic / exact == pytest.approx(1, abs=0.2)


OTHER_METHODS = {
    "lora": LoraConfig(r=4, target_modules="all-linear"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "pissa": LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear"),
    "oft": OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "randlora": RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear"),
}


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_other_adapters_of_peft_are_streamed_as_peft_merges_them(method):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    names = set(base.state_dict()) - {"lm_head.weight"}
    model = get_peft_model(base, OTHER_METHODS[method])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = {name: tensor.clone() for name, tensor in merged_weights(model)}
    assert set(stream) == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    reference = model.merge_and_unload().state_dict()
    moved = 0
    for name, tensor in stream.items():
        assert torch.equal(tensor, reference[name])
        moved += not torch.equal(
            tensor, before.get(f"base_model.model.{name}".replace(".weight", ".base_layer.weight"), tensor)
        )
    assert moved == 7 * SHAPE["num_hidden_layers"]


def test_a_plain_model_is_streamed_as_it_is():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    stream = dict(merged_weights(model))
    assert set(stream) == set(model.state_dict()) - {"lm_head.weight"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stream.items())
