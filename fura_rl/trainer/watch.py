"""`fura-rl watch RUN_DIR`: what a run's `report.html` shows, live in a terminal.

It reads the run's files only, so it works for a run that was started elsewhere on the same file system. It ends with
the run: when `summary.json` is written, or when the run's process, if it is one of this machine, is gone.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fura_rl.trainer.report_page import Run, read_run

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # of a sparkline, in characters
RECENT = 10  # steps from which the remaining time is estimated

# Label, metric, format.
ROWS = (
    ("reward", "reward", ".3f"),
    ("completion length, tokens", "completions/mean_length", ".0f"),
    ("cut off", "completions/clipped_ratio", ".1%"),
    ("entropy, nats a token", "entropy", ".3f"),
    ("log-prob gap, mean", "sync/logp_gap_mean", ".2e"),
    ("log-prob gap, max", "sync/logp_gap_max", ".2e"),
    ("KL, nats a token", "kl", ".2e"),
    ("gradient norm", "grad_norm", ".2e"),
    ("GPU memory, GiB", "memory/gpu_used_gib", ".1f"),
    ("main memory, GiB", "memory/process_peak_gib", ".1f"),
)


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Values as bars between their least and greatest; more than `width` of them are averaged in equal parts."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def seconds_left(run: Run) -> float | None:
    """Seconds to the last step, at the mean speed of the last steps; None before the second one."""
    recent = run.steps[-RECENT:]
    if len(recent) < 2 or "max_steps" not in run.facts:
        return None
    a_step = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
    return (run.facts["max_steps"] - recent[-1]["step"]) * a_step


def ended(run: Run) -> str | None:
    """How the run ended, in words, or None if it goes on."""
    if run.summary is not None:
        done, total = run.summary.get("steps", 0), run.facts.get("max_steps", 0)
        reason = f": {run.summary['error']}" if run.summary.get("error") else ""
        return "finished" if done >= total and not reason else f"stopped after step {done} of {total}{reason}"
    if run.facts.get("host") == socket.gethostname() and not _is_alive(run.facts["pid"]):
        return "its process is gone and has left no summary: killed, or out of memory"
    return None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def frame(run: Run) -> Group:
    """One picture of the run."""
    done = run.steps[-1]["step"] if run.steps else 0
    title = Text(str(run.path), style="bold", no_wrap=True, overflow="ellipsis")
    head = Text(f"step {done} of {run.facts.get('max_steps', '?')}")
    end, left = ended(run), seconds_left(run)
    if end is not None:
        head.append(f"   {end}", style="bold")
    elif left is not None:
        head.append(f"   {timedelta(seconds=round(left))} left")
    return Group(title, head, *(table for table in (_metrics(run), _accuracy(run), _phases(run)) if table.row_count))


def _metrics(run: Run) -> Table:
    table = Table("metric", "last", "first", "course", box=None, header_style="dim")
    for label, key, form in ROWS:
        values = [row[key] for row in run.steps if isinstance(row.get(key), (int, float)) and row[key] == row[key]]
        if values:
            table.add_row(label, format(values[-1], form), format(values[0], form), sparkline(values))
    return table


def _accuracy(run: Run) -> Table:
    shown = run.evaluations if len(run.evaluations) <= 4 else [run.evaluations[0], *run.evaluations[-3:]]
    table = Table("accuracy, 95% interval", *(f"step {e['step']}" for e in shown), box=None, header_style="dim")
    for name in dict.fromkeys(name for e in shown for name in e["scores"]):
        scores = [e["scores"].get(name) for e in shown]
        table.add_row(Text(name), *(_score(score) if score else "" for score in scores))
    return table


def _score(score: dict[str, Any]) -> Text:
    return Text(f"{score['accuracy']:.3f} [{score['low']:.3f}, {score['high']:.3f}]\ncut off {score['truncated']:.0%}")


def _phases(run: Run) -> Table:
    """Seconds a step by phase, mean of the last steps."""
    recent = run.steps[-RECENT:]
    table = Table("seconds a step", "mean", "share", "", box=None, header_style="dim")
    means = {
        key.removeprefix("time/"): sum(row.get(key, 0.0) for row in recent) / len(recent)
        for key in dict.fromkeys(key for row in recent for key in row if key.startswith("time/"))
        if key != "time/evaluate"
    }
    total = sum(means.values())
    for name, mean in sorted(means.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{mean:.2f}", f"{mean / total:.0%}", "█" * round(WIDTH * mean / total))
    return table


def watch_command(
    run_dir: Annotated[Path, typer.Argument(help="The output_dir of a training run.")],
    every: Annotated[float, typer.Option(help="Seconds between two pictures.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
) -> None:
    """Follow a run in the terminal until it ends: fura-rl watch runs/demo."""
    console = Console()
    run = read_run(run_dir)
    if once or ended(run) is not None:
        console.print(frame(run))
        return
    try:
        if console.is_terminal:
            with Live(frame(run), console=console, auto_refresh=False) as live:
                for later in _until_it_ends(run, every):
                    live.update(frame(later), refresh=True)
        else:  # a file or a pipe: a picture a step
            console.print(frame(run))
            shown = len(run.steps)
            for later in _until_it_ends(run, every):
                if len(later.steps) > shown or ended(later) is not None:
                    console.print(frame(later))
                    shown = len(later.steps)
    except KeyboardInterrupt:
        console.print(f"The run goes on. Its page: {run_dir / 'report.html'}")


def _until_it_ends(run: Run, every: float) -> Iterator[Run]:
    while ended(run) is None:
        time.sleep(every)
        run = read_run(run.path)
        yield run
