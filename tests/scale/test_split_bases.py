"""Bases that two ranks compute together."""

import hashlib
import json
import os
from datetime import timedelta
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from job import forking
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fura_rl import FuraConfig
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


def rank_of_two(rank, store, out, options):
    store = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    with open(out, "w") as file:
        json.dump(adapted(**options), file)
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"side": "output"}, {"basis": "random"}], ids=str)
def test_two_ranks_get_the_bits_of_one(options, tmp_path):
    context = forking()  # not from here: threads of a pool would be missing
    processes = [
        context.Process(target=rank_of_two, args=(rank, str(tmp_path / "store"), str(tmp_path / f"{rank}"), options))
        for rank in range(2)
    ]
    for process in processes:
        process.daemon = True  # killed at the end of the tests, should it hang
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
    results = [json.loads((tmp_path / f"{rank}").read_text()) for rank in range(2)]
    digests, _ = adapted(**options)
    kinds = 1 if "basis" in options else 2  # a random basis has no singular values
    assert len(digests) == 2 * LAYERS * kinds and len(set(digests.values())) == LAYERS * kinds
    assert results[0][0] == results[1][0]
    if "basis" not in options:  # each rank draws only what it sends
        assert results[0][0] == digests
        assert [count for _, count in results] == [LAYERS / 2, LAYERS / 2]


def test_without_ranks_nothing_is_different():
    assert not dist.is_initialized() and "RANK" not in os.environ
    assert adapted()[1] == LAYERS
