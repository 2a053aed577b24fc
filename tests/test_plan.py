"""The memory plan against peaks measured on an H100 (docs/performance.md) and against counted tensors."""

from dataclasses import replace

import pytest
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from fura_rl.cli import app
from fura_rl.errors import FuraError
from fura_rl.plan import GIB, ModelSizes, activation_bytes, largest_batch, network_bytes, trained_parts
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import adapter_config

QWEN3_1_7B_LAYERS = ModelSizes(  # without embedding and head, as measured
    weights=1_409_426_432, trained=39_051_264, basis=39_051_264, layers=28, hidden=2048, intermediate=6144, query=2048,
    key_value=1024, vocabulary=0, head_norms=True,
)  # fmt: skip


# docs/performance.md; trained parameters as counted there
MEASURED = [
    (None, False, 0, 36.79),
    ("fura", False, 39_051_264, 40.79),
    ("lora", False, 34_865_152, 53.16),
    ("oft", False, 7_999_488, 53.38),
    ("full", False, 1_409_426_432, 56.76),
    (None, True, 0, 6.22),
    ("fura", True, 39_051_264, 6.94),
    ("lora", True, 34_865_152, 7.40),
]


@pytest.mark.parametrize(("method", "checkpointing", "trained", "measured_gib"), MEASURED)
def test_peaks_are_within_ten_percent_of_the_measured_ones(method, checkpointing, trained, measured_gib):
    sizes = replace(QWEN3_1_7B_LAYERS, trained=trained, basis=trained if method == "fura" else 0)
    planned = activation_bytes(sizes, 16_384, checkpointing=checkpointing, method=method)
    planned += sum(trained_parts(sizes, 2.0, method or "fura").values())
    assert planned / GIB == pytest.approx(measured_gib, rel=0.1)


def test_sizes_are_those_of_the_model(tiny_model):
    sizes = ModelSizes.of(str(tiny_model), AdapterArguments())
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    assert sizes.weights == sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, adapter_config(AdapterArguments()))
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) == 129_024
    assert (sizes.layers, sizes.hidden, sizes.intermediate, sizes.query, sizes.key_value) == (3, 256, 512, 256, 128)
    assert sizes.head_norms


def test_largest_batch_and_network():
    assert largest_batch(10.0, lambda batch: {"fixed": 3.0, "activations": 2.0 * batch}) == 3
    assert largest_batch(1.0, lambda batch: {"fixed": 3.0}) == 0
    sent = network_bytes(QWEN3_1_7B_LAYERS, gpus=4)
    assert sent["gradients, a GPU (ring all-reduce)"] == pytest.approx(4 * 39_051_264 * 1.5)
    assert network_bytes(QWEN3_1_7B_LAYERS, gpus=1)["gradients, a GPU (ring all-reduce)"] == 0
    assert sent["sync to a server, adapter only"] / sent["sync to a server, merged"] < 0.06


def test_command_says_whether_it_fits(tiny_model, tmp_path):
    common = ["--model_name_or_path", str(tiny_model), "--dataset_name", "x.jsonl", "--output_dir", str(tmp_path)]
    options = ["--per_device_train_batch_size", "64", "--num_generations", "8"]
    fits = CliRunner().invoke(app, ["plan", "--gpu-memory", "80", *common, *options])
    assert fits.exit_code == 0, fits.output
    for words in ("activations", "tokens of cache", "largest per_device_train_batch_size that fits"):
        assert words in fits.output
    small = CliRunner().invoke(app, ["plan", "--gpu-memory", "1.5", *common, *options])
    assert small.exit_code == 1 and "does not fit into 1.5 GiB" in " ".join(small.output.split())


def test_what_is_not_planned_for_is_said(tiny_model):
    with pytest.raises(FuraError, match="plan knows the methods fura, svd, lora, oft, full, not 'dora'"):
        ModelSizes.of(str(tiny_model), AdapterArguments(method="dora"))
    with pytest.raises(FuraError, match="Cannot read the configuration of"):
        ModelSizes.of("/no/such/model", AdapterArguments())


@pytest.mark.parametrize("method", ["svd", "lora", "oft", "full"])
def test_other_methods_are_counted(tiny_model, method):
    sizes = ModelSizes.of(str(tiny_model), AdapterArguments(method=method))
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    config = adapter_config(AdapterArguments(method=method))
    model = base if config is None else get_peft_model(base, config)
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_full_finetuning_needs_sixteen_bytes_a_weight_and_its_bf16_copy():
    assert sum(trained_parts(QWEN3_1_7B_LAYERS, 4.0, "full").values()) == 18 * QWEN3_1_7B_LAYERS.weights
    assert sum(trained_parts(QWEN3_1_7B_LAYERS, 2.0, "full", shards=8).values()) == QWEN3_1_7B_LAYERS.weights
