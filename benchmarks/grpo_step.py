"""A whole GRPO step by phase, for several training methods: generate, reward, sync, log-probs, train, other.

    python benchmarks/grpo_step.py [--config configs/qwen2.5-0.5b-gsm8k.yaml] [--model M] [--dataset D]
        [--methods fura lora full]

Runs the recipe as a sweep would, `--steps` steps for each method, one after another in a process with one engine. The
learning rate is so small that every method samples from the same weights: completions, and with them generation, are
as good as equal. Median of the steps after the first two, which warm up kernels and caches. `overhead` is everything
but generation and the model's own forward and backward passes (training and log-probs), as a share of the step. A
method's row goes to stderr when it is known; then a table, and JSON on the last line. `--tiny` is a small run on the
CPU without vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from fura_rl.trainer.sweep_worker import RunWorker

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
MODEL_PHASES = ("generate", "train", "logprobs")
PHASES = (*MODEL_PHASES, "reward", "sync", "probe", "other")


def recipe(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The recipe's options with what the benchmark changes; no evaluation, no checkpoints."""
    if args.tiny:
        problems = [sys.executable, str(ROOT / "examples/tiny/problems.py"), "--out", str(folder), "--test", "16"]
        subprocess.run(problems, check=True, stdout=subprocess.DEVNULL)
        options: dict[str, object] = {
            "model_name_or_path": str(ROOT / "examples/tiny/model"),
            "dataset_name": str(folder / "train.jsonl"),
            "prompt": "plain",
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 16,
            "use_vllm": False,
        }
    else:
        options = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))
        options = {name: value for name, value in options.items() if not name.startswith("benchmark")}
    options |= {"max_steps": args.steps, "learning_rate": 1e-12, "logging_steps": 1, "save_strategy": "no"}
    if args.model:
        options["model_name_or_path"] = args.model
    if args.dataset:
        options["dataset_name"] = args.dataset
    return options


def measure(method: str, args: argparse.Namespace, worker: RunWorker, scratch: Path) -> list[dict[str, float]]:
    """A run with the method, as `phases_of_steps` reads it."""
    folder, config, log = scratch / method, scratch / f"{method}.yaml", scratch / f"{method}.log"
    options = recipe(args, scratch) | {"method": method, "output_dir": str(folder)}
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    status = worker.make(config, log)
    print(log.read_text(encoding="utf-8"), file=sys.stderr)
    if status:
        raise SystemExit(f"the run of {method} ended with status {status}.")
    return phases_of_steps(folder / "metrics.jsonl")


def phases_of_steps(metrics: Path) -> list[dict[str, float]]:
    """Seconds by phase, and tokens, of each step after the warm-up, from a run's metrics.jsonl."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "step_time" in line]
    measured = []
    for before, line in zip(steps[WARM_UP - 1 :], steps[WARM_UP:], strict=False):
        seconds = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")}
        total = line["time"] - before["time"]
        seconds = {name: seconds.get(name, 0.0) for name in PHASES[:-1]}
        seconds["other"] = total - sum(seconds.values())
        measured.append({**seconds, "total": total, "tokens": line["num_tokens"] - before["num_tokens"]})
    return measured


def summary(method: str, steps: list[dict[str, float]]) -> dict:
    row = {name: statistics.median(step[name] for step in steps) for name in (*PHASES, "total", "tokens")}
    overhead = [1 - sum(step[name] for name in MODEL_PHASES) / step["total"] for step in steps]
    return {"method": method, **row, "overhead": statistics.median(overhead), "steps": steps}


def table(rows: list[dict], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for name in ("step s", *PHASES, "overhead", "tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row[name]:.2f}" for name in ("total", *PHASES)]
        table.add_row(row["method"], *cells, f"{row['overhead']:.1%}", f"{row['tokens']:,.0f}")
    return table


def report(args: argparse.Namespace, rows: list[dict], table: Callable[[list[dict], str], Table], width: int) -> None:
    """The table, and JSON on the last line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"{'tiny' if args.tiny else Path(args.config).stem}, {args.steps} steps, {device}"
    Console(width=width).print(table(rows, title))
    print(json.dumps(dict(title=title, command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), rows=rows)))


def recipe_parser(description: str) -> argparse.ArgumentParser:
    """With the options that `recipe` reads, but for the number of steps."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=str(ROOT / "configs/qwen2.5-0.5b-gsm8k.yaml"), help="a recipe")
    parser.add_argument("--model", help="in place of the recipe's")
    parser.add_argument("--dataset", help="in place of the recipe's")
    parser.add_argument("--tiny", action="store_true", help="a small run on the CPU")
    return parser


def main() -> None:
    parser = recipe_parser(__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["fura", "lora", "full"], metavar="METHOD")
    parser.add_argument("--steps", type=int, default=6, help=f"of each method; the first {WARM_UP} do not count")
    args = parser.parse_args()
    worker = RunWorker({**os.environ, "OMP_NUM_THREADS": "1"} if args.tiny else dict(os.environ))
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for method in args.methods:
            rows.append(summary(method, measure(method, args, worker, Path(scratch))))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        worker.close()
    report(args, rows, table, 140)


if __name__ == "__main__":
    main()
