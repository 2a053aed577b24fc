"""A whole GRPO step on two GPUs of one host, by phase, against one GPU: ways to spread it, and a separate server.

    python benchmarks/grpo_scaling.py [--launches single ddp zero3 fsdp2 server server_merged zero2 tp2]
        [--config configs/qwen2.5-0.5b-gsm8k.yaml] [--model M] [--dataset D] [--engine recipe]

Every launch makes the same number of rollouts a step (strong scaling) with a learning rate so small that all sample
from the same weights; efficiency = t(single) / (GPUs * t). `ddp`, `zero2`, `zero3` and `fsdp2` are started by
`accelerate launch` with the shipped configurations, an engine on each GPU; `tp2` is `ddp` with one engine over both;
`server` has the trainer on one GPU and `fura-rl serve --for-training` on the other, which gets the adapter over HTTP,
`server_merged` the same with merged weights over NCCL. Phases are rank 0's: what it waits for the other is in them.
`plan` is `fura-rl plan`'s peak of training without engine and context, beside what the trainer allocated.

Rows go to stderr when they are known; then a table, and JSON on the last line. `--tiny` is a small run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from grpo_step import PHASES, ROOT, phases_of_steps, recipe, recipe_parser, report, summary
from rich.table import Table

from fura_rl.errors import last_error

CONFIGURATIONS = {name: name for name in ("ddp", "zero2", "zero3", "fsdp2")} | {"tp2": "ddp"}
SERVED = {"server": "adapter", "server_merged": "merged"}
LAUNCHES = ("single", "server", "server_merged", "ddp", "zero3", "fsdp2", "zero2", "tp2")
# What an engine does before its first token: compile, capture graphs of decoding only, or neither.
SIZES = [8, 16, 32, 64, 96, 128, 192, 256]
ENGINES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "graphs": {
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": SIZES}
    },
    "eager": {"enforce_eager": True},
}
CONTEXT = "CUDA context (estimate)"
ENGINE = "engine (its share of the GPU)"


def end(process: subprocess.Popen) -> None:
    """The process and all that it has started, torchrun's workers too, which are sessions of their own."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(started, timeout=5)  # the next launch needs their memory


def free_port() -> int:
    """As `fura_rl.train_grpo`'s, whose imports would take longer than a launch."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def devices(*numbers: int) -> dict[str, str]:
    """The environment of a process that shall see only these GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] for i in numbers)} if names else {}


def start(command: list[str], log: Path, *, gpus: dict[str, str], **environment: str) -> subprocess.Popen:
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env={**os.environ, **gpus, **environment}, stdout=file, stderr=file, start_new_session=True
        )


class Server:
    """`fura-rl serve MODEL --for-training` on the second GPU, started at once; it serves both transports."""

    def __init__(self, options: dict[str, Any], args: argparse.Namespace, folder: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "fura_rl.cli", "serve", options["model_name_or_path"], "--for-training"]
        command += ["--port", str(port), "--keep", "device", "--max-model-len", str(options["vllm_max_model_length"])]
        command += ["--dtype", "bfloat16"]
        command += [] if args.tiny else ["--max-num-seqs", str(options["vllm_engine_kwargs"]["max_num_seqs"])]
        for name, value in ({} if args.tiny else ENGINES[args.engine]).items():
            command += [f"--{name.replace('_', '-')}", *([] if value is True else [json.dumps(value)])]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"}
        if "server_merged" in args.launches:
            command += ["--weight-transfer-config", '{"backend": "nccl"}']
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        self.process = start(command, folder / "server.log", gpus=devices(1), **environment)


class Launch:
    """One way to run the recipe. Its processes import from the start, and begin when `run` opens the gate.

    Args:
        name: One of LAUNCHES.
        args: The command line.
        folder: For its files.
        server: For launches with a server.
    """

    def __init__(self, name: str, args: argparse.Namespace, folder: Path, server: Server | None) -> None:
        self.name, self.args = name, args
        self.gpus = 1 if name == "single" else 2
        self.run_folder, self.gate, self.facts = folder / name, folder / f"{name}.gate", folder / f"{name}.json"
        self.log = folder / f"{name}.log"
        options = scaled_recipe(args, folder, processes=2 if name in CONFIGURATIONS else 1)
        options["output_dir"] = str(self.run_folder)
        if name == "tp2":
            options["vllm_tensor_parallel_size"] = 2
        if server is not None:
            options |= {"vllm_mode": "server", "vllm_transport": SERVED[name], "vllm_server_base_url": server.url}
            options["vllm_group_port"] = free_port()
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(options), encoding="utf-8")
        command = [sys.executable]
        if name in CONFIGURATIONS:
            configuration = ROOT / "configs/accelerate" / f"{CONFIGURATIONS[name]}.yaml"
            command += ["-m", "accelerate.commands.launch", "--config_file", str(configuration), "--num_processes", "2"]
            command += ["--main_process_port", str(free_port())]
        command += [str(ROOT / "benchmarks/grpo_worker.py"), "--gate", str(self.gate), "--facts", str(self.facts)]
        command += ["--config", str(file)]
        gpus = devices(0, 1) if name in CONFIGURATIONS else devices(0)
        environment = {"OMP_NUM_THREADS": "1"} if args.tiny else {}
        self.process = start(command, self.log, gpus=gpus, **environment)

    def run(self) -> dict[str, Any]:
        """A row: medians of the steps after the warm-up, seconds of the launch, memory; or why there is none."""
        began = time.monotonic()
        self.gate.touch()
        try:
            status: int | str = self.process.wait(self.args.limit)
        except subprocess.TimeoutExpired:
            status = f"no end within {self.args.limit:g} s"
        row = {"launch": self.name, "gpus": self.gpus, "seconds": time.monotonic() - began}
        if status != 0 or not self.facts.exists():
            words = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
            print("\n".join(words[-60:]), file=sys.stderr)
            last = words[-1] if words else "nothing was printed"
            return {**row, "failed": f"status {status}: {(last_error(words) or last)[:300]}"}
        measured = summary(self.name, phases_of_steps(self.run_folder / "metrics.jsonl"))
        facts = json.loads(self.facts.read_text())
        parts = {name: gib for name, gib in facts["plan"].items() if name not in (CONTEXT, ENGINE)}
        gib = facts["gib"]
        peak = gib.get("training_allocated", 0.0)
        return {
            **row, **measured, "peak_gib": max(peak, gib.get("generating_allocated", 0.0)),
            "trainer_gib": peak - gib.get("engine", 0.0), "plan_gib": sum(parts.values()), **facts,
        }  # fmt: skip


