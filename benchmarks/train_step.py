r"""One training step, side by side: FuRA, its published form, LoRA, DoRA, OFT, full fine-tuning, and the floor.

    python benchmarks/train_step.py [--shape qwen3-1.7b] [--layers 28] [--tokens 16384] [--checkpointing] [--compile]
        [--fsdp | --zero 2] [--rows lora_r32 fura]

Decoder layers of Qwen3 in the shape of a model, with random weights in bf16, under bf16 autocast as trainers run it;
without embedding and output head, which no method touches. A step is forward, backward and AdamW (fused) on `--tokens`
tokens in sequences of `--sequence`. All seven projections of a layer are adapted.

- `floor`: the frozen model forward and backward to its input. No adapter can be faster.
- `full`: all weights trained in bf16, optimiser state too. The other trained tensors are float32, as PEFT makes them.
- `published`: `W = L S R` by blocks with `L` stored in place of `W`, `S` folded into `L` in each forward, `R` and `S`
  trained in bf16: the paper's code, written out here.
- `fura`: this project with its kernels; `fura_aligned`: with blocks of powers of two; `fura_inputs`: no layer
  multiplies its weight instead of its input; `fura_torch`: without kernels.

With `--fsdp` or `--zero` every method has weights of its own: take fewer layers. Under ZeRO there is no autocast, as in
accelerate: what is trained is bf16 with float32 copies (FuRA stays in float32). DeepSpeed needs something to train: the
floor stays as it is.

All methods run in one process. Frozen weights are one copy in memory; a method's peak counts them and whatever else it
needs, and leaves out other methods and the batch. Each round visits the methods in another order, with one step of
warm-up at each visit. Table of medians, then JSON on the last line. `--tiny` runs small shapes on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from step_methods import METHODS, OWN_WEIGHTS, SHAPES, TINY, checkpoint_bytes
from step_sharding import decoder_layers, shard, zero_engine
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from fura_rl.adapter import multiplied_weight, transform


@dataclass
class Row:
    """One method: its model, and what was measured. Memory in bytes, times in ms."""

    name: str
    model: nn.Module
    init_seconds: float
    own_bytes: int = 0
    optimizer: torch.optim.Optimizer | None = None
    engine: Any = None  # DeepSpeed's, around the model
    trainable: int = 0
    checkpoint_bytes: int = 0
    step_ms: list[float] = field(default_factory=list)
    extra_bytes: int = 0  # the most that a step allocates on top of what stays
    failed: str | None = None


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.sharded = args.fsdp or args.zero is not None
        self.device = torch.device("cpu" if args.tiny else "cuda")
        self.dtype = torch.bfloat16
        shape = TINY if args.tiny else SHAPES[args.shape]
        config = Qwen3Config(
            **shape, num_hidden_layers=args.layers, vocab_size=8, max_position_embeddings=args.sequence
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            self.base = Qwen3Model._from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        self.base.requires_grad_(False)
        batch = (args.tokens // args.sequence, args.sequence, config.hidden_size)
        self.inputs = torch.randn(batch, device=self.device, dtype=self.dtype)
        self.gradient = torch.randn(batch, device=self.device, dtype=self.dtype) / self.inputs.numel() ** 0.5

    def allocated(self) -> int:
        return 0 if self.device.type == "cpu" else torch.cuda.memory_allocated()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def build(self, name: str) -> Row:
        """The method on a model that shares the frozen weights, unless it trains or shards them."""
        before = self.allocated()
        shared = {} if name == "full" or self.sharded else {id(p): p for p in self.base.parameters()}
        model = copy.deepcopy(self.base, shared)
        self.synchronize()
        start = time.perf_counter()
        model = METHODS[name](model)
        self.synchronize()
        row = Row(name, model.train(), time.perf_counter() - start, checkpoint_bytes=checkpoint_bytes(model))
        if self.args.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.args.fsdp:
            shard(model)
        if self.args.compile:
            for layer in decoder_layers(model):
                layer.compile()
        trained = [p for p in model.parameters() if p.requires_grad]
        row.trainable = sum(p.numel() for p in trained)
        if trained:
            row.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
            if self.args.zero:
                row.engine = zero_engine(model, self.args.zero, row.optimizer)
        row.own_bytes = self.allocated() - before
        return row

    def step(self, row: Row) -> None:
        # the floor has nothing to train: its backward pass runs to the input
        inputs = self.inputs.detach().requires_grad_(row.name == "floor")
        if row.engine is not None:
            hidden = row.engine(inputs_embeds=inputs, use_cache=False).last_hidden_state
            row.engine.backward((hidden * self.gradient).sum())  # it takes a loss
            row.engine.step()
            return
        with torch.autocast(self.device.type, self.dtype):
            hidden = row.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        hidden.backward(self.gradient)
        if row.optimizer is not None:
            row.optimizer.step()
            row.optimizer.zero_grad()

    def timed(self, step: Callable[[], None]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def visit(self, row: Row, steps: int) -> None:
        """One step of warm-up, then timed ones; the first visit also settles the optimiser's state."""
        transform.kernel_choice = "torch" if row.name == "fura_torch" else "auto"
        multiplied_weight.choice = "inputs" if row.name == "fura_inputs" else "auto"
        try:
            before = self.allocated()
            for _ in range(1 if row.step_ms else 3):
                self.step(row)
            row.own_bytes += self.allocated() - before
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = self.allocated()
            row.step_ms += [self.timed(lambda: self.step(row)) for _ in range(steps)]
            if self.device.type == "cuda":
                row.extra_bytes = max(row.extra_bytes, torch.cuda.max_memory_allocated() - before)
        except torch.OutOfMemoryError:
            row.failed, row.optimizer, row.engine = "out of memory", None, None
            row.model = nn.Module()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next method's sizes differ: none may fail on another's leftovers

    def run(self) -> list[Row]:
        rows = []
        for name in self.args.rows:
            rows.append(self.build(name))
            print(f"built {name} in {rows[-1].init_seconds:.2f} s", file=sys.stderr, flush=True)
        for turn in range(self.args.rounds):
            order = rows[turn % len(rows) :] + rows[: turn % len(rows)]
            for row in order[:: 1 if turn % 2 == 0 else -1]:
                if row.failed is None:
                    self.visit(row, self.args.steps // self.args.rounds)
            print(f"round {turn + 1} of {self.args.rounds}", file=sys.stderr, flush=True)
        return rows

    def peak_gib(self, row: Row) -> float | None:
        if self.device.type == "cpu":
            return None
        shared = 0 if row.name in OWN_WEIGHTS or self.sharded else sum(p.nbytes for p in self.base.parameters())
        return (shared + row.own_bytes + row.extra_bytes) / 2**30


def summary(bench: Bench, rows: list[Row]) -> list[dict]:
    measured = {row.name: statistics.median(row.step_ms) for row in rows if row.failed is None}
    results = []
    for row in rows:
        ms, peak = measured.get(row.name), None if row.failed else bench.peak_gib(row)
        results.append(
            dict(
                method=row.name,
                ms=ms,
                to_lora=ms / measured["lora_r32"] if ms and "lora_r32" in measured else None,
                to_floor=ms / measured["floor"] if ms and "floor" in measured else None,
                spread_ms=[min(row.step_ms), max(row.step_ms)] if ms else None,
                peak_gib=peak,
                trainable=row.trainable,
                checkpoint_mib=row.checkpoint_bytes / 2**20,
                init_seconds=row.init_seconds,
                failed=row.failed,
            )
        )
    return results


def table(results: list[dict], title: str) -> Table:
    columns = {
        "step ms": ("ms", ".1f"),
        "/ LoRA r=32": ("to_lora", ".3f"),
        "/ floor": ("to_floor", ".3f"),
        "peak GiB": ("peak_gib", ".2f"),
        "trainable": ("trainable", ",d"),
        "checkpoint MiB": ("checkpoint_mib", ".1f"),
        "init s": ("init_seconds", ".2f"),
    }
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for result in results:
        cells = ["-" if result[key] is None else format(result[key], spec) for key, spec in columns.values()]
        if result["failed"]:
            cells[0] = result["failed"]
        table.add_row(result["method"], *cells)
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-1.7b", help="whose decoder layers")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each method")
    parser.add_argument("--rounds", type=int, default=3, help="visits of each method")
    parser.add_argument(
        "--rows", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of each decoder layer")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each decoder layer")
    sharding = parser.add_mutually_exclusive_group()
    sharding.add_argument("--fsdp", action="store_true", help="FSDP2 on this one device")
    sharding.add_argument("--zero", type=int, choices=[1, 2, 3], help="DeepSpeed's ZeRO stage on this one device")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    args = parser.parse_args()
    if args.tiny:
        args.layers, args.tokens, args.sequence, args.steps, args.rounds = 1, 32, 16, 2, 2
        args.rows = [
            name for name in args.rows if name not in ("fura", "fura_aligned", "fura_inputs")
        ]  # kernels need a GPU
    return args


def main() -> None:
    args = parse()
    torch._dynamo.config.recompile_limit = 64  # the methods share the decoder layer's code
    bench = Bench(args)
    results = summary(bench, bench.run())
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    title = "tiny" if args.tiny else args.shape
    title += f", {args.layers} layers, {args.tokens:,} tokens in sequences of {args.sequence:,}, {device}"
    title += ", checkpointing" * args.checkpointing + ", compiled" * args.compile + ", FSDP2" * args.fsdp
    title += f", ZeRO-{args.zero}" if args.zero else ""
    Console(width=120).print(table(results, title))
    print(json.dumps(dict(title=title, command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), rows=results)))


if __name__ == "__main__":
    main()
