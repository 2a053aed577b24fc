"""Several adapters on one model: switching, deleting, two at once, one per row, combined, converted."""

import pytest
import torch
from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict
from tiny_nets import fura_layers, perturb, tiny_llama, tokens

from fura_rl.adapter import AdapterError, FuraConfig


def two_adapters(first: dict | None = None, second: dict | None = None, dtype=torch.float64):
    base = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
    model = get_peft_model(tiny_llama(dtype), FuraConfig(**base, **(first or {})), adapter_name="one")
    model.add_adapter("two", FuraConfig(**base, **(second or {})))
    perturb(model, 0.1)
    return model.eval()


def logits(model, **kwargs):
    return model(tokens(), **kwargs).logits.detach()


def activate(model, names):
    model.base_model.set_adapter(names)


def test_switching_and_deleting():
    model = two_adapters()
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    assert not torch.allclose(one, two)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert torch.equal(logits(model), two)
    for layer in fura_layers(model).values():
        assert list(layer.fura_blocks) == ["two"] and list(layer.block_size) == ["two"]


def test_all_linear_finds_the_same_layers_for_a_second_adapter():
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules="all-linear"), adapter_name="one")
    model.add_adapter("two", FuraConfig(target_modules="all-linear"))
    assert model.peft_config["one"].target_modules == model.peft_config["two"].target_modules
    assert all(set(layer.fura_blocks) == {"one", "two"} for layer in fura_layers(model).values())


def test_only_the_active_adapter_is_trained():
    model = two_adapters()
    model.set_adapter("two")
    trained = {name.rsplit(".", 2)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"two"}


@pytest.mark.parametrize("second", [{}, {"side": "output"}, {"block_size": "full"}, {"basis": "identity"}])
@pytest.mark.parametrize("first", [{}, {"side": "output", "train_bias": True}])
@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
def test_two_active_adapters_are_two_sequential_merges(first, second, order):
    model = two_adapters(first, second)
    activate(model, order)
    together = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), together)
    model.unmerge_adapter()
    for name in order:  # one after the other, each on what is there
        model.merge_adapter([name])
    torch.testing.assert_close(logits(model), together)
    activate(model, "one")
    model.unmerge_adapter()
    assert not torch.allclose(logits(model), together)


def test_order_of_two_adapters_matters():
    model = two_adapters()
    activate(model, ["one", "two"])
    first = logits(model)
    activate(model, ["two", "one"])
    assert not torch.allclose(logits(model), first)


def test_an_adapter_added_to_a_merged_model_reads_the_unmerged_weight():
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"]), adapter_name="one")
    perturb(model, 0.3)
    model.merge_adapter()
    model.add_adapter("two", FuraConfig(target_modules=["q_proj"], block_size=4))
    fresh = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"], block_size=4), adapter_name="two")
    for merged, plain in zip(fura_layers(model).values(), fura_layers(fresh).values(), strict=True):
        assert torch.equal(merged.fura_blocks["two"].basis, plain.fura_blocks["two"].basis)
        assert torch.equal(merged.fura_blocks["two"].sigma, plain.fura_blocks["two"].sigma)


def test_one_adapter_per_row():
    model = two_adapters({"train_bias": True}, {"side": "output"})
    names = ["__base__", "one", "two", "one"]
    rows = tokens(4)
    mixed = model(rows, adapter_names=names).logits
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(rows[i : i + 1]).logits
        else:
            model.set_adapter(name)
            alone = model(rows[i : i + 1]).logits
        torch.testing.assert_close(mixed[i : i + 1], alone)


def test_adapter_names_are_checked():
    model = two_adapters()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): three"):
        model(tokens(), adapter_names=["one", "three"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(tokens(), adapter_names=["one"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged"):
        model(tokens(), adapter_names=["one", "two"])
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(tokens(), adapter_names=["one", "two"])
    assert not any(layer._forward_pre_hooks for layer in fura_layers(model).values())


@pytest.mark.parametrize("options", [{}, {"side": "output"}, {"basis": "identity"}, {"singular_values": "merged"}])
def test_weighted_combination_is_the_weighted_sum_of_updates(options):
    model = two_adapters({**options, "train_bias": True}, {**options, "train_bias": True})
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "both")
    for layer in fura_layers(model).values():
        expected = 0.5 * layer.get_delta_weight("one") - 2.0 * layer.get_delta_weight("two")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected)
    assert model.active_adapters == ["one"]
    model.set_adapter("both")
    for layer in fura_layers(model).values():
        blocks = layer.fura_blocks["both"]
        assert blocks.core.requires_grad and not blocks.core.any()  # it can be trained on from here


def test_weighted_combination_of_different_blocks_is_refused():
    model = two_adapters({}, {"block_size": "full"})
    with pytest.raises(AdapterError, match=r"they differ on model\.layers\.0"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    assert "both" not in model.peft_config
    for adapters, weights, name in ((["one", "zero"], [1, 1], "x"), (["one"], [1, 2], "x"), (["one"], [1], "two")):
        with pytest.raises(AdapterError, match="cannot make"):
            model.add_weighted_adapter(adapters, weights, name)


def test_merge_and_unload_gives_a_plain_model():
    model = two_adapters()
    expected = logits(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert not fura_layers(plain) and type(plain).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(plain), expected)


def test_unload_gives_back_the_base():
    model = two_adapters()
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model.unload()), expected)


def test_dense_delta():
    model = two_adapters()
    for layer in fura_layers(model).values():
        delta = layer.get_delta_weight("one")
        torch.testing.assert_close(layer.base_layer.weight + delta, layer.merged_weight(["one"]))


def test_conversion_to_lora_is_lossy_and_exact_at_full_rank():
    model = two_adapters(dtype=torch.float32)
    expected = logits(model)
    errors = {}
    for rank in (2, 8, 32):
        config, state_dict = convert_to_lora(model, rank=rank, adapter_name="one")
        lora = get_peft_model(tiny_llama(), config).eval()
        set_peft_model_state_dict(lora, state_dict)
        errors[rank] = float((logits(lora) - expected).norm() / expected.norm())
    assert errors[2] > errors[8] > errors[32]
    assert errors[32] < 1e-4


def test_conversion_to_lora_with_trained_biases_is_refused():
    model = get_peft_model(tiny_llama(attention_bias=True), FuraConfig(target_modules=["q_proj"], train_bias=True))
    with pytest.raises(TypeError):
        convert_to_lora(model, rank=4)
