"""FSDP2 and ZeRO in a group of this one process: what their bookkeeping costs a step, without any communication."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Qwen3DecoderLayer"]


def start_group() -> None:
    if not dist.is_initialized():
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
        }
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=0, world_size=1)


def shard(model: nn.Module) -> None:
    """FSDP2, a unit a decoder layer."""
    start_group()
    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)


def zero_engine(model: nn.Module, stage: int, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's engine around a model with something to train, configured as configs/deepspeed/ does.

    With bf16 on, what is trained has a float32 copy in the optimiser, and weights other than FuRA's are cast to bf16.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    start_group()
    import deepspeed

    config = {
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
