"""Fine-tuning on solutions, as the benchmarks that compare what is learnt do it: one reading, one loss, one loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# All but cuDNN's, which torch 2.11 prefers on an H100: with a mask and a length of 64 past a multiple of 128 its
# backward gives NaN where the scores of a query are all far below 0, as in a head of Qwen2.5-0.5B (pytorch#196678).
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

Example = tuple[list[int], int]  # token ids, and where those begin that the loss is taken on


def read(path: Path, tokenizer: Any, count: int | None, limit: int) -> list[Example]:
    """Token ids of problem and solution together, and where the solution begins; too long ones are left out."""
    examples = []
    for line in path.read_bytes().splitlines():  # of text they would also split at U+2028, which JSON allows
        row = json.loads(line)
        if tokenizer.chat_template:
            message = [{"role": "user", "content": row["problem"]}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        else:
            text = f"{row['problem']}\n"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        solution = tokenizer(row["solution"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(prompt) + len(solution) <= limit:
            examples.append((prompt + solution, len(prompt)))
        if len(examples) == count:
            break
    return examples


def batch_of(examples: list[Example], device: torch.device) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (_, start) in enumerate(examples):
        labels[row, :start] = -100
    return {key: value.to(device) for key, value in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: list[Example], batch: int, *, autocast: bool = True) -> float:
    """Mean loss of a token, under bf16 autocast or as the model is."""
    model.eval()
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(examples), batch):
        tensors = batch_of(examples[start : start + batch], device)
        tokens = float((tensors["labels"][:, 1:] != -100).sum())
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            total += float(model(**tensors).loss) * tokens
        count += tokens
    model.train()
    return total / count


def not_finite(model: nn.Module, loss: torch.Tensor, norm: torch.Tensor) -> str | None:
    """What is not finite after a backward pass, before clipping spreads it; None if all is.

    Of the gradients it names the last in the model's order: the first that the backward pass came to.
    """
    if not loss.isfinite():
        return "the loss is not finite"
    if norm.isfinite():
        return None
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {broken[-1]} is not finite" if broken else "the gradient's norm is not finite"


def fine_tune(
    model: nn.Module,
    examples: list[Example],
    rate_at: Callable[[int], float],
    *,
    steps: int,
    batch: int,
    seed: int,
    autocast: bool = True,
    strict: bool = False,
) -> list[torch.Tensor]:
    """AdamW on all that is trained, gradients clipped at 1; examples in an order that the seed alone decides.

    Args:
        rate_at: Learning rate of a step, from 0.
        strict: Stop at the first step whose loss or gradient is not finite.

    Returns:
        The loss of each step.

    Raises:
        FloatingPointError: With `strict`, names the step and what is not finite.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate_at(0), weight_decay=0.0)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        rows = [examples[order[(step * batch + i) % len(examples)]] for i in range(batch)]
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast), sdpa_kernel(ATTENTION):
            loss = model(**batch_of(rows, device)).loss
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if strict and (problem := not_finite(model, loss, norm)):
            raise FloatingPointError(f"step {step}, {batch} x {max(len(ids) for ids, _ in rows)} tokens: {problem}")
        nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses
