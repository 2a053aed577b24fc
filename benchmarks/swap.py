r"""What it costs to change the adapter of a running server, against restarting it.

    python benchmarks/swap.py [--model DIR_OR_NAME] [--swaps 12] [--clients 4]

A server is started twice by `fura-rl serve`; both starts are timed up to the first answered request, with the adapter
merged. Then two adapters of random numbers and the base are swapped in turn: once with nobody else there, and once
while clients generate greedily without pause.

- `swap`: the call of `FuraClient.swap` or `.off`; under load it includes waiting for the requests in flight.
- `latency`: seconds that a request took, without swaps (quiet) and with them (swapping). A request that arrives during
  a swap is held, so at worst it takes a whole request and a swap longer than usual.

    python benchmarks/swap.py --per-request [--model DIR_OR_NAME] [--adapters 1 4 16]

Adapters per request instead, with engines of this process; random adapters of FuRA and LoRA:

- a mixed batch of base and FuRA rows against an engine whose weights were merged: mean difference of log-probs, for
  which 0.05 is allowed in bfloat16, and as a control that of another adapter;
- tokens a second of a full batch with 0, 1, 4 and 16 adapters in it, of an engine for FuRA and of one for LoRA r=32,
  which take turns, the median of their ratio by round, and how long a GPU works for a token of each row;
- seconds of a load of either kind, and of a swap of merged weights (`attach(llm).swap(path)`).

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from fura_rl import FuraConfig
from fura_rl.adapter import save_adapter
from fura_rl.rollout.client import FuraClient

TINY = Path(__file__).parents[1] / "examples" / "tiny" / "model"
PROMPT = list(range(5, 37))


def save_random_adapter(model: str, folder: Path, seed: int) -> None:
    """An adapter of `model` that has moved at random."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = get_peft_model(base, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    save_adapter(policy, folder)


@contextmanager
def server(model: str, adapters: Path, log: Path, dtype: str) -> Iterator[tuple[str, float]]:
    """A server with adapter `a` merged: its address, and the seconds until it had answered a request."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "fura_rl.cli", "serve", model, "--port", str(port), "--dtype", dtype]
    command += ["--max-model-len", "256", "--adapter", f"a={adapters / 'a'}", "--adapter-dir", str(adapters)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"the server ended; see {log}:\n{log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        complete(url, model)
        yield url, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()


def complete(url: str, model: str) -> float:
    """Seconds that one greedy request of 32 prompt and 32 completion tokens takes."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    httpx.post(f"{url}/v1/completions", json=body, timeout=600).raise_for_status()
    return time.perf_counter() - started


def swap_seconds(client: FuraClient, swaps: int, pause: Callable[[], None]) -> list[float]:
    """Seconds of each of `swaps` changes, b, base, a, b, ..., with `pause()` before each."""
    seconds = []
    for i in range(swaps):
        pause()
        started = time.perf_counter()
        client.off() if i % 3 == 1 else client.swap("b" if i % 3 == 0 else "a")
        seconds.append(time.perf_counter() - started)
    return seconds


@contextmanager
def load(url: str, model: str, clients: int) -> Iterator[list[float]]:
    """Clients that generate without pause; the list grows by each request's seconds."""
    latencies: list[float] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            latencies.append(complete(url, model))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    yield latencies
    done.set()
    for thread in threads:
        thread.join()


def wait_for(latencies: list[float], more: int) -> None:
    """Until `more` further requests have been answered."""
    goal = len(latencies) + more
    while len(latencies) < goal:
        time.sleep(0.01)


def measure(model: str, folder: Path, swaps: int, clients: int, dtype: str) -> dict[str, list[float]]:
    """Seconds by what was done."""
    seconds: dict[str, list[float]] = {"server start": []}
    with server(model, folder, folder / "first.log", dtype) as (_, start):
        seconds["server start"].append(start)
    with server(model, folder, folder / "second.log", dtype) as (url, start):
        seconds["server start"].append(start)
        client = FuraClient(url)
        swap_seconds(client, 3, lambda: None)  # base weights are read once
        seconds["swap, nobody there"] = swap_seconds(client, swaps, lambda: None)
        with load(url, model, clients) as latencies:
            wait_for(latencies, 2 * clients)  # warm
            begin = len(latencies)
            wait_for(latencies, 8 * clients)
            seconds["latency, quiet"] = latencies[begin:]
        with load(url, model, clients) as latencies:
            wait_for(latencies, clients)
            begin = len(latencies)
            seconds["swap, under load"] = swap_seconds(client, swaps, lambda: wait_for(latencies, clients))
            seconds["latency, swapping"] = latencies[begin:]
    return seconds


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY))
    parser.add_argument("--swaps", type=int, default=12)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--dtype", default="float32" if not torch.cuda.is_available() else "bfloat16")
    parser.add_argument("--per-request", action="store_true")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=128, help="rows of a batch")
    parser.add_argument("--tokens", type=int, default=192, help="generated by each row")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory", type=float, default=0.2, help="share of a GPU's memory for one engine")
    parser.add_argument("--keep", default="device", help="where attach(llm) keeps base weights")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="of --per-request")
    parser.add_argument("--together", action="store_true", help="also FuRA beside LoRA in one batch")
    options = parser.parse_args()
    if options.per_request:
        from per_request import run

        print(json.dumps(run(options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed, name in enumerate("ab"):
            save_random_adapter(options.model, folder / name, seed)
        size = (folder / "a" / "adapter_model.safetensors").stat().st_size
        seconds = measure(options.model, folder, options.swaps, options.clients, options.dtype)

    place = "CUDA" if torch.cuda.is_available() else "CPU"
    name = "tiny" if options.model == str(TINY) else Path(options.model).name
    table = Table(title=f"{name}, {options.dtype}, {place}, {options.clients} clients, adapter {size / 2**20:.1f} MiB")
    for column in ("seconds", "median", "slowest", "times"):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    for what, values in seconds.items():
        table.add_row(what, f"{statistics.median(values):.3f}", f"{max(values):.3f}", str(len(values)))
    Console(width=120).print(table)
    rows = {
        what: {"median": statistics.median(values), "slowest": max(values), "times": len(values)}
        for what, values in seconds.items()
    }
    print(json.dumps({"model": name, "dtype": options.dtype, "place": place, "adapter_bytes": size, "seconds": rows}))


if __name__ == "__main__":
    main()
