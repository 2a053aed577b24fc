"""A FuRA layer: identity at the start, exact when off, merges that can be undone."""

import pytest
import torch
from peft import get_peft_model
from tiny_nets import adapted_llama, base_weights, fura_layers, perturb, tiny_llama, tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from fura_rl.adapter import FuraConfig, FuraLayer

OPTIONS = {
    "default": {},
    "output": {"side": "output"},
    "frozen": {"singular_values": "frozen"},
    "merged": {"singular_values": "merged"},
    "output-merged": {"side": "output", "singular_values": "merged"},
    "full": {"block_size": "full"},
    "head": {"block_size": "head"},
    "identity": {"basis": "identity"},
    "random": {"basis": "random"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_the_base_bit_for_bit_at_the_start_and_when_off(options, dtype):
    base = tiny_llama(dtype)
    expected = base(tokens()).logits.detach()
    model = get_peft_model(base, FuraConfig(target_modules="all-linear", **options)).eval()
    assert torch.equal(model(tokens()).logits, expected)
    perturb(model)
    assert not torch.equal(model(tokens()).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, expected)


def test_start_is_exact_under_autocast():
    base = tiny_llama()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = base(tokens()).logits.detach()
        model = get_peft_model(base, FuraConfig(target_modules="all-linear")).eval()
        assert torch.equal(model(tokens()).logits, expected)
        perturb(model)
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_merge_equals_forward(options):
    model = adapted_llama(**options)
    expected = model(tokens()).logits.detach()
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_cycles_of_merge_and_unmerge_restore_every_bit(dtype):
    model = adapted_llama(dtype)
    before = base_weights(model)
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    after = base_weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_does_change_the_weight_and_disabling_unmerges():
    model = adapted_llama()
    before = base_weights(model)
    off = None
    with model.disable_adapter():
        off = model(tokens()).logits.detach()
    model.merge_adapter()
    merged = base_weights(model)
    changed = [name for name in before if not torch.equal(before[name], merged[name])]
    assert len(changed) == len(fura_layers(model)) == 14
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, off)


def test_merge_leaves_a_tied_embedding_alone():
    base = tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(base, FuraConfig(target_modules=["lm_head"])).eval()
    perturb(model)
    embedding = model.get_input_embeddings().weight.detach().clone()
    expected = model(tokens()).logits.detach()
    model.merge_adapter()
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_safe_merge_refuses_nan_and_leaves_the_base():
    model = adapted_llama()
    before = base_weights(model)
    layer = next(iter(fura_layers(model).values()))
    layer.fura_blocks["default"].core.data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not layer.merged
    model.base_model.unload()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def make_layer(kind: str, **options) -> FuraLayer:
    torch.manual_seed(0)
    base = nn.Linear(12, 20) if kind == "linear" else Conv1D(20, 12)
    nn.init.normal_(base.bias)
    layer = FuraLayer(base, "default", FuraConfig(**options))
    perturb(layer, 0.3)
    return layer


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_merged_weight_is_a_temporary_in_the_layout_of_the_layer(kind, side):
    layer = make_layer(kind, side=side, train_bias=True)
    weight = layer.base_layer.weight.detach().clone()
    merged, bias = layer.merged_weight(), layer.merged_bias()
    assert merged.shape == weight.shape
    assert torch.equal(layer.base_layer.weight, weight)
    merged.zero_()
    assert torch.equal(layer.base_layer.weight, weight)

    merged = layer.merged_weight()
    x = torch.randn(3, 12)
    plain = torch.nn.functional.linear(x, merged if kind == "linear" else merged.T, bias)
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.merged_weight(), merged)  # read from the unmerged weight


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_of_the_merged_weight(kind, side):
    layer = make_layer(kind, side=side)
    rows = slice(3, 9)
    full = layer.merged_weight()
    part = layer.merged_weight(rows=rows)
    torch.testing.assert_close(part, full[rows] if kind == "linear" else full[:, rows])


def test_merged_weight_without_adapters_is_a_copy():
    layer = make_layer("linear")
    plain = layer.merged_weight([])
    assert torch.equal(plain, layer.base_layer.weight)
    assert plain.data_ptr() != layer.base_layer.weight.data_ptr()
    assert torch.equal(layer.merged_weight(["unknown"]), plain)


def test_merged_bias():
    layer = make_layer("linear", train_bias=True)
    expected = layer.base_layer.bias + layer.fura_blocks["default"].bias
    torch.testing.assert_close(layer.merged_bias(), expected.detach())
    assert FuraLayer(nn.Linear(4, 4, bias=False), "default", FuraConfig(train_bias=True)).merged_bias() is None


def test_block_size_is_shrunk_to_what_the_weight_can_carry(caplog):
    caplog.set_level("INFO", logger="fura_rl.adapter")
    layer = FuraLayer(nn.Linear(20, 2), "default", FuraConfig(), name="score")
    assert layer.block_size == {"default": 2}
    assert "score: blocks of 5 do not fit a 2 x 20 weight; using 2." in caplog.text


def test_null_directions_are_reported(caplog):
    caplog.set_level("INFO", logger="fura_rl.adapter")
    linear = nn.Linear(12, 20)
    linear.weight.data[:, :4] = 0
    FuraLayer(linear, "default", FuraConfig(), name="dead")
    assert "dead: 4 of 12 directions carry (almost) no weight" in caplog.text


def test_delta_is_differentiable_and_float32_for_a_bf16_base():
    layer = FuraLayer(nn.Linear(12, 20, dtype=torch.bfloat16), "default", FuraConfig())
    delta = layer.delta("default")
    assert delta.dtype == torch.float32 and delta.shape == (3, 4, 4) and not delta.any()
    delta.sum().backward()
    assert layer.fura_blocks["default"].core.grad.abs().sum() > 0
