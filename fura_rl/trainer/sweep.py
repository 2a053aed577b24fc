"""`fura-rl sweep`: methods x learning rates x seeds in the same trainer, on the same data, and what came out.

A sweep is a YAML file:

    recipe: configs/demo.yaml            # what all runs share; `options` changes it
    output_dir: runs/sweep
    options: {max_steps: 40}
    methods:                             # a name, or a name with options of its own
      fura: {learning_rate: [1.0e-3, 2.0e-3]}
      lora: {learning_rate: [1.0e-3, 3.0e-3], lora_r: 8}
    seeds: [1, 2, 3]

A list below a method makes one run for each of its values, in `output_dir/<name>`. Runs with a colocated vLLM engine
share a process and that engine, one after the other; others have a process of their own. What is done is not made
again, what was interrupted goes on from its last checkpoint, and what was begun with other options is refused. What
ran out of memory beside other runs of a GPU (`--jobs`) is made again at the end, alone.
`--only N` makes one run, for the arrays of a scheduler; the table reads whatever is there.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from statistics import fmean
from typing import Annotated, Any

import typer
import yaml

from fura_rl.errors import FuraError, last_error
from fura_rl.trainer.checkpoints import list_checkpoints
from fura_rl.trainer.sweep_results import plot_sweep, summarise, sweep_table
from fura_rl.trainer.sweep_worker import RunWorker, can_share

KEYS = {"recipe", "output_dir", "options", "methods", "seeds"}
RECIPE = "sweep_recipe.yaml"  # in a run's folder: with which options it was begun


@dataclass(frozen=True)
class SweepRun:
    """One training run of a sweep."""

    method: str
    setting: str  # the values of its lists, such as "learning_rate=0.001"
    seed: int
    options: dict[str, Any]
    folder: Path

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the finished run wrote; None before."""
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        summary = json.loads(path.read_text(encoding="utf-8"))
        return summary if summary["steps"] >= self.options["max_steps"] else None

    def curve(self) -> list[tuple[int, float]]:
        """(step, held-out accuracy), the mean over benchmarks, of each evaluation."""
        evaluations = (self.summary or {}).get("evaluations", [])
        return [(e["step"], fmean(score["accuracy"] for score in e["scores"].values())) for e in evaluations]


def plan_sweep(path: Path) -> list[SweepRun]:
    """Every run that a sweep's file asks for, in order.

    Raises:
        FuraError: The file cannot be read, does not say what is needed, or has changed since a run of it was begun.
    """
    if not path.is_file():
        raise FuraError(f"There is no sweep file {path}.")
    sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(sweep, dict) or set(sweep) - KEYS or not {"recipe", "output_dir", "methods"} <= set(sweep):
        raise FuraError(f"{path} needs the keys recipe, output_dir and methods, and may have options and seeds.")
    recipe_path = Path(sweep["recipe"])
    if not recipe_path.is_file():
        raise FuraError(f"{path}: there is no recipe {recipe_path}.")
    common = {**yaml.safe_load(recipe_path.read_text(encoding="utf-8")), **sweep.get("options", {})}
    if not common.get("benchmarks") or "max_steps" not in common:
        raise FuraError(f"{path}: a sweep compares held-out accuracy at equal steps: set benchmarks and max_steps.")
    methods = sweep["methods"]
    if not isinstance(methods, dict):
        methods = {name: {} for name in methods}
    runs = []
    for name, own in methods.items():
        own = {"method": name, **(own or {})}
        lists = {key: value for key, value in own.items() if isinstance(value, list)}
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            setting = ",".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                               for key, value in chosen.items())  # fmt: skip
            for seed in sweep.get("seeds", [1]):
                folder = Path(sweep["output_dir"]) / "-".join(filter(None, [name, setting, f"seed={seed}"]))
                options = {**common, **own, **chosen, "seed": seed, "output_dir": str(folder)}
                runs.append(SweepRun(name, setting, seed, options, folder))
    for run in runs:
        check_unchanged(run)
    return runs


def check_unchanged(run: SweepRun) -> None:
    """Refuse a run that was begun with other options: its result would stand in the table for these.

    Raises:
        FuraError: Some differ.
    """
    path = run.folder / RECIPE
    if not path.is_file():
        return
    begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    begun.pop("resume_from_checkpoint", None)
    changed = sorted(key for key in begun.keys() | run.options.keys() if begun.get(key) != run.options.get(key))
    if changed:
        raise FuraError(
            f"{run.folder} was begun with other values of {', '.join(changed)}: set them back, give the sweep another "
            "output_dir, or remove that folder."
        )


class Slot:
    """Where runs are made one after the other: on a GPU, or on the CPU.

    Args:
        gpu: The only one that the runs may see; None leaves that as it is.
        threads: Of the CPU; None leaves that as it is.
        share_engine: Make runs with a colocated engine in one process, which starts the engine once.
        number: Of the slot: what engines compile when they start together is kept apart.
    """

    def __init__(
        self, gpu: int | None = None, threads: int | None = None, share_engine: bool = True, number: int = 0
    ) -> None:
        self.environment = dict(os.environ)
        if number:
            usual = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "vllm")
            cache = Path(os.environ.get("VLLM_CACHE_ROOT", usual)).expanduser()
            self.environment["VLLM_CACHE_ROOT"] = str(cache / f"sweep-{number}")
        if gpu is not None:
            self.environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        if threads is not None:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.share_engine = share_engine
        self.worker = RunWorker(self.environment)

    def make(self, run: SweepRun) -> bool:
        """Make a run, or go on with it; its output goes to `log.txt`. Returns whether it is done."""
        run.folder.mkdir(parents=True, exist_ok=True)
        options = dict(run.options)
        if list_checkpoints(run.folder):
            options["resume_from_checkpoint"] = "latest"
        recipe, log = run.folder / RECIPE, run.folder / "log.txt"
        recipe.write_text(yaml.safe_dump(options), encoding="utf-8")
        if self.share_engine and can_share(options):
            status = self.worker.make(recipe, log)
        else:
            self.worker.close()  # its engine's memory is needed
            if self.worker.interrupted:  # maybe while that took its time
                return False
            command = [sys.executable, "-m", "fura_rl.train_grpo", "--config", str(recipe)]
            with log.open("a", encoding="utf-8") as output:
                status = subprocess.run(
                    command, stdout=output, stderr=subprocess.STDOUT, env=self.environment
                ).returncode
        done = status == 0 and run.summary is not None
        if not done:
            self.worker.close()  # the next run gets a process that nothing has happened to
        return done


