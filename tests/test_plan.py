"""The memory plan against peaks measured on an H200 (docs/performance.md) and against counted tensors."""

import pytest
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from fura_rl.cli import app
from fura_rl.errors import FuraError
from fura_rl.plan import GIB, ModelSizes, activation_bytes, largest_batch, network_bytes
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import adapter_config

QWEN3_1_7B_LAYERS = ModelSizes(  # without embedding and head, as measured
    weights=1_409_426_432, trained=39_051_264, basis=39_051_264, layers=28, hidden=2048, intermediate=6144, query=2048,
    key_value=1024, vocabulary=0, head_norms=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("adapted", "checkpointing", "measured_gib"),
    [(False, False, 36.76), (True, False, 46.11), (False, True, 6.19), (True, True, 6.91)],
)
def test_peaks_are_within_ten_percent_of_the_measured_ones(adapted, checkpointing, measured_gib):
    sizes = QWEN3_1_7B_LAYERS
    planned = 2 * sizes.weights + activation_bytes(sizes, 16_384, checkpointing=checkpointing, adapted=adapted)
    if adapted:
        planned += 16 * sizes.trained + 4 * sizes.basis
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
    with pytest.raises(FuraError, match="plan knows the methods fura, svd, not 'lora'"):
        ModelSizes.of(str(tiny_model), AdapterArguments(method="lora"))
    with pytest.raises(FuraError, match="Cannot read the configuration of"):
        ModelSizes.of("/no/such/model", AdapterArguments())
