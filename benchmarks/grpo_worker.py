"""One process of a run that `grpo_scaling.py` measures: the recipe's job, and the GPU memory of its phases.

    <launcher> benchmarks/grpo_worker.py --gate FILE --facts FILE --config RECIPE

What is slow to import is imported at once, the job begins when the file `--gate` exists: so the next launch can be made
ready while the one before it is measured. Rank 0 writes `--facts`: peaks in GiB beside what `fura-rl plan` says for
batches of the same lengths. Without a GPU this is a process of gloo.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fura_rl import plan, train_grpo
from fura_rl.availability import vllm_problem
from fura_rl.errors import FuraError
from fura_rl.trainer import grpo

GIB = 2**30
ON_GPU = torch.cuda.is_available()
planned: dict[str, Any] = {}  # what the job's own check of the memory is asked
seen: dict[str, Any] = {}  # largest numbers, by name


def allocated() -> float:
    return torch.cuda.memory_allocated() / GIB if ON_GPU else 0.0


def note(**values: float) -> None:
    for name, value in values.items():
        seen[name] = max(seen.get(name, 0.0), value)


def note_peak(phase: str) -> None:
    """The peak since the last call, and a new beginning."""
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        note(**{f"{phase}_allocated": torch.cuda.max_memory_allocated() / GIB, "used": (total - free) / GIB})
        note(reserved=torch.cuda.max_memory_reserved() / GIB)
        torch.cuda.reset_peak_memory_stats()


class MeasuredEngine(grpo.FuraVLLMGeneration):
    """Notes what an engine of this process keeps."""

    def _init_vllm(self) -> None:
        before = allocated()
        super()._init_vllm()
        note(engine=allocated() - before)


class MeasuredTrainer(train_grpo.FuraGRPOTrainer):
    """Notes peaks of memory: of forward and backward passes, and of everything else."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        note_peak("generating")
        seen["distributed"] = self.accelerator.distributed_type.value
        batch, prompt = inputs["prompt_ids"].shape
        note(batch=batch, prompt=prompt, completion=inputs["completion_ids"].shape[1])
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        note_peak("training")
        return loss


def check_memory(training: Any, model: Any, adapter: Any) -> None:
    planned.update(training=training, model=model, adapter=adapter)
    plan.check_memory(training, model, adapter)


def prediction() -> dict[str, float]:
    """`fura-rl plan`'s GiB by part while training, for the longest batch that was seen."""
    training = copy.copy(planned["training"])
    training.max_completion_length = int(seen["completion"])
    model, adapter = planned["model"], planned["adapter"]
    sizes = plan.ModelSizes.of(model.model_name_or_path, adapter, model.model_revision)
    memory = torch.cuda.mem_get_info()[1] if ON_GPU else 80 * GIB
    strategy = plan.strategy_of(training)
    run = plan.Run(sizes, training, model, adapter, strategy, training.world_size, memory, int(seen["prompt"]))
    return {name: value / GIB for name, value in run.parts()[0].items()}


def use_cpu() -> None:
    """Processes of gloo. accelerate itself starts DeepSpeed and FSDP on accelerators only."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    with_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true" and not with_fsdp:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group("gloo")

    def backend(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU if with_fsdp else DistributedType.MULTI_CPU

    patch.object(PartialState, "_prepare_backend", backend).start()
    patch.object(PartialState, "set_device", lambda state: setattr(state, "device", torch.device("cpu"))).start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gate", type=Path, required=True, help="begin when this file exists")
    parser.add_argument("--facts", type=Path, required=True, help="a file for rank 0's")
    args, options = parser.parse_known_args()
    parent = os.getppid()
    if not ON_GPU:
        use_cpu()
    vllm_problem()  # imports it
    while not args.gate.exists():
        if os.getppid() != parent or not args.gate.parent.exists():  # nobody will open it
            return 1
        time.sleep(0.02)
    train_grpo.FuraGRPOTrainer = MeasuredTrainer
    train_grpo.check_memory = check_memory
    grpo.FuraVLLMGeneration = MeasuredEngine
    status = train_grpo.main(options)
    if status == 0 and int(os.environ.get("RANK", 0)) == 0:
        try:
            parts = prediction()
        except FuraError as reason:  # not every run is planned for
            print(reason, file=sys.stderr)
            parts = {}
        facts = {"distributed": seen.pop("distributed"), "gib": seen, "plan": parts}
        args.facts.write_text(json.dumps(facts), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
