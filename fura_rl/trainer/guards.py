"""Guards: what tells a run that has gone wrong, and what happens then.

    guards:
      reward: {steps: 100}                        # other limits than the defaults
      kl: {above: 5.0, action: rollback}
      entropy: false                              # switched off

Each guard watches one thing and has an `action`:
- `stop` ends the run with a sentence; the last good checkpoint stays;
- `rollback` puts the adapter and the optimiser back to the last checkpoint from before the trouble and goes on with new
  rollouts; after `max_rollbacks` of them the guard stops the run;
- `skip` (only `nonfinite`) leaves out the optimiser step; after `steps` skipped steps in a row the guard stops the run.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from fura_rl.errors import FuraError
from fura_rl.trainer import checkpoints
from fura_rl.trainer.parts import largest_magnitude
from fura_rl.trainer.spelling import nearest

if TYPE_CHECKING:
    from fura_rl.trainer.grpo import FuraGRPOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """One guard.

    Attributes:
        meaning: What has gone wrong, for the message.
        metric: What it reads, a name in `metrics.jsonl`; None for `nonfinite`.
        below: It is wrong where the metric is at most this.
        above: It is wrong where the metric is at least this.
        steps: Steps in a row after which the guard acts; for `nonfinite`, after which skipping ends.
        action: stop, skip or rollback.
        max_rollbacks: How often the guard may roll back in a run.
    """

    meaning: str
    metric: str | None = None
    below: float | None = None
    above: float | None = None
    steps: int = 20
    action: str = "stop"
    max_rollbacks: int = 3

    def is_wrong(self, value: float) -> bool:
        """Whether a value of the metric is on the wrong side of the limit."""
        if math.isnan(value):
            return False
        return (self.below is not None and value <= self.below) or (self.above is not None and value >= self.above)


GUARDS = {
    "nonfinite": Guard("NaN or infinite values", action="skip", steps=10),
    "reward": Guard("no rollout earned a reward", "reward", below=0.0, steps=50),
    "entropy": Guard("the policy has become deterministic", "entropy", below=1e-3),
    "length": Guard("completions run into max_completion_length", "completions/clipped_ratio", above=0.99, steps=50),
    "kl": Guard("the policy has left the reference", "kl", above=10.0, steps=3),
}
SETTINGS = tuple(field.name for field in fields(Guard) if field.name not in ("meaning", "metric"))


def load_guards(changes: dict[str, Any] | None) -> dict[str, Guard]:
    """The default guards with a recipe's changes; `false` switches one off.

    Raises:
        FuraError: A guard or a setting is unknown, or a value makes no sense.
    """
    guards = dict(GUARDS)
    for name, settings in (changes or {}).items():
        if name not in GUARDS:
            raise FuraError(f"Unknown guard {name!r}{nearest(name, GUARDS) or '.'} Guards are: {', '.join(GUARDS)}.")
        if settings is False or settings is None:
            del guards[name]
            continue
        if not isinstance(settings, dict):
            raise FuraError(f"Guard {name!r} takes settings such as {{action: stop}}, or false, not {settings!r}.")
        for key in settings:
            if key not in SETTINGS:
                raise FuraError(f"Guard {name!r} has no setting {key!r}{nearest(key, SETTINGS) or '.'}")
        guard = replace(GUARDS[name], **settings)
        actions = ("stop", "rollback", "skip") if guard.metric is None else ("stop", "rollback")
        if guard.action not in actions:
            raise FuraError(f"Guard {name!r} cannot {guard.action!r}: its actions are {', '.join(actions)}.")
        for key in ("steps", "max_rollbacks", "below", "above"):
            value = getattr(guard, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise FuraError(f"Guard {name!r}: {key} is a number, not {value!r}.")
        guards[name] = guard
    return guards


class GuardCallback(TrainerCallback):
    """Watches a run. Every rank sees the same numbers and comes to the same decision.

    Args:
        trainer: Its gradients, adapter, rewards and logs are watched.
        guards: As from `load_guards`.
    """

    def __init__(self, trainer: FuraGRPOTrainer, guards: dict[str, Guard]) -> None:
        self.trainer = trainer
        self.guards = guards
        self.since: dict[str, int] = {}  # guard -> first step of the current trouble
        self.rollbacks: dict[str, int] = dict.fromkeys(guards, 0)
        self.bad_rewards: tuple[int, str] = (-1, "")  # micro-step at which the batch is used up, what is wrong with it

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON."""
        return {"since": self.since, "rollbacks": self.rollbacks, "bad_rewards": self.bad_rewards}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self.since = state["since"]
        self.rollbacks.update(state["rollbacks"])
        self.bad_rewards = tuple(state["bad_rewards"])  # type: ignore[assignment]

    def check_rewards(self, rewards_NF: torch.Tensor, names: list[str]) -> None:
        """Note rollouts whose rewards are infinite, or that no reward function could score (TRL takes these for 0)."""
        unscored_N = torch.isinf(rewards_NF).any(dim=1) | torch.isnan(rewards_NF).all(dim=1)
        if "nonfinite" in self.guards and (count := int(unscored_N.sum())):
            every = self.trainer.args.steps_per_generation * self.trainer.num_iterations
            problem = f"the rewards ({', '.join(names)}) of {count} of {len(rewards_NF)} rollouts"
            self.bad_rewards = (self.trainer._step + every, problem)

    # --- nonfinite ------------------------------------------------------------------------------------------------

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "nonfinite" not in self.guards:
            return
        trainer = self.trainer
        until, problem = self.bad_rewards
        if until <= trainer._step - trainer.current_gradient_accumulation_steps:
            problem = ""
        if not problem and not math.isfinite(trainer.gradient_norm):
            problem = "the gradient" if trainer.last_loss.isfinite() else "the loss"
        if not problem:
            self.since.pop("nonfinite", None)
            return
        step = state.global_step + 1
        first = self.since.setdefault("nonfinite", step)
        guard = self.guards["nonfinite"]
        sentence = f"NaN or infinite values in {problem} at step {step}"
        if guard.action != "skip":
            trainer.model.zero_grad()
            self._act("nonfinite", sentence, step)
        elif step - first + 1 >= guard.steps:
            self._stop("nonfinite", f"{sentence}, for {step - first + 1} steps in a row")
        else:
            logger.warning("Guard nonfinite: %s. The optimiser step is skipped.", sentence)
            trainer.model.zero_grad()  # no gradients: the optimiser leaves every parameter, and its moments, alone

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "nonfinite" not in self.guards:
            return
        accelerator = self.trainer.accelerator
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        largest = accelerator.gather(largest_magnitude(trained, accelerator.device))  # a reduction may lose NaN
        if not largest.isfinite().all():
            self.since.setdefault("nonfinite", state.global_step)
            self._act("nonfinite", f"NaN or infinite values in the adapter after step {state.global_step}", None)

    # --- what the logs tell -----------------------------------------------------------------------------------------

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, guard in self.guards.items():
            value = (logs or {}).get(guard.metric) if guard.metric else None
            if value is None:
                continue
            if not guard.is_wrong(value):
                self.since.pop(name, None)
                continue
            first = self.since.setdefault(name, state.global_step)
            lasted = state.global_step - first + 1
            if lasted >= guard.steps:
                limit = f"<= {guard.below:g}" if guard.below is not None else f">= {guard.above:g}"
                self._act(
                    name,
                    f"{guard.meaning}: {guard.metric} has been {limit} for {lasted} steps (now {value:g}) at step "
                    f"{state.global_step}",
                    state.global_step,
                )

    # --- actions ----------------------------------------------------------------------------------------------------

    def _act(self, name: str, sentence: str, step: int | None) -> None:
        guard = self.guards[name]
        if guard.action != "rollback":
            self._stop(name, sentence)
        if self.rollbacks[name] >= guard.max_rollbacks:
            self._stop(name, f"{sentence}, after {guard.max_rollbacks} rollbacks")
        checkpoint = checkpoints.newest_good(Path(self.trainer.args.output_dir), before=self.since[name])
        if checkpoint is None:
            self._stop(name, f"{sentence}, and there is no checkpoint from before to roll back to")
            return
        self.rollbacks[name] += 1
        self.since.clear()
        self.trainer.roll_back(checkpoint)
        logger.warning("Guard %s: %s. Rolled back to %s.", name, sentence, checkpoint)

    def _stop(self, name: str, sentence: str) -> None:
        last = self.trainer.last_checkpoint
        kept = f"The last checkpoint is {last}" if last else "No checkpoint was written"
        raise FuraError(
            f"Guard {name} stopped the run: {sentence}. {kept}; `guards: {{{name}: ...}}` in the recipe sets its "
            "limits, `false` switches it off."
        )