def why_failed(log: Path) -> str:
    """What a run's output ends with: its last line that begins with an error, if one does, and where to read on."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    error = last_error(lines)
    if error is None:
        return f"failed, see {log}"
    return f"failed: {textwrap.shorten(error.removeprefix('error: '), 120, placeholder='...')} ({log})"


def train_all(runs: list[SweepRun], gpus: int, jobs: int = 1, share_engine: bool = True) -> list[SweepRun]:
    """Make the runs that are missing, `jobs` at a time on each GPU, or on the CPU; returns those that failed."""
    places = [gpu for gpu in (range(gpus) if gpus else [None]) for _ in range(jobs)]
    threads = max((os.cpu_count() or 1) // len(places), 1) if jobs > 1 else None
    slots = [Slot(gpu, threads, share_engine, number) for number, gpu in enumerate(places)]
    free: Queue[Slot] = Queue()
    for slot in slots:
        free.put(slot)

    def make(run: SweepRun) -> bool:
        slot = free.get()
        try:
            done = slot.make(run)
        finally:
            free.put(slot)
        curve = run.curve()
        outcome = f"accuracy {curve[0][1]:.3f} -> {curve[-1][1]:.3f}" if curve else why_failed(run.folder / "log.txt")
        print(f"{run.folder.name}: {outcome}", flush=True)
        return done

    missing = [run for run in runs if run.summary is None]
    missing.sort(key=lambda run: run.seed)  # a sweep that is stopped has compared all methods with its first seeds
    print(f"{len(runs)} runs, {len(runs) - len(missing)} done before", flush=True)
    try:
        with ThreadPoolExecutor(len(slots)) as pool:
            try:
                return [run for run, good in zip(missing, pool.map(make, missing), strict=True) if not good]
            except BaseException:  # Ctrl-C reaches the runs of a terminal by itself; it may have come to this one only
                for slot in slots:
                    slot.worker.interrupt()
                raise
    finally:
        for slot in slots:
            slot.worker.close()


def retry_alone(failed: list[SweepRun], gpus: int, share_engine: bool) -> list[SweepRun]:
    """Make those runs again that ran out of memory beside others, one at a time on a GPU; returns what still failed."""
    crowded = [run for run in failed if "out of memory" in why_failed(run.folder / "log.txt")]
    if not crowded:
        return failed
    print(f"{len(crowded)} ran out of memory beside others: again, one at a time on each GPU", flush=True)
    left = train_all(crowded, gpus, share_engine=share_engine)
    return [run for run in failed if run not in crowded or run in left]


def sweep_command(
    path: Annotated[Path, typer.Argument(metavar="SWEEP.yaml")],
    gpus: Annotated[
        int, typer.Option(help="Spread the runs over the first N GPUs of this host; 0 leaves devices as they are.")
    ] = 0,
    jobs: Annotated[
        int, typer.Option(min=1, help="Runs at a time on each GPU, or on the CPU, whose cores they share.")
    ] = 1,
    only: Annotated[
        int | None, typer.Option(help="Make only the run of this number (from 0), for a job array.")
    ] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="List the runs and whether they are done.")] = False,
    share_engine: Annotated[
        bool,
        typer.Option(help="Make runs with a colocated engine in one process, one after the other; results are equal."),
    ] = True,
    table: Annotated[bool, typer.Option("--table", help="Make no run: the table of what is done.")] = False,
) -> None:
    """Compare methods: make the runs of a sweep that are missing, then a table and plots of all of them."""
    runs = plan_sweep(path)
    if list_runs:
        for index, run in enumerate(runs):
            print(f"{index:4d} {'done' if run.summary else '    '} {run.folder.name}")
        return
    if only is not None:
        if not 0 <= only < len(runs):
            raise FuraError(f"{path} has runs 0 to {len(runs) - 1}; there is no run {only}.")
        failed = train_all([runs[only]], gpus=0, share_engine=False)
    else:
        failed = [] if table else train_all(runs, gpus, jobs, share_engine)
        if jobs > 1:
            failed = retry_alone(failed, gpus, share_engine)
        rows = summarise(runs)
        if rows:
            folder = runs[0].folder.parent
            (folder / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
            (folder / "sweep.md").write_text(sweep_table(rows) + "\n", encoding="utf-8")
            plot_sweep(runs, rows, folder / "sweep.png")
            print(f"{sweep_table(rows)}\n{folder} (sweep.json, sweep.md, sweep.png)")
    if failed:
        names = ", ".join(run.folder.name for run in failed)
        raise FuraError(f"{len(failed)} of the sweep's runs failed ({names}): the same command tries them again.")
