"""What two ranks hold of a policy under FSDP2 and ZeRO: the bytes that `fura_rl.memory` says, but for padding."""

import json
import os
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from forked import forking
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from fura_rl import FuraConfig
from fura_rl.memory import STRATEGIES, ModelSizes, adapter_parts, base_bytes
from fura_rl.trainer.arguments import AdapterArguments

KINDS = ("fsdp2", "zero1", "zero2", "zero3")


def local(parameter):
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def held(kind, model_path):
    """Bytes on this rank after a step: of the base, of what is trained, of the basis, of the optimiser."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_path), dtype=torch.bfloat16)
    model = get_peft_model(model, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(8).unsqueeze(0)
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if kind == "fsdp2":
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        master = 0
    else:
        import deepspeed

        config = {
            "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": True},
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
        }
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        zero = engine.optimizer
        shares = zero.fp32_partitioned_groups_flat if kind == "zero3" else zero.single_partition_of_fp32_groups
        master, optimizer = sum(share.nbytes for share in shares), zero.optimizer
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return {
        "base": sum(local(p).nbytes for p in model.parameters() if not p.requires_grad),
        "trained": sum(local(p).nbytes for p in model.parameters() if p.requires_grad),
        "basis": sum(b.nbytes for name, b in model.named_buffers() if ".fura_" in name),
        "state": master + sum(local(moment).nbytes for moment in moments),
    }


def rank_of_two(rank, folder, model_path):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=600))
    with open(f"{folder}/{rank}", "w") as file:
        json.dump({kind: held(kind, model_path) for kind in KINDS}, file)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_what_is_planned(tmp_path, tiny_model):
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    context = forking()
    processes = [context.Process(target=rank_of_two, args=(rank, str(tmp_path), str(tiny_model))) for rank in range(2)]
    for process in processes:
        process.daemon = True
        process.start()
    for process in processes:
        process.join(900)
        assert process.exitcode == 0
    sizes = ModelSizes.of(str(tiny_model), AdapterArguments())
    no_gradients = replace(sizes, basis=0)
    for rank in range(2):
        found = json.loads((tmp_path / str(rank)).read_text())
        for kind in KINDS:
            strategy = STRATEGIES[kind]
            split = 2 if strategy.splits_weights else 1
            assert found[kind]["base"] == pytest.approx(base_bytes(sizes) / split, rel=1e-3), kind
            assert found[kind]["basis"] == 4 * sizes.basis
            value = adapter_parts(no_gradients, "fura", strategy, 2)["adapter, its basis"]
            assert found[kind]["trained"] == pytest.approx(value, rel=1e-3), kind
            state = (12 if strategy.zero else 8) * sizes.trained / 2
            assert found[kind]["state"] == pytest.approx(state, rel=1e-3), kind
            gradient = 4 * sizes.trained / (2 if kind in ("fsdp2", "zero2", "zero3") else 1)
            assert adapter_parts(sizes, "fura", strategy, 2)["adapter's gradients, AdamW"] == gradient + state
