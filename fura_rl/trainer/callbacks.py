"""What a run shows and keeps while it goes on: metrics.jsonl, a progress bar, benchmarks every N steps."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from fura_rl.trainer.signals import StopSignals

if TYPE_CHECKING:
    from fura_rl.trainer.grpo import FuraGRPOTrainer


class BenchmarkCallback(TrainerCallback):
    """Scores the benchmarks every `steps` steps (if not None) and at the end; the first time is `train_grpo`'s.

    An evaluation comes after its step's log entry and before its checkpoint.
    """

    def __init__(self, trainer: FuraGRPOTrainer, steps: int | None) -> None:
        self.trainer = trainer
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.steps is not None and state.global_step % self.steps == 0
        if due or state.global_step >= state.max_steps:
            control.should_evaluate = True


class StopCallback(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint.

    Attributes:
        signals: Armed to raise where there is nothing to save, and only noting signals while training.
        stopped: Whether training was ended so, the same on every rank. A signal that comes later ends nothing.
    """

    def __init__(self, trainer: FuraGRPOTrainer, signals: StopSignals) -> None:
        self.trainer = trainer
        self.signals = signals
        self.stopped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signals.deferred = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._any_rank_stops():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.signals.deferred:  # an evaluation within training, after its step's end
            self.on_step_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signals.deferred = False

    def _any_rank_stops(self) -> bool:
        received = self.signals.received is not None
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:  # a launcher may not reach all ranks in the same step
            flag = torch.tensor([float(received)], device=accelerator.device)
            received = bool(accelerator.reduce(flag, "sum").item())
            if received and self.signals.received is None:
                self.signals.received = "a signal to another process"
        return received


class MetricsFileCallback(TrainerCallback):
    """Appends each log to `metrics.jsonl` at once, so that a killed run keeps its history."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "time": round(time.time(), 3), **logs}) + "\n")


class ProgressCallback(TrainerCallback):
    """One bar for the run, with reward, completion length and generated tokens a second."""

    def __init__(self, trainer: FuraGRPOTrainer) -> None:
        self.trainer = trainer
        self.bar: tqdm | None = None
        self.seen = (0, 0.0)  # generated tokens and seconds of generation at the last log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="GRPO", unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is None or not logs or "reward" not in logs:
            return
        now = (self.trainer.generated_tokens, self.trainer.clock.seconds["generate"])
        tokens, seconds = now[0] - self.seen[0], now[1] - self.seen[1]
        self.seen = now
        self.bar.set_postfix(
            reward=f"{logs['reward']:.3f}",
            length=f"{logs.get('completions/mean_length', 0):.0f}",
            tok_s=f"{tokens / max(seconds, 1e-9):.0f}",
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
