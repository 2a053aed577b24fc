"""`ResumableGRPOTrainer`: TRL's GRPO trainer, whose resumed runs go on as if nothing had stopped them.

How it departs from `trl.GRPOTrainer` (1.16) and `transformers.Trainer` (5.17):
- checkpoints appear in one piece, are verified, and the best one by any logged metric is kept (`checkpoints`);
- a resumed run also gets back what the two do not keep (`resume`): TRL alone would draw a half-used batch of rollouts
  again, start each later epoch in the order of the first, and average the loss only since the interruption;
- rollouts depend on the seed and the step, not on what else has drawn random numbers;
- no pickled `training_args.bin` is written, and the base model never.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import requests
import torch
import transformers.trainer
from accelerate.utils import load_fsdp_optimizer
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments
from trl import GRPOTrainer

from fura_rl.errors import FuraError
from fura_rl.trainer import checkpoints, fsdp_checkpoints, zero_checkpoints
from fura_rl.trainer.resume import check_shape, load_progress, read_progress, save_progress, seeded
from fura_rl.trainer.spelling import nearest


class _Restore(TrainerCallback):
    """Restores progress at the only moment at which transformers has reset its sums and not begun to add to them."""

    def __init__(self, trainer: ResumableGRPOTrainer, checkpoint: Path) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        load_progress(self.trainer, self.checkpoint)


class Rows(list):
    """The problems of a generation, for each of the micro-batches that TRL's loader hands out.

    accelerate looks for tensors in every value of every row, and there are none: at 256 rows and 8 micro-batches that
    was a third of what a step spent on neither training, generation nor rewards.
    """

    def to(self, *args: Any, **kwargs: Any) -> Rows:
        return self


class ResumableGRPOTrainer(GRPOTrainer):
    """See the module. Subclasses add state of their own through `progress` and `restore_progress`.

    Attributes:
        last_checkpoint: The newest checkpoint that this run wrote or began from, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.last_checkpoint: Path | None = None
        self._staging = False
        self._epochs_before = 0
        self._scores: dict[str, list[float]] = defaultdict(list)
        self._buffered_inputs: Any = None  # TRL's: the slices of the current generation batch
        super().__init__(*args, **kwargs)
        self.data_collator = Rows

    def progress(self) -> dict[str, Any]:
        """State of a subclass that a resumed run gets back, as JSON."""
        return {"scores": dict(self._scores)}

    def restore_progress(self, state: dict[str, Any]) -> None:
        """Take back what `progress` returned."""
        self._scores.update(state["scores"])

    # --- resuming -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is named: its path, or `latest` (or True) for the newest good one, if any.

        Raises:
            FuraError: The checkpoint is missing or damaged, or was written with options that change what a step is.
        """
        run = Path(self.args.output_dir)
        checkpoint = checkpoints.find_checkpoint(resume_from_checkpoint, run) if resume_from_checkpoint else None
        if checkpoint is None:
            return super().train(None, *args, **kwargs)
        check_shape(self, checkpoint)
        fsdp_checkpoints.check(self, checkpoint)
        self.last_checkpoint = checkpoint
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._epochs_before = math.floor(state.epoch or 0)
        restore = _Restore(self, checkpoint)
        self.add_callback(restore)
        loader = transformers.trainer.deepspeed_load_checkpoint
        if read_progress(checkpoint)["shape"]["processes"] != self.accelerator.num_processes:
            loader = zero_checkpoints.load  # DeepSpeed's own refuses
        try:
            with patch.object(transformers.trainer, "deepspeed_load_checkpoint", loader):
                return super().train(str(checkpoint), *args, **kwargs)
        finally:
            self.remove_callback(restore)

    def roll_back(self, checkpoint: Path) -> None:
        """Put adapter and optimiser back to a checkpoint; data and schedule go on, with new rollouts."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._load_from_checkpoint(str(checkpoint))
        if self.is_fsdp_enabled:
            load_fsdp_optimizer(
                self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, str(checkpoint)
            )
        elif fsdp_checkpoints.is_whole(checkpoint):
            fsdp_checkpoints.load_optimizer(self.model, self.optimizer, checkpoint)
        else:
            state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._buffered_inputs = None
        self._last_loaded_step = -1

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if fsdp_checkpoints.is_whole(Path(resume_from_checkpoint)) and not self.is_fsdp_enabled:
            return fsdp_checkpoints.load_model(model or self.model, Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint and fsdp_checkpoints.is_whole(Path(checkpoint)) and not self.is_fsdp_enabled:
            fsdp_checkpoints.load_optimizer(self.model, self.optimizer, Path(checkpoint))
            schedule = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            return self.lr_scheduler.load_state_dict(schedule)
        if self.args.device.type != "cpu":
            return super()._load_optimizer_and_scheduler(checkpoint)
        with patch.object(type(self.args), "device", torch.device("cpu")):  # torch cannot load to "cpu:0", as of ranks
            super()._load_optimizer_and_scheduler(checkpoint)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            for _ in range(self._epochs_before):  # TRL's sampler would shuffle as in the first epoch
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # transformers would make one step too many
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._generate(*args, **kwargs)
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            step, last = self.state.global_step + 1, self.last_checkpoint
            then = f"go on from {last} with --resume_from_checkpoint latest" if last else "begin anew"
            raise FuraError(f"The vLLM server is lost at step {step}: start it again and {then}.") from error

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm and self.vllm_mode == "colocate":
            self.vllm_generation.llm.reset_prefix_cache()  # an evaluation's blocks would change the last digits
        ranks = self.vllm_generation.tensor_parallel_size if self.use_vllm else 1  # these sample in lockstep
        numbers = (self.args.seed, self._step, self.accelerator.process_index // ranks)
        with seeded(*numbers, device=self.accelerator.device):
            return super()._generate_single_turn(*args, **kwargs)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        name = self.args.metric_for_best_model
        if name is None:
            return
        if isinstance(value := logs.get(name), int | float):
            self._scores[name].append(value)
        elif "loss" in logs and not name.startswith("eval_"):
            raise FuraError(f"metric_for_best_model={name} is not logged{nearest(name, logs)}.")

    def _get_output_dir(self, trial: Any) -> str:
        """While a checkpoint is written, transformers' `checkpoint-<step>` is a folder in a folder aside."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, f".checkpoint-{self.state.global_step}.partial") if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self.args.output_dir)
        step = self.state.global_step
        aside, final = checkpoints.partial_path(run, step), checkpoints.checkpoint_path(run, step)
        inner = aside / final.name
        push = self.args.push_to_hub
        scores = {name: sum(values) / len(values) for name, values in self._scores.items()}
        self._scores.clear()
        if self.accelerator.is_main_process:
            checkpoints.remove_partial(run)
        self.accelerator.wait_for_everyone()
        with checkpoints.cleaned_up(aside):
            self._staging = True
            with patch.object(self.args, "push_to_hub", False):  # not before it is in its place
                super()._save_checkpoint(model, trial)
            self._staging = False
            save_progress(self, inner)
            if self.is_deepspeed_enabled:
                zero_checkpoints.save(self.model_wrapped, inner)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                checkpoints.seal(inner, final, step=step, metrics=scores)
                aside.rmdir()
        self.last_checkpoint = final
        if self.accelerator.is_main_process:
            checkpoints.prune(run, self.args.save_total_limit, self.best_checkpoint())
        if push:
            self._push_from_checkpoint(str(final))
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """transformers knows metrics of evaluations only; see `log`."""
        return False

    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best `metric_for_best_model`, the mean of its values since the checkpoint before."""
        metric = self.args.metric_for_best_model
        if metric is None:
            return None
        return checkpoints.best_checkpoint(Path(self.args.output_dir), metric, bool(self.args.greater_is_better))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers does, which saves no adapter where FSDP writes its state in pieces."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(output_dir, state)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # A rank that only takes part in gathering has queued its part and goes on; if its process ended now, the
            # main process would wait for it for ever.
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Adapter and tokenizer, without transformers' pickled `training_args.bin`."""
        folder = output_dir or self.args.output_dir
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)
