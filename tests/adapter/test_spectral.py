"""Diagnostics of spectra against dense linear algebra, and the change of basis in mid-training."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_nets import adapted_llama, base_weights, fura_layers, perturb, tiny_llama, tokens
from torch import nn
from transformers import Trainer, TrainingArguments

from fura_rl.adapter import AdapterError, FuraConfig, FuraLayer, save_adapter
from fura_rl.adapter.inspect import info
from fura_rl.adapter.spectral import SpectralCallback, column_space_leak, spectral_report, summarise


def one_layer(out_features=24, in_features=12, size=0.2, **options) -> FuraLayer:
    torch.manual_seed(0)
    layer = FuraLayer(nn.Linear(in_features, out_features, dtype=torch.float64), "default", FuraConfig(**options))
    perturb(layer, size)
    return layer


@pytest.mark.parametrize("options", [{}, {"side": "output"}, {"basis": "identity"}, {"singular_values": "merged"}])
def test_report_agrees_with_dense_matrices(options):
    layer = one_layer(**options)
    (report,) = spectral_report(layer, leak=True).values()
    weight, update = layer.base_layer.weight.data, layer.get_delta_weight("default")
    b = layer.block_size["default"]
    axis = 1 if layer.fura_blocks["default"].side == "input" else 0
    drifts, ranks = [], []
    for before, change in zip(weight.split(b, axis), update.split(b, axis), strict=True):
        drifts.append(torch.linalg.svdvals(before + change) - torch.linalg.svdvals(before))
        singular = torch.linalg.svdvals(change)
        ranks.append(float((singular.norm() / singular[0]) ** 2))
    assert report.relative_norm == pytest.approx(float(update.norm() / weight.norm()))
    assert report.singular_value_drift == pytest.approx(float(torch.cat(drifts).norm() / weight.norm()))
    assert report.stable_rank == pytest.approx(sum(ranks) / len(ranks))
    assert report.max_rank == b


def test_fresh_adapter_reports_zeros():
    (report,) = spectral_report(one_layer(size=0.0)).values()
    assert (report.relative_norm, report.stable_rank, report.singular_value_drift) == (0.0, 0.0, 0.0)


def test_input_side_stays_in_the_column_space_and_output_side_does_not():
    # 24 x 12: the columns span half of the output space
    inside = one_layer()
    assert spectral_report(inside)[""].column_space_leak == 0.0  # by construction, and in fact:
    assert column_space_leak(inside.base_layer.weight.data, inside.get_delta_weight("default")) < 1e-12
    outside = one_layer(side="output")
    assert spectral_report(outside)[""].column_space_leak is None  # not measured unless asked for
    assert spectral_report(outside, leak=True)[""].column_space_leak > 0.1
    wide = one_layer(12, 24, side="output")
    assert spectral_report(wide, leak=True)[""].column_space_leak < 1e-12


def test_rank_of_a_rank_one_update_is_one():
    layer = one_layer(size=0.0, block_size="full", singular_values="frozen")
    blocks = layer.fura_blocks["default"]
    blocks.core.data = torch.randn(1, 12, 1, dtype=torch.float64) @ torch.randn(1, 1, 12, dtype=torch.float64)
    assert spectral_report(layer)[""].stable_rank == pytest.approx(1.0)


def test_summary():
    model = adapted_llama()
    reports = spectral_report(model)
    assert len(reports) == 14
    metrics = summarise(reports)
    norms = [report.relative_norm for report in reports.values()]
    assert metrics["fura/relative_norm"] == pytest.approx(sum(norms) / 14)
    assert metrics["fura/relative_norm_max"] == max(norms)
    assert metrics["fura/column_space_leak"] == 0.0
    assert summarise(spectral_report(nn.Linear(2, 2))) == {}


def test_callback_logs_in_every_nth_entry(tmp_path):
    model = adapted_llama(moved=False)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    sent = []
    recorder = type(
        "Recorder", (SpectralCallback,), {"on_log": lambda self, *a, logs=None, **k: sent.append(dict(logs))}
    )
    trainer.add_callback(recorder())  # stands where a tracker stands
    SpectralCallback(every=2).attach(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["fura/relative_norm" in entry for entry in entries] == [True, False, True, False]
    assert entries[2]["fura/relative_norm"] > entries[0]["fura/relative_norm"] > 0
    assert ["fura/relative_norm" in entry for entry in sent if "loss" in entry] == [True, False, True, False]


# -- refresh_basis ----------------------------------------------------------------------------------------------------

REFRESHABLE = {
    "default": {},
    "output": {"side": "output"},
    "frozen": {"singular_values": "frozen"},
    "merged": {"singular_values": "merged"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", REFRESHABLE.values(), ids=REFRESHABLE)
def test_refresh_leaves_the_function_unchanged_bit_for_bit(options, dtype):
    model = adapted_llama(dtype, **options)
    before, weights = model(tokens()).logits.detach(), base_weights(model)
    reset = model.refresh_basis()
    assert torch.equal(model(tokens()).logits, before)
    after = base_weights(model)
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in reset} == {id(p) for p in trained} and not any(p.any() for p in trained)


@pytest.mark.parametrize("side", ["input", "output"])
def test_refreshed_basis_is_that_of_the_merged_weight(side):
    layer = one_layer(side=side, train_bias=True)
    bias = layer.fura_blocks["default"].bias.detach().clone()
    merged = layer.merged_weight()
    layer.refresh_basis("default")
    fresh = FuraLayer(nn.Linear(12, 24, dtype=torch.float64), "default", FuraConfig(side=side))
    fresh.base_layer.weight.data = merged
    fresh.fura_blocks["default"].set_basis(merged)
    assert torch.allclose(layer.fura_blocks["default"].sigma, fresh.fura_blocks["default"].sigma)
    assert torch.allclose(layer.fura_blocks["default"].basis, fresh.fura_blocks["default"].basis)
    assert torch.equal(layer.fura_blocks["default"].bias, bias)
    # training from here is training a fresh adapter on the merged weight
    for target in (layer, fresh):
        perturb(target, 0.1, seed=9)
    layer.fura_blocks["default"].bias.data.zero_()
    torch.testing.assert_close(layer.merged_weight(), fresh.merged_weight())


def test_refresh_twice_train_save_and_load(tmp_path):
    model = adapted_llama()
    for seed in (3, 4):
        model.refresh_basis()
        perturb(model, 0.05, seed=seed)
    expected = model(tokens()).logits.detach()
    for form in ("full", "delta", "compact"):
        for low_cpu_mem_usage in (False, True):
            folder = save_adapter(model, tmp_path / form, form)
            loaded = PeftModel.from_pretrained(tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)


def test_info_after_refresh_is_relative_to_the_base(tmp_path):
    model = adapted_llama()
    model.refresh_basis()
    perturb(model, 0.05, seed=5)
    layers = {f"base_model.model.{layer.name}": layer for layer in info(save_adapter(model, tmp_path)).layers}
    for name, report in spectral_report(model).items():
        assert layers[name].spectra.relative_norm == pytest.approx(report.relative_norm, rel=1e-3)
        assert layers[name].spectra.singular_value_drift == pytest.approx(report.singular_value_drift, rel=1e-3)


def test_refresh_of_one_adapter_among_several():
    model = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj"]), adapter_name="one")
    model.add_adapter("two", FuraConfig(target_modules=["q_proj"]))
    perturb(model)
    before = model(tokens()).logits.detach()
    model.refresh_basis("two")
    assert torch.equal(model(tokens()).logits, before)
    blocks = next(iter(fura_layers(model).values())).fura_blocks
    assert blocks["one"].fold is None and blocks["two"].fold is not None
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(AdapterError, match="name one of the active adapters"):
        model.refresh_basis()


def test_a_basis_that_does_not_depend_on_the_weight_is_not_refreshed():
    with pytest.raises(AdapterError, match="does not depend on the weight"):
        adapted_llama(basis="identity").refresh_basis()
