r"""FuRA, LoRA and DoRA on an NF4 base (QFuRA, QLoRA, QDoRA): a training step's time and memory, and what is learnt.

    python benchmarks/quantized.py step [--shapes qwen3-1.7b qwen2.5-7b] [--layers 16 8]
    python benchmarks/quantized.py loss --model PATH --train gsm8k_train.jsonl --test gsm8k_test.jsonl

`step` is `train_step.py` on a base of bitsandbytes' NF4 with double quantisation and bf16 compute: decoder layers with
random weights, 8 sequences of 2,048 tokens, bf16 autocast, no head, fused AdamW. `floor` is the frozen quantised model,
forward and backward to its input. Peaks count the quantised weights once. As many layers as DoRA, the hungriest, can
hold are the same for all rows.

`loss` fine-tunes a real model on solutions (JSONL with `problem` and `solution`) for `--steps` steps at each learning
rate of `--rates` and each seed, each seed with one order of problems for all methods, and prints the loss on solutions
that are held out. Errors are Frobenius norms relative to the weight, averaged over layers: of NF4 itself (title), the
size of the update (`update`), and of NF4 on the merged weight after training (`merged`).

Both print a table, then JSON on the last line. `--tiny` runs small shapes on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import train_step
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.adapter import FuraConfig

METHODS = {
    "qfura": FuraConfig(),
    "qlora_r32": peft.LoraConfig(r=32, lora_alpha=64),
    "qlora_r64": peft.LoraConfig(r=64, lora_alpha=128),
    "qdora_r32": peft.LoraConfig(r=32, lora_alpha=64, use_dora=True),
}
LAYERS = {"qwen3-1.7b": 16, "qwen2.5-7b": 6}  # with which DoRA's step stays below 80 GiB, as far as can be foreseen
REFERENCE = "qlora_r32"


def nf4(weight: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, Any]:
    """`weight` in NF4 with double quantisation: what is stored, and its state."""
    stored = weight.to(dtype) if dtype else weight.contiguous()
    return bnb.functional.quantize_4bit(stored, quant_type="nf4", compress_statistics=True)


def nf4_error(weight: torch.Tensor) -> float:
    """`|NF4(W) - W| / |W|`."""
    rounded = bnb.functional.dequantize_4bit(*nf4(weight.float()))
    return float((rounded.float() - weight.float()).norm() / weight.float().norm())


def quantise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with each linear layer but the head in NF4, one layer at a time."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            bias = linear.bias is not None
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=dtype, device="meta")
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            layer.support_avx512bf16_for_cpu = False  # such CPUs would repack the weight at the first inference
            if bias:
                layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
            setattr(parent, name, layer)
    model.is_loaded_in_4bit = True  # PEFT looks for it
    return model.to(device)


# --- a step -----------------------------------------------------------------------------------------------------------


class QuantisedBench(train_step.Bench):
    """`train_step.Bench` on an NF4 base.

    Attributes:
        error: of NF4 on these random weights, mean over layers.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        linear = [module for module in self.base.modules() if isinstance(module, nn.Linear)]
        self.error = statistics.fmean(nf4_error(module.weight) for module in linear)
        del linear
        without = self.allocated() - sum(p.nbytes for p in self.base.parameters())
        self.base = quantise(self.base, self.device, self.dtype)
        self.base_bytes = self.allocated() - without

    def peak_gib(self, row: train_step.Row) -> float | None:
        if self.device.type == "cpu":
            return None
        return (self.base_bytes + row.own_bytes + row.extra_bytes) / 2**30


def step_mode(args: argparse.Namespace) -> tuple[list[Table], list[dict]]:
    train_step.METHODS |= {name: train_step.with_adapter(config) for name, config in METHODS.items()}
    tables, results = [], []
    for shape, layers in zip(args.shapes, args.layers or [LAYERS[shape] for shape in args.shapes], strict=True):
        settings = dict(
            vars(args), shape=shape, layers=layers, checkpointing=args.checkpointing, compile=False, fsdp=False
        )
        bench = QuantisedBench(argparse.Namespace(**settings))
        rows = train_step.summary(bench, bench.run())
        reference = next((row for row in rows if row["method"] == REFERENCE and row["ms"]), None)
        table = Table(
            title=f"{shape}, {layers} layers, {args.tokens:,} tokens in sequences of {args.sequence:,}, {device_name()}"
            + ", checkpointing" * args.checkpointing
            + f"; NF4's error {bench.error:.4f}",
            title_justify="left",
        )
        for column in ("method", "step ms", "/ QLoRA r=32", "peak GiB", "/ QLoRA r=32", "trainable", "init s"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            for key in ("ms", "peak_gib"):
                both = row[key] is not None and reference is not None and reference[key] is not None
                row[f"{key}_to_qlora"] = row[key] / reference[key] if both else None
            cells = [(row["ms"], ".1f"), (row["ms_to_qlora"], ".3f"), (row["peak_gib"], ".2f")]
            cells += [(row["peak_gib_to_qlora"], ".3f"), (row["trainable"], ",d"), (row["init_seconds"], ".2f")]
            table.add_row(row["method"], *("-" if value is None else format(value, spec) for value, spec in cells))
        tables.append(table)
        results.append(dict(shape=shape, layers=layers, nf4_error=bench.error, rows=rows))
        del bench
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return tables, results


# --- what is learnt ---------------------------------------------------------------------------------------------------


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
    model = train_step.with_adapter(copy.deepcopy(METHODS[name]))(model).train()
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


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["step", "loss"])
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--rows", nargs="+", choices=["floor", *METHODS], metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--steps", type=int, help="timed steps of each method (8); steps of training (200)")
    parser.add_argument("--sequence", type=int, help="tokens a sequence (2048); at most (512)")
    step = parser.add_argument_group("step")
    step.add_argument("--shapes", nargs="+", choices=train_step.SHAPES, default=list(LAYERS))
    step.add_argument("--layers", type=int, nargs="+", help="of each shape")
    step.add_argument("--tokens", type=int, default=16384, help="tokens a step")
    step.add_argument("--rounds", type=int, default=2, help="visits of each method")
    step.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of each decoder layer")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--model", type=Path)
    loss.add_argument("--train", type=Path)
    loss.add_argument("--test", type=Path)
    loss.add_argument("--held-out", type=int, default=256, help="solutions that are held out")
    loss.add_argument("--batch", type=int, default=16, help="solutions a step")
    loss.add_argument("--warmup", type=int, default=10, help="steps in which the learning rate rises")
    loss.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    loss.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    if args.mode == "step":
        args.steps, args.sequence = args.steps or 8, args.sequence or 2048
        args.rows = args.rows or ["floor", *METHODS]
    else:
        args.steps, args.sequence = args.steps or 200, args.sequence or 512
        args.rows = args.rows or ["qfura", REFERENCE]
        if not (args.model and args.train and args.test):
            parser.error("loss needs --model, --train and --test")
    if args.tiny:
        args.tokens, args.sequence, args.rounds = 32, 16 if args.mode == "step" else args.sequence, 2
        args.shapes, args.layers = args.shapes[:1], [1]
    return args


def main() -> None:
    args = parse()
    tables, results = step_mode(args) if args.mode == "step" else loss_mode(args)
    for table in tables:
        Console(width=120).print(table)
    print(json.dumps(dict(command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), results=results)))


if __name__ == "__main__":
    main()
