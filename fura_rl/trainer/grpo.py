"""`FuraGRPOTrainer`: TRL's GRPO with a FuRA policy, a trusted rollout engine, a bounded verifier and benchmarks.

How it departs from `trl.GRPOTrainer` (1.16):
- the policy is wrapped with FuRA adapters unless another `peft_config` is given;
- merged weights are streamed into vLLM, and the trainer's weights never change (`fura_rl.rollout`);
- after each sync and each generation the engine's log-probs are compared with the trainer's (`engine_check`), and a
  gap stops the run;
- runs resume exactly (`resumable`), and what has gone wrong stops, skips or rolls back (`guards`);
- rewards are `fura_rl.rewards` by name, and the verifier that grades rollouts also grades the benchmarks;
- `evaluate()` samples benchmarks once on the live engine instead of averaging losses of batches.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl.trainer import grpo_trainer

from fura_rl.adapter import FuraConfig
from fura_rl.adapter.multipliers import Store, keep_multipliers
from fura_rl.adapter.split_bases import split_bases
from fura_rl.availability import vllm_problem
from fura_rl.errors import FuraError
from fura_rl.eval import evaluate, load_benchmark
from fura_rl.prompts import load_prompt
from fura_rl.rewards import MathVerifier, extract_answer, load_rewards
from fura_rl.rollout.client import ServerLostError
from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.trainer.benchmarks import benchmark_sampling, make_sampler
from fura_rl.trainer.callbacks import BenchmarkCallback
from fura_rl.trainer.clock import PhaseClock
from fura_rl.trainer.config import FuraGRPOConfig
from fura_rl.trainer.engine_check import EngineCheck
from fura_rl.trainer.fsdp_precision import keep_adapter_whole
from fura_rl.trainer.guards import GuardCallback, load_guards
from fura_rl.trainer.report_page import save_answers
from fura_rl.trainer.resumable import ResumableGRPOTrainer

logger = logging.getLogger(__name__)


def fura_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The trained tensors of FuRA's layers, by name."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".fura_" in name]


class FuraGRPOTrainer(ResumableGRPOTrainer):
    """GRPO of a FuRA-adapted causal language model with verifiable rewards.

    Args:
        model: A model, or the name or path of one.
        reward_funcs: TRL reward functions; `args.rewards` by name if None.
        args: The configuration.
        train_dataset: Rows with `prompt` (as TRL wants it) and `answer`, see `fura_rl.data`.
        peft_config: The adapter; FuRA on all linear layers if None. Not used if `model` is a `PeftModel`.
        full_finetuning: Train every weight of `model`, without an adapter.
        verifier: The judge of answers; one is made (and closed with `close()`) if None.
        **kwargs: Further arguments of `trl.GRPOTrainer`.

    Raises:
        FuraError: The engine and the trainer disagree on log-probs by more than `args.max_logp_gap`, or a guard stopped
            the run.
    """

    _tag_names = ["trl", "grpo", "fura"]  # noqa: RUF012 (TRL's own class attribute)

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: FuraGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        *,
        peft_config: PeftConfig | None = None,
        full_finetuning: bool = False,
        verifier: MathVerifier | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or FuraGRPOConfig(output_dir="runs/grpo")
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1 and args.world_size == 1:
            raise FuraError(
                f"The launcher started {started} processes, but each would train alone; on CPUs, set "
                "ACCELERATE_USE_CPU=true."
            )
        assert not isinstance(args.guards, str)  # the configuration has parsed it
        guards = load_guards(args.guards)
        if args.use_vllm and (problem := vllm_problem()):
            logger.warning("vLLM cannot be imported (%s): transformers generates the rollouts, slowly.", problem)
            args.use_vllm = False
        if peft_config is None and not full_finetuning and not isinstance(model, PeftModel):
            peft_config = FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        self._last_loaded_step: int = -1  # TRL sets it where it uses vLLM
        self.clock = PhaseClock()
        self.seconds_before = 0.0  # of the run before it was resumed
        self._began = time.time()
        self.generated_tokens = 0
        self.evaluations: list[dict[str, Any]] = []
        self.verifier = verifier or MathVerifier(workers=args.verifier_workers, timeout=args.verifier_timeout)
        self._grades = reward_funcs is None
        self._multipliers: Store = {}  # since the last optimiser step
        if reward_funcs is None:
            reward_funcs = load_rewards(
                args.rewards, verifier=self.verifier, max_completion_length=args.max_completion_length
            )
        assert not isinstance(args.vllm_engine_kwargs, str)  # the configuration has parsed it
        engine = partial(
            FuraVLLMGeneration,
            engine_kwargs=args.vllm_engine_kwargs,
            transport=args.vllm_transport,
            push=args.vllm_push,
            rounding=args.sync_rounding,
            sleep_level=args.vllm_sleep_level,
        )
        # With padding masks its backward pass gives NaN at some lengths on an H100 (pytorch#196678, since torch 2.11).
        torch.backends.cuda.enable_cudnn_sdp(False)
        trained = {name: p.data for name, p in fura_parameters(model)} if isinstance(model, PeftModel) else {}
        # TRL names the engine's class inside its constructor, and puts the adapter into the model there
        with patch.object(grpo_trainer, "VLLMGeneration", engine), split_bases(args.device):
            super().__init__(
                model, reward_funcs, args=args, train_dataset=train_dataset, peft_config=peft_config, **kwargs
            )
        for name, parameter in fura_parameters(self.model):  # TRL casts adapters of quantised models to bfloat16
            if parameter.dtype == torch.bfloat16:
                parameter.data = trained.get(name, parameter.data.float())
        if self.is_fsdp_enabled and isinstance(self.model, PeftModel):
            keep_adapter_whole(self.accelerator)
        self.engine_check = EngineCheck(self)
        self.benchmarks = [
            load_benchmark(name, data_dir=args.benchmark_data_dir, limit=args.benchmark_limit)
            for name in args.benchmarks
        ]
        if self.benchmarks:
            self.add_callback(BenchmarkCallback(self, args.benchmark_steps))
        if self.is_deepspeed_enabled:  # it steps inside of backward: a step cannot be left out, nor state put back
            guards = {name: replace(guard, action="stop") for name, guard in guards.items()}
        self.gradient_norm = 0.0
        self.guards = GuardCallback(self, guards)
        self.add_callback(self.guards)

    # --- rollouts -------------------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._generate(*args, **kwargs)
        except ServerLostError as error:
            last = self.last_checkpoint
            then = f"go on from {last} with --resume_from_checkpoint latest" if last else "begin anew"
            raise FuraError(
                f"{error} This was at step {self.state.global_step + 1}: start it again and {then}."
            ) from error

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.sync_engine()
        if self._grades:
            self.verifier.start(wait=False)  # ready when the rollouts are; otherwise the first answer for algebra waits
        with self.clock.phase("generate"):
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        self.generated_tokens += sum(len(ids) for ids in completion_ids)
        return completion_ids, logprobs

    def sync_engine(self) -> None:
        """Push the merged policy to the engine, if a step was made since the last push, and compare the two."""
        if self.use_vllm and self.state.global_step != self._last_loaded_step:
            with self.clock.phase("sync"):
                self.vllm_generation.sync_weights()
            with self.clock.phase("probe"):
                self.engine_check.after_sync()
            self._last_loaded_step = self.state.global_step

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self.clock.phase("logprobs"):  # what is neither generation nor reward: the trainer's own log-probs
            output = super()._generate_and_score_completions(inputs)
        if "sampling_per_token_logps" in output and "old_per_token_logps" in output:
            self.engine_check.rollouts(output)
        self._save_completions(inputs)
        return output

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.clock.phase("reward"):
            rewards = super()._calculate_rewards(*args, **kwargs)
        if self.model.training:
            self.guards.check_rewards(rewards, self.reward_func_names)
        return rewards

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.clock.phase("train"):
            with keep_multipliers(self._multipliers):
                loss = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:  # the optimiser's step is next, or was
                self._multipliers.clear()
            if loss.is_cuda and (self.accelerator.sync_gradients or self.args.logging_nan_inf_filter):
                # What is still queued belongs to this phase. transformers waits for it next, to look at the loss or at
                # the gradient's norm.
                torch.cuda.synchronize()
        self.last_loss = loss
        return loss

    # --- what survives --------------------------------------------------------------------------------------------

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        self.gradient_norm = float(norm)
        return norm

    def progress(self) -> dict[str, Any]:
        """Counters and evaluations that a resumed run gets back."""
        return {
            **super().progress(),
            "generated_tokens": self.generated_tokens,
            "seconds": self.clock.snapshot(),
            "elapsed": time.time() - self._began + self.seconds_before,
            "evaluations": self.evaluations,
            "guards": self.guards.state(),
            "probed_at": self.engine_check.probed_at,
        }

    def restore_progress(self, state: dict[str, Any]) -> None:
        super().restore_progress(state)
        self.generated_tokens = state["generated_tokens"]
        self.clock.seconds.update(state["seconds"])
        self.seconds_before = state["elapsed"]
        self.evaluations = state["evaluations"]
        self.guards.restore(state["guards"])
        self.engine_check.probed_at = state.get("probed_at")

    # --- files ----------------------------------------------------------------------------------------------------

    def _save_completions(self, inputs: list[dict[str, Any]]) -> None:
        """Write a sample of this generation's rollouts to `completions/step_NNNNNN.jsonl`, one a line."""
        keep = self.args.saved_completions
        if not keep or not self.accelerator.is_main_process or not self.model.training:
            return
        rows = []
        newest = len(inputs)  # the logs hold every rank's rollouts; the first ones are this rank's
        offset = max(len(self._logs["prompt"]) - newest * self.accelerator.num_processes, 0)
        for i in range(min(keep, newest)):
            completion = self._logs["completion"][offset + i]
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            rows.append(
                {
                    "step": self.state.global_step + 1,
                    "prompt": self._logs["prompt"][offset + i],
                    "completion": text,
                    "answer": inputs[i].get("answer"),
                    "extracted": extract_answer(text),
                    "rewards": {name: values[offset + i] for name, values in self._logs["rewards"].items()},
                    "advantage": self._logs["advantages"][offset + i],
                }
            )
        folder = Path(self.args.output_dir) / "completions"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{self.state.global_step + 1:06d}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    # --- benchmarks -----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the benchmarks on the live engine; without benchmarks, TRL's own evaluation runs.

        Returns:
            `eval_<benchmark>_accuracy`, `_low`, `_high` (95% interval), `_truncated`, `_no_answer` (shares) and
            `_mean_tokens` of each benchmark.
        """
        if not self.benchmarks:
            return super().evaluate(*args, **kwargs)
        self.sync_engine()
        was_training = self.model.training
        self.model.eval()
        with self.clock.phase("evaluate"):
            with make_sampler(self) as sampler:
                metrics = self._run_benchmarks(sampler) if self.accelerator.is_main_process else {}
            (metrics,) = broadcast_object_list([metrics])  # every rank decides alike which checkpoint is best
        self.model.train(was_training)
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # evaluated: not due any more
        return metrics

    def _run_benchmarks(self, sampler: Any) -> dict[str, float]:
        result = evaluate(
            sampler,
            self.processing_class,
            self.benchmarks,
            prompt=load_prompt(self.args.prompt),
            sampling={b.name: benchmark_sampling(self.args, b.name) for b in self.benchmarks},
            verifier=self.verifier,
            progress=False,
        )
        scores = {name: score.to_dict() for name, score in result.scores.items()}
        self.evaluations.append({"step": self.state.global_step, "scores": scores})
        save_answers(self.args.output_dir, self.state.global_step, self.benchmarks, result.samples)
        keys = ("accuracy", "low", "high", "truncated", "no_answer", "mean_tokens")
        return {f"eval_{name}_{key}": score[key] for name, score in scores.items() for key in keys}

    def close(self) -> None:
        """End the verifier's processes."""
        self.verifier.close()
