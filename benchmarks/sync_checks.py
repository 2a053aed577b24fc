"""How far the engine is from the trainer, in nats a token: the exactness half of `benchmarks/sync.py`."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.rollout.probe import next_token_logprobs
from fura_rl.trainer.observe import relative_norms


@torch.no_grad()
def move(model: PeftModel, std: float) -> PeftModel:
    """Another adapter: its trained tensors drawn anew; 0 is the base model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * std
            parameter.copy_(noise if "fura" in name else parameter + noise)
    return model


@torch.no_grad()
def policy_logprobs(model: PeftModel, ids_bt: torch.Tensor) -> torch.Tensor:
    return next_token_logprobs(model(input_ids=ids_bt.to(model.device)).logits, ids_bt.to(model.device)).cpu()


def gap(model: PeftModel, engine: FuraVLLMGeneration, ids_bt: torch.Tensor) -> float:
    """Mean |log-prob difference| of trainer and engine on given tokens, in nats."""
    return float((policy_logprobs(model, ids_bt) - torch.tensor(engine.score(ids_bt.tolist()))).abs().mean())


def sample(
    engine: FuraVLLMGeneration, prompts_bt: torch.Tensor, n: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with sampled completions, (B n, T + length), and the engine's log-probs of the latter."""
    from vllm import SamplingParams

    options = SamplingParams(n=n, max_tokens=length, ignore_eos=True, logprobs=0, seed=0)
    prompts = [{"prompt_token_ids": ids} for ids in prompts_bt.tolist()]
    outputs = [o for out in engine.llm.generate(prompts, options, use_tqdm=False) for o in out.outputs]
    logprobs = [[e[t].logprob for t, e in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
    completions = torch.tensor([o.token_ids for o in outputs])
    return torch.cat([prompts_bt.repeat_interleave(n, 0), completions], 1), torch.tensor(logprobs)


def checks(model: PeftModel, engine: FuraVLLMGeneration, ids_bt: torch.Tensor) -> dict[str, float]:
    """Whether the engine has the policy's weights, after a sync and after each kind of sleep."""
    move(model, 0.02)
    engine.sync_weights()
    found = {"after a sync": gap(model, engine, ids_bt)}
    whole, decoded = sample(engine, ids_bt, 1, 32)
    found["decoded"] = float((policy_logprobs(model, whole)[:, -32:] - decoded).abs().mean())
    for level in (1, 2) if engine.enable_sleep_mode else ():
        engine.sleep_level = level
        engine.llm.sleep()
        move(model, 0.02)
        engine.sync_weights()
        found[f"after sleep {level}"] = gap(model, engine, ids_bt)
    return found


def rounding_gaps(model: PeftModel, engine: FuraVLLMGeneration, prompts_bt: torch.Tensor) -> list[dict[str, Any]]:
    """The gap of the base model itself, and of updates of two sizes, on tokens that the base has sampled."""
    move(model, 0.0)
    engine.sync_weights()
    ids_bt, _ = sample(engine, prompts_bt, 8, 96)
    rows = [{"update": 0.0, "rounding": "-", "gap": gap(model, engine, ids_bt)}]
    for std in (0.001, 0.005):
        move(model, std)
        norms = relative_norms(model).values()
        for rounding in ("nearest", "stochastic"):
            engine.rounding = rounding
            engine.sync_weights()
            size = sum(norms) / len(norms)
            rows.append({"update": size, "rounding": rounding, "gap": gap(model, engine, ids_bt)})
    engine.rounding = "nearest"
    return rows
