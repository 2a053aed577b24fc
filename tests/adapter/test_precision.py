"""Trained tensors, basis and singular values stay in float32, whatever happens to the model around them."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_nets import adapted_llama, fura_layers, tiny_llama, tokens

from fura_rl.adapter import FuraConfig


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name, layer in fura_layers(model).items()
        for key, value in layer.fura_blocks.state_dict().items()
    }


def same(before: dict, after: dict) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_is_float32_on_a_low_precision_base(dtype):
    tensors = adapter_tensors(adapted_llama(dtype))
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"core", "scale", "basis", "sigma", "base_sample"}
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16().float(),
        lambda model: model.to("cpu", torch.float16),
    ],
)
def test_casting_the_model_keeps_every_bit_of_the_adapter(cast):
    model = adapted_llama()
    before = {k: v.clone() for k, v in adapter_tensors(model).items()}
    model = cast(model)
    assert same(before, adapter_tensors(model))
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(tmp_path, dtype, low_cpu_mem_usage, autocast_adapter_dtype):
    model = adapted_llama(dtype)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny_llama(dtype),
        tmp_path,
        low_cpu_mem_usage=low_cpu_mem_usage,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    assert same(adapter_tensors(model), adapter_tensors(loaded))
    assert torch.equal(model(tokens()).logits, loaded(tokens()).logits)


def test_float64_base_has_a_float64_adapter():
    model = get_peft_model(tiny_llama(torch.float64), FuraConfig(target_modules="all-linear"))
    assert {value.dtype for name, value in adapter_tensors(model).items() if "sample" not in name} == {torch.float64}


def test_small_steps_are_kept_where_bf16_would_lose_them():
    model = adapted_llama(torch.bfloat16, moved=False)
    blocks = next(iter(fura_layers(model).values())).fura_blocks["default"]
    optimizer = torch.optim.AdamW([blocks.core], lr=1e-5, weight_decay=0.0)
    with torch.no_grad():
        blocks.core.fill_(1.0)  # 2^-9 = 0.002 is half a spacing of bf16 here
    for _ in range(10):
        blocks.core.grad = torch.ones_like(blocks.core)
        optimizer.step()
    torch.testing.assert_close(blocks.core, torch.full_like(blocks.core, 1 - 1e-4), rtol=0, atol=1e-6)


def test_weight_decay_pulls_towards_the_base():
    model = adapted_llama()
    layer = next(iter(fura_layers(model).values()))
    blocks = layer.fura_blocks["default"]
    before = layer.get_delta_weight("default").norm()
    optimizer = torch.optim.AdamW([blocks.core, blocks.scale], lr=0.1, weight_decay=1.0)
    for parameter in (blocks.core, blocks.scale):
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(20):
        optimizer.step()
    assert layer.get_delta_weight("default").norm() < 0.2 * before
