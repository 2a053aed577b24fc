r"""Methods compared in supervised fine-tuning: what is learned, over learning rates and seeds, and what is forgotten.

    python benchmarks/fine_tuning.py --model PATH --train train.jsonl --test test.jsonl --unrelated FILES
        --out rows.jsonl [--methods fura lora:lora_r=8,lora_alpha=16 full ...] [--rates 1e-3 ... | full=1e-4 ...]
        [--seeds 1 2 3] [--schedule linear]

Each run fine-tunes the checkpoint, in float32 (under bf16 autocast on a GPU), on solutions (JSONL with `problem` and
`solution`); the loss is that of a solution's token. For one seed all methods see the same examples in the same order. A
method is a name of `method:` in a recipe, with options of the adapter after a colon; the order of examples, AdamW,
warm-up and clipping are the same for all.

- `learned`: loss on held-out solutions before training minus after it.
- `forgotten`: loss on unrelated files (JSONL like the others, or plain text) after training minus before it.

Rows are added to `--out` as they are made and not made again, so that runs add up over days. The table has each
method's best rate, the loss with the rate that was best on other seeds, and all rates; 95% intervals (Student's) over
seeds. Table, then JSON on the last line.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import solutions
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from solutions import Example, held_out_loss, read
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.errors import FuraError
from fura_rl.eval.statistics import t_interval
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import adapter_config
from fura_rl.trainer.report_page import read_lines
from fura_rl.trainer.sweep_results import chosen_on_others

ADAPTERS = [5e-4, 1e-3, 2e-3, 4e-3]
RATES = {"full": [3e-5, 1e-4, 3e-4, 1e-3], "svd": [1e-4, 2.5e-4, 5e-4, 1e-3]}
SWITCHES = {"true": True, "false": False}
METHODS = ["fura", "lora", "full", "fura:basis=identity", "fura:basis=random", "dora", "pissa", "oft", "svd"]


def with_method(base: nn.Module, spec: str) -> nn.Module:
    """A copy of the model under `NAME[:option=value,...]`."""
    name, _, options = spec.partition(":")
    changes: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        changes[key] = int(value) if value.isdigit() and key != "block_size" else SWITCHES.get(value, value)
    config = adapter_config(replace(AdapterArguments(method=name), **changes))
    model = copy.deepcopy(base)
    return model if config is None else get_peft_model(model, config)


def read_unrelated(path: Path, tokenizer: Any, limit: int) -> list[Example]:
    """Examples of a JSONL file, or a text in pieces of at most `limit` tokens."""
    if path.suffix == ".jsonl":
        return read(path, tokenizer, None, limit)
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    return [(ids[start : start + limit], 1) for start in range(0, len(ids) - 1, limit)]


def fine_tune(base: nn.Module, spec: str, rate: float, seed: int, data: dict, args: argparse.Namespace) -> dict:
    torch.manual_seed(seed)
    model = with_method(base, spec).train()
    on_gpu = next(model.parameters()).is_cuda

    def losses() -> list[float]:
        return [held_out_loss(model, data[name], args.batch, autocast=False) for name in ("test", "unrelated")]

    before, started = losses(), time.perf_counter()
    solutions.fine_tune(
        model, data["train"], lambda step: rate * share_of_rate(step, args),
        steps=args.steps, batch=args.batch, seed=seed, autocast=on_gpu,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    after = losses()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dict(
        method=spec, rate=rate, seed=seed, trainable=trainable, seconds=seconds,
        before=before[0], loss=after[0], learned=before[0] - after[0], forgotten=after[1] - before[1],
    )  # fmt: skip


def share_of_rate(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step as a share of the run's: rising at first, then constant or falling to 0."""
    if step < args.warmup:
        return step / args.warmup
    return (args.steps - step) / (args.steps - args.warmup) if args.schedule == "linear" else 1.0


