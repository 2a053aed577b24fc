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
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import step_methods
import torch
import train_step
from nf4 import METHODS, REFERENCE, TIMED, device_name, nf4_error, quantise
from quantized_loss import loss_mode
from rich.console import Console
from rich.table import Table
from torch import nn

LAYERS = {"qwen3-1.7b": 16, "qwen2.5-7b": 6}  # with which DoRA's step stays below 80 GiB, as far as can be foreseen


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
    step_methods.METHODS |= {name: step_methods.with_adapter(config) for name, config in METHODS.items()}
    tables, results = [], []
    for shape, layers in zip(args.shapes, args.layers or [LAYERS[shape] for shape in args.shapes], strict=True):
        settings = dict(
            vars(args),
            shape=shape,
            layers=layers,
            checkpointing=args.checkpointing,
            compile=False,
            fsdp=False,
            zero=None,
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["step", "loss"])
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument("--rows", nargs="+", choices=["floor", *METHODS], metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--steps", type=int, help="timed steps of each method (8); steps of training (200)")
    parser.add_argument("--sequence", type=int, help="tokens a sequence (2048); at most (512)")
    step = parser.add_argument_group("step")
    step.add_argument("--shapes", nargs="+", choices=step_methods.SHAPES, default=list(LAYERS))
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
        args.rows = args.rows or ["floor", *TIMED]
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
