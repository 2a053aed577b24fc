"""Base weights that are not simply there: on the meta device, offloaded, or partitioned by ZeRO-3."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from forked import free_port
from peft import PeftModel, get_peft_model
from tiny_nets import adapted_llama, fura_layers, perturb, tiny_llama, tokens
from transformers import LlamaForCausalLM

from fura_rl.adapter import FuraConfig, save_adapter


def test_meta_weights(tmp_path):
    with init_empty_weights():
        base = LlamaForCausalLM(tiny_llama().config)
    model = get_peft_model(base, FuraConfig(target_modules="all-linear"))
    for layer in fura_layers(model).values():
        blocks = layer.fura_blocks["default"]
        assert all(t.is_meta for t in blocks.state_dict().values())
        assert layer.merged_weight().is_meta and layer.delta("default").is_meta
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == {
        n: p.shape for n, p in adapted_llama().named_parameters() if p.requires_grad
    }


def test_adapter_loads_onto_meta_weights_that_arrive_later(tmp_path):
    trained = adapted_llama()
    folder = save_adapter(trained, tmp_path)
    with init_empty_weights():
        base = LlamaForCausalLM(tiny_llama().config)
    model = PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True).eval()
    layers = fura_layers(model)
    assert not any(t.is_meta for layer in layers.values() for t in layer.fura_blocks.state_dict().values())
    weights = {
        name.replace("base_model.model.", "", 1).replace(".base_layer", ""): name
        for name, parameter in model.named_parameters()
        if "fura_" not in name
    }
    arrived = {weights[name]: parameter for name, parameter in tiny_llama().named_parameters()}
    model.load_state_dict(arrived, strict=False, assign=True)
    model.base_model.model.model.rotary_emb = trained.base_model.model.model.rotary_emb
    assert torch.equal(model(tokens()).logits, trained(tokens()).logits)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(tmp_path, where):
    model = tiny_llama()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    offloaded = get_peft_model(model, FuraConfig(target_modules=["q_proj", "down_proj"])).eval()
    plain = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj", "down_proj"])).eval()
    for ours, expected in zip(fura_layers(offloaded).values(), fura_layers(plain).values(), strict=True):
        assert torch.equal(ours.fura_blocks["default"].basis, expected.fura_blocks["default"].basis)
        assert ours.get_base_layer().weight.is_meta  # and they are offloaded again
        assert torch.equal(ours.merged_weight(), expected.merged_weight())
    for target in (offloaded, plain):
        perturb(target)
    expected = plain(tokens()).logits
    assert torch.equal(offloaded(tokens()).logits, expected)
    offloaded.merge_adapter()
    torch.testing.assert_close(offloaded(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(offloaded(tokens()).logits, expected)
    offloaded.unmerge_adapter()
    assert torch.equal(offloaded(tokens()).logits, expected)


ZERO3 = """
import json, sys
import deepspeed, torch
from peft import get_peft_model
from tiny_nets import adapted_llama, fura_layers, perturb, tiny_llama, tokens
from transformers.integrations import HfDeepSpeedConfig
from fura_rl.adapter import FuraConfig

folder = sys.argv[1]
config = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
}
reference = get_peft_model(tiny_llama(), FuraConfig(target_modules=["q_proj", "down_proj"]))
optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)

deepspeed.init_distributed("gloo")
alive = HfDeepSpeedConfig(config)  # as transformers' trainer does: from here on weights are partitioned at once
tiny_llama().save_pretrained(folder)
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained(folder)
assert base.model.layers[0].self_attn.q_proj.weight.numel() == 0, "the weight is not partitioned"
model = get_peft_model(base, FuraConfig(target_modules=["q_proj", "down_proj"]))
for (name, ours), expected in zip(fura_layers(model).items(), fura_layers(reference).values(), strict=True):
    assert torch.equal(ours.fura_blocks["default"].basis, expected.fura_blocks["default"].basis), name
    assert torch.equal(ours.merged_weight(), expected.merged_weight()), name

trained = [p for p in model.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
losses, errors = [], []
for _ in range(3):
    loss = engine(tokens(), labels=tokens()).loss
    engine.backward(loss)
    engine.step()
    expected = reference(tokens(), labels=tokens()).loss
    optimizer.zero_grad()
    expected.backward()
    optimizer.step()
    losses.append([float(loss), float(expected)])
    for ours, theirs in zip(fura_layers(model).values(), fura_layers(reference).values(), strict=True):
        with deepspeed.zero.GatheredParameters(list(ours.parameters())):  # as a weight sync between steps does
            merged = ours.merged_weight()
        update = theirs.get_delta_weight("default")
        errors.append(float((merged - theirs.merged_weight()).norm() / update.norm()))
core = next(iter(fura_layers(model).values())).fura_blocks["default"].core
print(json.dumps({"losses": losses, "errors": errors, "partitioned": core.numel() == 0, "dtype": str(core.dtype)}))
"""


@pytest.mark.slow  # DeepSpeed compiles an extension the first time
def test_zero3_partitioned_weights_and_adapter(tmp_path):
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.path.dirname(__file__),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", ZERO3, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert run.returncode == 0, run.stderr[-4000:]
    result = json.loads(run.stdout.strip().splitlines()[-1])
    assert result["partitioned"] and result["dtype"] == "torch.float32"
    for ours, expected in result["losses"]:  # Adam turns rounding of tiny gradients into whole steps
        assert ours == pytest.approx(expected, rel=1e-3)
    assert result["losses"][0][0] == result["losses"][0][1]
    assert max(result["errors"]) < 0.1
    assert result["losses"][-1][0] < result["losses"][0][0]
