"""What is learnt on a quantised base: the part of `quantized.py` that fine-tunes on solutions."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time

import bitsandbytes as bnb
import solutions
import step_methods
import torch
from nf4 import METHODS, device_name, nf4_error, quantise
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.table import Table
from solutions import held_out_loss, read
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    """A run's numbers, or in `failed` why it was stopped."""
    train, test = data
    torch.manual_seed(seed)
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model = step_methods.with_adapter(copy.deepcopy(METHODS[name]))(model).train()
    started = time.perf_counter()
    result = dict(method=name, rate=rate, seed=seed, failed=None)
    try:
        losses = solutions.fine_tune(
            model,
            train,
            lambda step: rate * min(1.0, (step + 1) / args.warmup),
            steps=args.steps,
            batch=args.batch,
            seed=seed,
            strict=True,
        )
    except FloatingPointError as error:
        result |= {"failed": str(error)}
    else:
        result |= {"seconds": time.perf_counter() - started, "train": torch.stack(losses[-20:]).mean().item()}
        result |= {"held_out": held_out_loss(model, test, args.batch)} | layer_errors(model)
        result |= {"trainable": sum(p.numel() for p in model.parameters() if p.requires_grad)}
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
    start = held_out_loss(model, data[1], args.batch)
    print(json.dumps(dict(before=start, nf4_error=base_error)), file=sys.stderr, flush=True)
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
            if failed := [run for run in runs if run["failed"]]:
                why = f"{len(failed)} of {len(runs)} failed; seed {failed[0]['seed']}, {failed[0]['failed']}"
                table.add_row(name, f"{rate:g}", why, *["-"] * 5)
                continue
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
