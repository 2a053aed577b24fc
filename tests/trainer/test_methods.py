"""Other methods and quantised bases in the same trainer: one option, the same engine, sync and files."""

import json

import forked
import pytest
import torch
import yaml
from peft import LoraConfig, OFTConfig, RandLoraConfig
from safetensors.torch import load_file

from fura_rl import FuraConfig
from fura_rl.errors import FuraError
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import METHODS, adapter_config


def test_each_method_has_its_configuration():
    made = {name: adapter_config(AdapterArguments(method=name, lora_r=8, lora_alpha=16)) for name in METHODS}
    assert made.pop("full") is None
    kinds = {name: type(config) for name, config in made.items()}
    assert kinds == {
        "fura": FuraConfig, "svd": FuraConfig, "lora": LoraConfig, "dora": LoraConfig, "pissa": LoraConfig,
        "oft": OFTConfig, "randlora": RandLoraConfig,
    }  # fmt: skip
    assert made["svd"].block_size == "full" and made["fura"].block_size == "closest"
    assert made["dora"].use_dora and made["pissa"].init_lora_weights == "pissa"
    assert (made["lora"].r, made["lora"].lora_alpha) == (8, 16)
    assert all(config.target_modules == "all-linear" for config in made.values())


def test_flat_options_reach_the_adapter():
    options = AdapterArguments(block_size="32", target_modules=["q_proj", "v_proj"], basis="identity", train_bias=True)
    config = adapter_config(options)
    assert (config.block_size, config.basis, config.train_bias) == (32, "identity", True)
    assert config.target_modules == {"q_proj", "v_proj"}
    with pytest.raises(FuraError, match="Unknown method 'qlora': use one of fura, svd, lora"):
        adapter_config(AdapterArguments(method="qlora"))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize(
    ("options", "adapter_type"),
    [({"load_in_4bit": True}, "FURA"), ({"method": "lora", "lora_r": 8}, "LORA"), ({"method": "full"}, None)],
)
def test_a_run_with_the_real_engine(options, adapter_type, tmp_path, tiny_model, tiny_problems):
    """Engine and trainer agree to float32 rounding before and after a step, also when the trainer's base is NF4."""
    if "load_in_4bit" in options:
        pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    recipe = tmp_path / "recipe.yaml"
    common = dict(
        model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=48, learning_rate=1e-3, save_strategy="no", vllm_max_model_length=256, seed=1,
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump({**common, **options}))
    process = forked.run("-m", "fura_rl.train_grpo", "--config", recipe)
    assert process.returncode == 0, process.stderr[-3000:]
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["sync/logp_gap_max"] for line in logs if "sync/logp_gap_max" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert any(line.get("grad_norm", 0) > 0 for line in logs)
    if adapter_type is None:
        return
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["peft_type"] == adapter_type
    if adapter_type == "FURA":  # TRL would make a quantised model's adapter bfloat16
        tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
        assert {tensor.dtype for name, tensor in tensors.items() if "core" in name} == {torch.float32}
        values = torch.cat([tensor.flatten() for name, tensor in tensors.items() if name.endswith("core")])
        assert values.abs().max() > 0 and not torch.equal(values, values.bfloat16().float())
