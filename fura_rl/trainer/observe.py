"""What a run writes about itself while it goes on, beside its metrics: phase times, memory, how far layers have moved.

- Every log entry gets `time/<phase>` (seconds since the entry before) and `memory/*` (GiB), so that `metrics.jsonl` and
  the trackers have them too.
- `run.json` says at the start what runs: options, versions, devices, number of steps, process.
- `layers.jsonl` gets a line about every twentieth of the run: the relative norm of each layer's update.
- `report.html` is written again when it is due; writing it takes at most about 0.3% of the run's time. While the run
  goes on it shows a part of a long run's completions, so that the trainer's memory does not grow with them.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from fura_rl.adapter import FuraLayer
from fura_rl.rewards.memory import peak_mib
from fura_rl.trainer.parts import whole_numel
from fura_rl.trainer.report import versions, write_summary
from fura_rl.trainer.report_page import LIVE_TEXT, RUN_FACTS, write_report

if TYPE_CHECKING:
    from fura_rl.trainer.grpo import FuraGRPOTrainer

MAX_REPORT_SHARE = 0.003  # of the run's time
LAYER_LINES = 20  # lines of layers.jsonl in a run


class ObserverCallback(TrainerCallback):
    """Adds times and memory to each log entry and keeps `run.json`, `layers.jsonl` and `report.html` up to date.

    Example:
        ```py
        >>> ObserverCallback(trainer, Path("runs/mine"), options).attach()
        ```

    Args:
        trainer: Whose phases are measured.
        output: The run's directory.
        options: The resolved options, for `run.json`.
    """

    def __init__(self, trainer: FuraGRPOTrainer, output: Path, options: dict[str, Any]) -> None:
        self.trainer = trainer
        self.output = output
        self.options = options
        self._seconds: dict[str, float] = {}  # of each phase, at the last log entry
        self._report_due = 0.0

    def attach(self) -> None:
        """Registers ahead of the other callbacks, which would otherwise see a log entry before it is complete."""
        self.trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        trainable = whole_numel(p for p in self.trainer.model.parameters() if p.requires_grad)
        facts = {
            "config": self.options,
            "all_options": args.to_dict(),  # hides tokens
            "versions": versions(),
            "devices": devices(),
            "processes": args.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
            "first_step": state.global_step,
            "max_steps": state.max_steps,
            "trainable_parameters": trainable,
        }
        write_summary(self.output / RUN_FACTS, **facts)
        if not state.global_step:
            (self.output / "layers.jsonl").write_text("", encoding="utf-8")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Everything that belongs to the step before has been written by now."""
        if state.is_world_process_zero and time.monotonic() >= self._report_due:
            started = time.monotonic()
            write_report(self.output, LIVE_TEXT)
            now = time.monotonic()
            self._report_due = now + (now - started) / MAX_REPORT_SHARE

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        every = max(state.max_steps // LAYER_LINES, 1)
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        if state.is_world_process_zero and due and (norms := relative_norms(self.trainer.model)):
            rounded = {name: float(f"{norm:.4g}") for name, norm in norms.items()}
            with (self.output / "layers.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "relative_norm": rounded}) + "\n")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None:
            return
        now = self.trainer.clock.snapshot()
        added = {f"time/{name}": round(total - self._seconds.get(name, 0.0), 4) for name, total in now.items()}
        self._seconds = now
        logs.update({name: value for name, value in added.items() if value > 0})
        logs.update(memory())


def memory() -> dict[str, float]:
    """Peaks since the start of the process, and what the GPU holds now, in GiB."""
    found = {"memory/process_peak_gib": round(peak_mib() / 1024, 3)}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["memory/gpu_used_gib"] = round((total - free) / 2**30, 3)  # every process on it, the engine's too
        found["memory/gpu_torch_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return found


def devices() -> list[str]:
    """The accelerators of this process, or the CPU with its number of threads."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"CPU, {torch.get_num_threads()} of {os.cpu_count()} threads"]


@torch.no_grad()
def relative_norms(model: nn.Module) -> dict[str, float]:
    """`|W' - W| / |W|` (Frobenius) of each adapted layer, from the adapter's own tensors: `W` is not read.

    With `W_j = U_j diag(sigma_j) V_j^T` and `W'_j = W_j (I + D_j)`, the norm of the update of a block is that of
    `diag(sigma_j) V_j^T D_j`, which is `diag(sigma_j) dR_j + diag(ds_j) (V_j^T + dR_j)`, or `dR_j` itself if it
    carries the singular values. Layers whose basis is not the SVD of their weight (random, identity, refreshed) and
    sharded parameters (ZeRO-3, FSDP) are left out.
    """
    norms: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, FuraLayer):
            continue
        for blocks in layer.named_blocks(layer.active_adapters[:1]):
            if blocks.sigma is None or blocks.basis is None or blocks.fold is not None or _is_sharded(blocks.core):
                continue
            core = blocks.core if blocks.side == "input" else blocks.core.mT
            update = core if blocks.singular_values == "merged" else blocks.sigma.unsqueeze(-1) * core  # (n, b, b)
            if blocks.scale is not None:
                update = update.addcmul(blocks.scale.unsqueeze(-1), blocks.basis.mT + core)
            norms[name.removeprefix("base_model.model.")] = update.norm() / blocks.sigma.norm()
    if not norms:
        return {}
    device = next(iter(norms.values())).device
    values = torch.stack([norm.to(device) for norm in norms.values()])  # one wait for the device, not one a layer
    return dict(zip(norms, values.tolist(), strict=True))


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") or parameter.dim() != 3