def scaled_recipe(args: argparse.Namespace, folder: Path, processes: int) -> dict[str, Any]:
    """The recipe, with the same rollouts a step for any number of trainer processes."""
    options = recipe(args, folder)
    batch = 8 if args.tiny else args.batch
    rollouts = 32 if args.tiny else args.rollouts
    options |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rollouts // (batch * processes)}
    if args.tiny:
        options |= {"use_vllm": True, "vllm_max_model_length": 128, "bf16": True, "use_cpu": True}
        options["dtype"] = "bfloat16"
    else:
        options |= {"num_generations": 8, "max_completion_length": args.tokens}
        options["vllm_engine_kwargs"] = {"max_num_seqs": 256, **options.get("vllm_engine_kwargs", {})}
        options["vllm_engine_kwargs"] |= ENGINES[args.engine]
    return options


def table(rows: list[dict[str, Any]], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("launch")
    for name in ("GPUs", "step s", *PHASES, "efficiency", "tokens", "peak GiB", "trainer GiB", "plan GiB", "launch s"):
        made.add_column(name, justify="right")
    for row in rows:
        if "failed" in row:
            made.add_row(row["launch"], str(row["gpus"]), "failed")
            continue
        cells = [f"{row[name]:.2f}" for name in ("total", *PHASES)]
        efficiency = f"{row['efficiency']:.0%}" if "efficiency" in row else "-"
        cells += [efficiency, f"{row['tokens']:,.0f}"]
        cells += [f"{row[name]:.2f}" for name in ("peak_gib", "trainer_gib", "plan_gib")]
        made.add_row(row["launch"], str(row["gpus"]), *cells, f"{row['seconds']:.0f}")
    return made


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows; while one launch is measured, the next one imports."""
    rows: list[dict[str, Any]] = []
    single = args.single
    server: Server | None = None
    with ExitStack() as processes:

        def prepared(name: str) -> Launch:
            nonlocal server
            if name in SERVED and server is None:
                server = Server(scaled_recipe(args, folder, 1), args, folder)
                processes.callback(end, server.process)
            launch = Launch(name, args, folder, server if name in SERVED else None)
            processes.callback(end, launch.process)
            return launch

        upcoming: Launch | None = None
        for i, name in enumerate(args.launches):
            launch = upcoming or prepared(name)
            following = args.launches[i + 1] if i + 1 < len(args.launches) else None
            # a server that is started meanwhile needs a GPU of its own
            free = following not in SERVED or server is not None or name == "single"
            upcoming = prepared(following) if following and free and args.overlap else None
            row = launch.run()
            end(launch.process)
            if name in SERVED and following not in SERVED and server is not None:
                end(server.process)
                server = None
            if "failed" not in row:
                single = row["total"] if name == "single" else single
                if single:
                    row["efficiency"] = single / (row["gpus"] * row["total"])
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = recipe_parser(__doc__.splitlines()[0])
    parser.add_argument("--launches", nargs="+", default=list(LAUNCHES), choices=LAUNCHES, metavar="LAUNCH")
    parser.add_argument("--steps", type=int, default=5, help="of each launch; the first two do not count")
    parser.add_argument("--rollouts", type=int, default=256, help="a step, of all processes together")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion at most")
    parser.add_argument("--batch", type=int, default=32, help="rollouts of a micro-batch")
    parser.add_argument("--single", type=float, help="seconds of a step on one GPU, where it is not launched")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a launch has failed")
    parser.add_argument("--engine", choices=ENGINES, default="recipe", help="with shorter starts: graphs, eager")
    parser.add_argument("--no-overlap", dest="overlap", action="store_false", help="import when it is a launch's turn")
    args = parser.parse_args()
    if torch.cuda.device_count() == 1 and args.launches != ["single"]:
        parser.error("one GPU is visible: only --launches single can be measured")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    report(args, rows, table, 200)


if __name__ == "__main__":
    main()
