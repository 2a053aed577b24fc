"""What is learnt on a quantised base: the part of `quantized.py` that fine-tunes on solutions."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import step_methods
import torch
from nf4 import METHODS, device_name, nf4_error, quantise
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(path: Path, tokenizer: Any, count: int | None, limit: int) -> list[tuple[list[int], int]]:
    """Token ids of problem and solution together, and where the solution begins; too long ones are left out."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
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


def batch_of(examples: list[tuple[list[int], int]], device: torch.device) -> dict[str, torch.Tensor]:
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples])
    labels = ids.masked_fill(mask == 0, -100)
    for row, (_, start) in enumerate(examples):
        labels[row, :start] = -100
    return {key: value.to(device) for key, value in dict(input_ids=ids, attention_mask=mask, labels=labels).items()}


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: list, args: argparse.Namespace, device: torch.device) -> float:
    """Mean loss of a solution's token."""
    model.eval()
    total = count = 0.0
    for start in range(0, len(examples), args.batch):
        batch = batch_of(examples[start : start + args.batch], device)
        tokens = float((batch["labels"] != -100).sum())
        with torch.autocast(device.type, torch.bfloat16):
            total += float(model(**batch).loss) * tokens
        count += tokens
    model.train()
    return total / count


@torch.no_grad()
def layer_errors(model: nn.Module) -> dict[str, float]:
    """Size of the update, and NF4's error on the merged weight: means over the adapted layers."""
    updates, merged = [], []
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            weight = module.get_base_layer().weight
            base = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            delta = module.get_delta_weight("default").float()
            updates.append(float(delta.norm() / base.norm()))
            merged.append(nf4_error(base + delta))
    return {"update": statistics.fmean(updates), "merged": statistics.fmean(merged)}


def fine_tune(base: nn.Module, name: str, rate: float, seed: int, data: tuple, args: argparse.Namespace) -> dict:
    train, test = data
    device = next(base.parameters()).device
    torch.manual_seed(seed)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model = step_methods.with_adapter(copy.deepcopy(METHODS[name]))(model).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    losses, started = [], time.perf_counter()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / args.warmup)
        rows = [train[order[(step * args.batch + i) % len(train)]] for i in range(args.batch)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(**batch_of(rows, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    seconds = time.perf_counter() - started
    last = torch.stack(losses[-20:]).mean().item()
    held_out = held_out_loss(model, test, args, device)
    result = dict(method=name, rate=rate, seed=seed, train=last, held_out=held_out, seconds=seconds)
    result |= layer_errors(model) | {"trainable": sum(p.numel() for p in trained)}
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def loss_mode(args: argparse.Namespace) -> tuple[list[Table], list[dict]]:
    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    limit = args.sequence
    data = read(args.train, tokenizer, None, limit), read(args.test, tokenizer, args.held_out, limit)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, attn_implementation="sdpa").to(
        device
    )
    decoder = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    base_error = statistics.fmean(nf4_error(module.weight) for module in decoder)
    model = quantise(model, device, torch.bfloat16).requires_grad_(False)
    start = held_out_loss(model, data[1], args, device)
    rows = [
        fine_tune(model, name, rate, seed, data, args)
        for seed in args.seeds
        for name in args.rows
        for rate in args.rates
    ]
    where = device_name() if device.type == "cuda" else "CPU"
    title = (
        f"{args.steps} steps of {args.batch}, {where}; held-out loss before {start:.4f}; NF4's error {base_error:.4f}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("method", "rate", "held-out loss, mean (by seed)", "train", "update", "merged", "trainable", "s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in args.rows:
        for rate in args.rates:
            runs = [row for row in rows if (row["method"], row["rate"]) == (name, rate)]
            mean = {
                key: statistics.fmean(run[key] for run in runs) for key in ("held_out", "train", "update", "merged")
            }
            seconds = statistics.fmean(run["seconds"] for run in runs)
            seeds = " ".join(f"{run['held_out']:.4f}" for run in runs)
            table.add_row(
                name, f"{rate:g}", f"{mean['held_out']:.4f} ({seeds})", f"{mean['train']:.4f}", f"{mean['update']:.4f}",
                f"{mean['merged']:.4f}", f"{runs[0]['trainable']:,}", f"{seconds:.1f}",
            )  # fmt: skip
    return [table], [dict(before=start, nf4_error=base_error, rows=rows)]
