"""A long run of the tiny model, watched from outside: does any process grow, or leak files or processes?

    python benchmarks/soak.py --steps 500

Trains `examples/tiny/model` as a user would, with checkpoints, benchmarks and rewards, and samples every process of the
run from /proc (Linux): resident memory, open files, threads. The first fifth of the steps is warm-up; memory's slope is
a least-squares line through the rest. Prints a table, and JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 0.2  # share of the steps
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def recipe(folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of the run."""
    problems = [sys.executable, str(ROOT / "examples/tiny/problems.py"), "--out", str(folder), "--test", "16"]
    subprocess.run(problems, check=True, stdout=subprocess.DEVNULL)
    options = {
        "model_name_or_path": ROOT / "examples/tiny/model",
        "dataset_name": folder / "train.jsonl",
        "output_dir": folder / "run",
        "prompt": "plain",
        "max_steps": args.steps,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 48,
        "learning_rate": 5e-4,
        "save_steps": 25,
        "use_vllm": args.engine == "vllm",
        "vllm_max_model_length": 256,
        "benchmarks": folder / "test.jsonl",
        "benchmark_steps": 50,
        "benchmark_max_tokens": 48,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "fura_rl/train_grpo.py"), *words]


def descendants(root: int) -> list[int]:
    """Process ids of a process and all below it."""
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        children[int(fields[1])].append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found.extend(children[pid])
    return found


def sample(pid: int) -> dict[str, Any] | None:
    """Command, memory in MiB, open files and threads of a process; None if it has ended."""
    folder = Path("/proc") / str(pid)
    try:
        command = folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
        resident = int(folder.joinpath("statm").read_text().split()[1]) * PAGE_MIB
        if not command.strip():  # it has ended, and its parent has not asked for its status yet
            return None
        threads = len(list(folder.joinpath("task").iterdir()))
        return {"command": command, "mib": resident, "files": len(os.listdir(folder / "fd")), "threads": threads}
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def role(pid: int, root: int, command: str) -> str:
    """What a process is for, from its command line."""
    if pid == root:
        return "trainer and engine"
    return "verifier" if "rewards" in command else Path(command.split()[0]).name


def last_step(metrics: Path) -> int:
    """The step of the newest whole line."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def slope(samples: list[dict[str, Any]]) -> float:
    """MiB per 100 steps, a least-squares line."""
    steps = [s["step"] for s in samples]
    if len(set(steps)) < 2:
        return 0.0
    return statistics.linear_regression(steps, [s["mib"] for s in samples]).slope * 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between samples")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.time()
        with (folder / "log").open("w") as log:
            run = subprocess.Popen(recipe(folder, args), stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        seen: dict[int, list[dict[str, Any]]] = defaultdict(list)
        while run.poll() is None:
            step = last_step(folder / "run/metrics.jsonl")
            for pid in descendants(run.pid):
                if (found := sample(pid)) is not None:
                    seen[pid].append({"step": step, **found})
            time.sleep(args.interval)
        if run.returncode:
            sys.exit((folder / "log").read_text()[-3000:])
        left = [pid for pid in seen if sample(pid) is not None]
        report(seen, run.pid, left, args, time.time() - began, last_step(folder / "run/metrics.jsonl"))


def report(
    seen: dict[int, list[dict[str, Any]]],
    root: int,
    left: list[int],
    args: argparse.Namespace,
    seconds: float,
    steps: int,
) -> None:
    """The table and the JSON line; processes of one role that followed each other share a row."""
    roles = defaultdict(list)
    for pid, samples in seen.items():
        roles[role(pid, root, samples[-1]["command"])].append(samples)
    print(f"{steps} steps in {seconds:.0f} s with {args.engine}; memory in MiB, slope in MiB per 100 steps")
    print(f"{'process':<42}{'number':>7}{'warm':>9}{'end':>9}{'slope':>8}{'files':>11}{'threads':>10}")
    rows = []
    for name, processes in roles.items():
        warm = [s for samples in processes for s in samples if WARM_UP * args.steps <= s["step"] < args.steps]
        if not warm:
            continue
        fifth = max(len(warm) // 5, 1)
        row = {
            "process": name,
            "number": len(processes),
            "warm_mib": round(statistics.median(s["mib"] for s in warm[:fifth]), 1),
            "end_mib": round(statistics.median(s["mib"] for s in warm[-fifth:]), 1),
            "slope_mib_per_100_steps": round(slope(sorted(warm, key=lambda s: s["step"])), 3),
            "files": [min(s["files"] for s in warm), max(s["files"] for s in warm)],
            "threads": [min(s["threads"] for s in warm), max(s["threads"] for s in warm)],
        }
        rows.append(row)
        files, threads = (f"{row[key][0]}..{row[key][1]}" for key in ("files", "threads"))
        print(
            f"{name:<42}{row['number']:>7}{row['warm_mib']:>9}{row['end_mib']:>9}"
            f"{row['slope_mib_per_100_steps']:>8}{files:>11}{threads:>10}"
        )
    print(f"processes left after the end: {len(left)}")
    print(
        json.dumps({"steps": steps, "seconds": round(seconds), "engine": args.engine, "left": len(left), "rows": rows})
    )


if __name__ == "__main__":
    main()
