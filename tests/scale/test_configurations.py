"""The shipped launch configurations, as accelerate and DeepSpeed read them."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_accepts_it(path):
    config = load_config_from_file(str(path))
    kind = path.stem.split("_")[0].rstrip("0123456789")
    expected = {"single": "NO", "ddp": "MULTI_GPU", "zero": "DEEPSPEED", "fsdp": "FSDP"}[kind]
    assert config.distributed_type == expected and config.mixed_precision == "bf16" and not config.use_cpu
    if kind == "zero":
        stage, offload = int(path.stem[4]), "cpu" if path.stem.endswith("offload") else "none"
        assert config.deepspeed_config["zero_stage"] == stage
        assert config.deepspeed_config["offload_optimizer_device"] == offload
        assert config.deepspeed_config["zero3_init_flag"] == (stage == 3)
    if kind == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
        assert not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_accepts_it(path):
    deepspeed = pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    config = json.loads(path.read_text())
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert config.pop(name) == "auto"  # transformers fills these in
    assert config.pop("bf16") == {"enabled": "auto"}
    read = deepspeed.runtime.config.DeepSpeedConfig({**config, "train_batch_size": 1, "bf16": {"enabled": True}})
    assert read.zero_config.stage == int(path.stem[4])
    assert (read.zero_config.offload_optimizer is not None) == path.stem.endswith("offload")