def summarise(rows: list[dict]) -> list[dict]:
    """One row a method, the lowest loss first."""
    by_method: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_method[row["method"]].append(row)
    summary = []
    for method, own in by_method.items():
        of_rate = {
            f"{rate:g}": [row for row in own if row["rate"] == rate] for rate in sorted({r["rate"] for r in own})
        }
        best = min(of_rate, key=lambda rate: (-len(of_rate[rate]), finite(fmean(row["loss"] for row in of_rate[rate]))))
        chosen = chosen_on_others(
            {rate: {row["seed"]: -finite(row["loss"]) for row in runs} for rate, runs in of_rate.items()}
        )
        summary.append({
            "method": method, "trainable": own[0]["trainable"], "rate": best, "seeds": len(of_rate[best]),
            "loss": mean([row["loss"] for row in of_rate[best]]),
            "chosen": mean([-value for value in chosen.values()]),
            "learned": mean([row["learned"] for row in of_rate[best]]),
            "forgotten": mean([row["forgotten"] for row in of_rate[best]]),
            "rates": {rate: [fmean(row[key] for row in runs) for key in ("loss", "forgotten")]
                      for rate, runs in of_rate.items()},
        })  # fmt: skip
    return sorted(summary, key=lambda row: row["loss"][0])


def finite(loss: float) -> float:
    """For comparisons: a run that broke is the worst."""
    return math.inf if math.isnan(loss) else loss


def mean(values: list[float]) -> list[float]:
    """Mean, and where there are several the ends of its interval."""
    return [] if not values else [fmean(values), *(t_interval(values) if len(values) > 1 else ())]


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{values[0]:.4f}" + (f" [{values[1]:.4f}, {values[2]:.4f}]" if len(values) > 1 else "")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    for name in ("train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True, help="JSONL with problem and solution")
    parser.add_argument("--unrelated", type=Path, nargs="+", required=True, help="JSONL, or plain text")
    parser.add_argument("--out", type=Path, required=True, help="JSONL that rows are added to")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME[:option=value,...]")
    parser.add_argument("--rates", nargs="+", default=[], metavar="[METHOD=]RATE", help="instead of the usual ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--schedule", choices=("constant", "linear"), default="constant", help="after the warm-up")
    parser.add_argument("--limit", type=int, default=256, help="longest example, in tokens")
    parser.add_argument("--held-out", type=int, default=128, help="examples of each file that losses are measured on")
    return parser.parse_args()


def rates_of(spec: str, asked: list[str]) -> list[float]:
    """Those for this method by name, else those for all, else the usual ones."""
    own = [rate.rpartition("=")[2] for rate in asked if rate.rpartition("=")[0] == spec]
    general = [rate for rate in asked if "=" not in rate]
    return [float(rate) for rate in own or general] or RATES.get(spec.partition(":")[0], ADAPTERS)


def main() -> None:
    args = parse()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    unrelated = [read_unrelated(path, tokenizer, args.limit) for path in args.unrelated]
    data = {
        "train": read(args.train, tokenizer, None, args.limit),
        "test": read(args.test, tokenizer, args.held_out, args.limit),
        "unrelated": [example for file in unrelated for example in file[: args.held_out // len(unrelated)]],
    }
    for name, examples in data.items():
        if not examples:
            raise FuraError(f"No example of --{name} has {args.limit} tokens or fewer: raise --limit.")
    digest = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    setting = [args.model, device, args.steps, args.batch, args.warmup, digest]
    setting += [args.schedule] if args.schedule != "constant" else []
    done = read_lines(args.out)
    rows = [row for row in done if row["setting"] == setting]
    made = {(row["method"], row["rate"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for spec in args.methods:
            for rate in rates_of(spec, args.rates):
                if (spec, rate, seed) not in made:
                    rows.append({**fine_tune(base, spec, rate, seed, data, args), "setting": setting})
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    summary = summarise(rows)
    title = f"{Path(args.model).name}, {args.steps} steps of {args.batch} examples on {device}"
    heads = ("method", "trained", "best rate", "seeds", "loss", "rate chosen on other seeds", "forgotten",
             "loss (forgotten) at each rate")  # fmt: skip
    table = Table(*heads, title=title, title_justify="left")
    for row in summary:
        every = ", ".join(f"{rate}: {loss:.4f} ({lost:+.4f})" for rate, (loss, lost) in row["rates"].items())
        table.add_row(row["method"], f"{row['trainable']:,}", row["rate"], str(row["seeds"]), cell(row["loss"]),
                      cell(row["chosen"]), cell(row["forgotten"]), every)  # fmt: skip
    Console(width=200).print(table)
    print(json.dumps(dict(title=title, command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), rows=summary)))


if __name__ == "__main__":
    try:
        main()
    except FuraError as error:
        sys.exit(f"error: {error}")
