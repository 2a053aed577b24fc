"""Whether the engine samples from the policy that is trained: log-probs compared on fixed sequences and fresh rollouts.

After a sync, both score a few fixed sequences (`probe_every`); after a generation, the trainer scores the rollouts
anyway. Where they disagree by more than `max_logp_gap`, the run stops, and `diagnose` says why: it looks for the
mistake with which the trainer would say what the engine says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fura_rl.adapter import FuraLayer
from fura_rl.errors import FuraError
from fura_rl.rollout.merged import checkpoint_name
from fura_rl.rollout.probe import LENGTH, next_token_logprobs, probe_sequences

if TYPE_CHECKING:
    from fura_rl.trainer.grpo import FuraGRPOTrainer

EXPLAINED = 0.2  # a mistake explains a gap of which it leaves less than this share


class EngineCheck:
    """Compares a trainer with its engine, logs by how much they differ, and stops the run if it is too much.

    Args:
        trainer: Whose engine is checked. Every rank must call the same methods in the same order.

    Raises:
        FuraError: `probe_every` is negative.
    """

    def __init__(self, trainer: FuraGRPOTrainer) -> None:
        self.trainer = trainer
        self.every = trainer.args.probe_every
        if self.every < 0:
            raise FuraError(f"probe_every is a number of steps, or 0 for never, not {self.every}.")
        self.sequences_bt: torch.Tensor | None = None
        self.probed_at: int | None = None  # the step at which a probe was due last, in this process or before
        self.engine_before: torch.Tensor | None = None  # what the engine said at the last probe

    # --- fixed sequences ------------------------------------------------------------------------------------------

    def after_sync(self) -> None:
        """Probes if it is due, `probe_every` steps after the last time, and after the first sync of this process.

        Raises:
            FuraError: the log-probs differ by more than `max_logp_gap` on average.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        if (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled) and not trainer.is_in_train:
            return  # an evaluation before training, which is what spreads the model over ranks and devices
        due = self.probed_at is None or abs(step - self.probed_at) >= self.every
        if self.every and (due or self.engine_before is None):
            self.probe(log=due)  # one more after a resume must not change what the run logs
            if due:
                self.probed_at = step

    def probe(self, *, log: bool = True) -> float:
        """Compares now. Returns the mean absolute difference of log-probs, the largest of all ranks.

        Raises:
            FuraError: it is above `max_logp_gap`.
        """
        trainer = self.trainer
        if self.sequences_bt is None:
            limit = trainer.args.vllm_max_model_length or LENGTH + 1  # the engine samples one token more
            self.sequences_bt = probe_sequences(trainer.processing_class, length=min(LENGTH, limit - 1))
        engine = torch.tensor(trainer.vllm_generation.score(self.sequences_bt.tolist()))
        own = self.policy_logprobs()
        gap = (own - engine).abs().to(trainer.accelerator.device)
        if log:
            self._log({"sync/probe_gap_mean": gap.mean(), "sync/probe_gap_max": gap.max()})
        gaps = trainer.accelerator.gather(gap.mean().unsqueeze(0))  # of each rank
        worst, rank = gaps.max().item(), int(gaps.argmax())
        if self._exceeds(worst):
            cause = diagnose(self, self._of_rank(own, rank), self._of_rank(engine, rank), rank)
            raise FuraError(
                f"Engine and trainer disagree on fixed sequences after the sync at step {trainer.state.global_step}: "
                f"mean |log-prob difference| {worst:.2e} is above max_logp_gap={trainer.args.max_logp_gap}. "
                f"Likely cause: {cause}."
            )
        self.engine_before = engine
        return worst

    @torch.no_grad()
    def policy_logprobs(self) -> torch.Tensor:
        """The trainer's log-probs of the fixed sequences, (B, T - 1) on the CPU."""
        model, ids = self.trainer.model, self.sequences_bt
        assert ids is not None
        ids = ids.to(self.trainer.accelerator.device)
        was_training = model.training
        # On a CPU, bitsandbytes repacks 4-bit weights for good when they are used in eval mode.
        model.train(getattr(model, "is_quantized", False))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()  # the engine has none
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        model.train(was_training)
        return next_token_logprobs(logits, ids).cpu()

    # --- fresh rollouts -------------------------------------------------------------------------------------------

    def rollouts(self, output: dict[str, Any]) -> None:
        """Compares on what was just generated, before any clipping.

        Args:
            output: TRL's batch with `old_per_token_logps`, `sampling_per_token_logps`, `completion_mask`, each (B, T).

        Raises:
            FuraError: the log-probs differ by more than `max_logp_gap` on average.
        """
        gap_bt = output["old_per_token_logps"] - output["sampling_per_token_logps"]
        known_bt = ~torch.isnan(output["sampling_per_token_logps"])  # NaN is TRL's "the engine gave none"
        mask_bt = output["completion_mask"].bool() & known_bt
        gap = gap_bt[mask_bt] if mask_bt.any() else gap_bt.new_zeros(1)  # every rank must take part in what follows
        mean = gap.abs().mean()
        self._log(
            {
                "sync/logp_gap_mean": mean,
                "sync/logp_gap_max": gap.abs().max(),
                "sync/raw_ratio_mean": gap.exp().mean(),
                "sync/clipped_share": clipped_share(gap_bt, mask_bt, self.trainer.args),
            }
        )
        worst = self._worst(mean)
        if self._exceeds(worst):
            raise FuraError(
                f"Engine and trainer disagree: mean |log-prob difference| {worst:.2e} on fresh rollouts is above "
                f"max_logp_gap={self.trainer.args.max_logp_gap} at step {self.trainer.state.global_step}. Likely "
                "causes: weights that changed without a sync, a different dtype in the engine (vllm_engine_kwargs), or "
                "dropout in the trainer."
            )

    def _exceeds(self, gap: float) -> bool:
        limit = self.trainer.args.max_logp_gap
        return limit is not None and not gap <= limit  # NaN is no agreement

    def _log(self, metrics: dict[str, torch.Tensor]) -> None:
        mode = "train" if self.trainer.model.training else "eval"
        for name, value in metrics.items():
            self.trainer._metrics[mode][name].append(self.trainer.accelerator.gather(value).mean().item())

    def _worst(self, gap: torch.Tensor) -> float:
        return self.trainer.accelerator.gather(gap).max().item()

    def _of_rank(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        return self.trainer.accelerator.gather(tensor.to(self.trainer.accelerator.device).unsqueeze(0))[rank].cpu()

    def difference(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """Mean absolute difference, the largest of all ranks: where parameters are spread, ranks must decide alike."""
        return self._worst((a - b).abs().mean().to(self.trainer.accelerator.device))


def clipped_share(gap_bt: torch.Tensor, mask_bt: torch.Tensor, args: Any) -> torch.Tensor:
    """Share of importance ratios that the loss clips or masks: of tokens, or of rollouts in the sequence modes.

    Args:
        gap_bt: Trainer minus engine, in nats.
        mask_bt: Which of them count.
        args: With `vllm_importance_sampling_mode`, `_clip_min` and `_clip_max`.
    """
    gap_bt = gap_bt.masked_fill(~mask_bt, 0.0)
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        gap_bt, mask_bt = gap_bt.sum(-1, keepdim=True), mask_bt.any(-1, keepdim=True)
    ratio = gap_bt.exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    outside = (ratio < (0.0 if low is None else low)) | (ratio > (float("inf") if high is None else high))
    return (outside & mask_bt).sum() / mask_bt.sum().clamp(min=1)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def diagnose(check: EngineCheck, own: torch.Tensor, engine: torch.Tensor, rank: int) -> str:
    """What would make the trainer say what the engine says, in words. Costs up to a forward pass an adapted matrix.

    Args:
        check: Whose trainer is at fault, or its engine.
        own: The trainer's log-probs of the fixed sequences on the rank with the largest gap.
        engine: Those of this rank's engine.
        rank: Which one it is.
    """
    difference = check.difference
    whole = difference(own, engine)
    before = None if check.engine_before is None else check._of_rank(check.engine_before, rank)
    if before is not None and difference(before, engine) < EXPLAINED * min(whole, difference(before, own)):
        return "the sync did not reach the engine, which still has the weights of the sync before"

    def explains(change: Callable[[Any], None], layers: list[Any]) -> bool:
        with changed(layers, change):
            return difference(check.policy_logprobs(), engine) < EXPLAINED * whole

    layers = adapted_layers(check.trainer.model)
    if layers:
        with changed(list(layers.values()), switch_off):
            base = check.policy_logprobs()
        if difference(base, own) > EXPLAINED * whole:  # else the adapter has hardly moved: it is not its absence
            if difference(base, engine) < EXPLAINED * whole:
                return "the engine has the base model's weights, without the adapter"
            if explains(apply_twice, list(layers.values())):
                return "the adapter was merged twice in the engine"
            for names in [*by_decoder_layer(layers).items(), *((name, [name]) for name in layers)]:
                if explains(switch_off, [layers[name] for name in names[1]]):
                    return f"the update of {names[0]} did not reach the engine"
    return check.trainer.vllm_generation.mismatch() or (
        "another base checkpoint or dtype in the engine, or a layer with another layer's weights"
    )


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by checkpoint name."""
    return {checkpoint_name(name): m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}


def by_decoder_layer(names: Any) -> dict[str, list[str]]:
    """`{"model.layers.3": ["model.layers.3.mlp.up_proj", ...], ...}`; a name without a number is a group by itself."""
    groups: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(numbered[0] if numbered else name, []).append(name)
    return groups


@contextmanager
def changed(layers: list[Any], change: Callable[[Any], None]) -> Iterator[None]:
    """Layers with another set of active adapters for a while."""
    before = [(layer, layer._disable_adapters, layer._active_adapter) for layer in layers]
    for layer in layers:
        change(layer)
    try:
        yield
    finally:
        for layer, disabled, active in before:
            layer._disable_adapters, layer._active_adapter = disabled, active


def switch_off(layer: Any) -> None:
    layer._disable_adapters = True


def apply_twice(layer: Any) -> None:
    if isinstance(layer, FuraLayer):
        layer._active_adapter = [*layer.active_adapters, *layer.active_adapters]
