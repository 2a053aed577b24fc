"""Bases that two ranks compute together."""

import hashlib
import io
import json
import os
from contextlib import redirect_stderr
from datetime import timedelta
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from forked import forking
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fura_rl import FuraConfig, train_grpo
from fura_rl.adapter import blocks
from fura_rl.adapter.split_bases import split_bases

LAYERS = 14


def adapted(**options):
    """A digest of each layer's basis and singular values, and how many were computed here."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=8)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    with patch.object(blocks, "block_basis", Mock(wraps=blocks.block_basis)) as computed, split_bases("cpu"):
        model = get_peft_model(model, FuraConfig(target_modules="all-linear", **options))
        model.add_adapter("second", FuraConfig(target_modules="all-linear", **options))  # takes over the first's basis
    digests = {
        name: hashlib.sha256(buffer.numpy().tobytes()).hexdigest()
        for name, buffer in model.named_buffers()
        if name.endswith((".basis", ".sigma"))
    }
    return digests, computed.call_count


def loaded(model_path):
    """The same of a model from a file, its samples of the base too; and how large its weights are on this rank."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    size = sum(float(p.detach().abs().sum()) for p in model.parameters())
    with split_bases("cpu"):
        model = get_peft_model(model, FuraConfig(target_modules="all-linear"))
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if ".fura_" in name]
    return {name: hashlib.sha256(buffer.numpy().tobytes()).hexdigest() for name, buffer in buffers}, size


def rank_of_two(rank, folder, function, arguments, environment):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))
    with open(f"{folder}/{rank}", "w") as file:
        json.dump(function(**arguments), file)
    dist.destroy_process_group()


def on_two_ranks(folder, function, arguments, **environment):
    """What the function returns on each of two ranks."""
    context = forking()  # not from here: threads of a pool would be missing
    processes = [
        context.Process(target=rank_of_two, args=(rank, str(folder), function, arguments, environment))
        for rank in range(2)
    ]
    for process in processes:
        process.daemon = True  # killed at the end of the tests, should it hang
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    return [json.loads((folder / f"{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("options", [{"side": "output"}, {"basis": "random"}], ids=str)
def test_two_ranks_get_the_bits_of_one(options, tmp_path):
    results = on_two_ranks(tmp_path, adapted, options)
    digests, _ = adapted(**options)
    kinds = 1 if "basis" in options else 2  # a random basis has no singular values
    assert len(digests) == 2 * LAYERS * kinds and len(set(digests.values())) == LAYERS * kinds
    assert results[0][0] == results[1][0]
    if "basis" not in options:  # each rank draws only what it sends
        assert results[0][0] == digests
        assert [count for _, count in results] == [LAYERS / 2, LAYERS / 2]


def test_ranks_without_weights_get_the_bases_of_the_first(tiny_model, tmp_path):
    """`cpu_ram_efficient_loading`: until FSDP has spread the weights, all ranks but the first hold zeros."""
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    results = on_two_ranks(tmp_path, loaded, {"model_path": str(tiny_model)}, **environment)
    digests, size = loaded(tiny_model)
    assert [found for _, found in results] == [size, 0]
    assert results[0][0] == results[1][0] == digests
    assert len(set(digests.values())) == len(digests)


def refusal(model_path, method):
    """What the main job says before it loads anything."""
    with redirect_stderr(io.StringIO()) as said:
        options = ["--model_name_or_path", model_path, "--dataset_name", "none.jsonl", "--method", method]
        status = train_grpo.main([*options, "--use_vllm", "false", "--output_dir", "none"])
    return status, said.getvalue()


def test_efficient_loading_is_refused_where_bases_would_be_lost(tiny_model, tmp_path):
    """accelerate's loader expects every tensor of a state dict to be split, and a basis is not."""
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "ACCELERATE_USE_CPU": "true",
    }
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for method, words in (("fura", "set it to false in the accelerate configuration"), ("lora", "none.jsonl")):
        (tmp_path / method).mkdir()
        arguments = {"model_path": str(tiny_model), "method": method}
        for status, said in on_two_ranks(tmp_path / method, refusal, arguments, **environment):
            assert status == 2 and words in said


def test_without_ranks_nothing_is_different():
    assert not dist.is_initialized() and "RANK" not in os.environ
    assert adapted()[1] == LAYERS
