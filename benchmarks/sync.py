r"""What a sync of the merged policy into an engine costs and how exact it is.

    python benchmarks/sync.py [--shape qwen3-1.7b] [--model DIR_OR_NAME] [--rounds 5] [--no-server] [--dtype bfloat16]

For each model, one engine in this process and, on the same device, one server (`fura-rl serve --for-training`):

- `copy`: every weight of the policy copied once into memory of its own, on the device: the floor.
- `fura`: our sync of a colocated engine, as training does it: adapted layers merged into the engine's storage.
- `fura, by name`: the same weights as a stream through vLLM's loader.
- `trl, fura` and `trl, lora_r32`: `merge_adapter`, all parameters through the loader, `unmerge_adapter`.
- `server, adapter`: what is trained is collected, sent over HTTP and merged there; the first push has the basis too.
- `server, merged`: all merged weights over NCCL, which needs a GPU for each side; with one there are bytes only.

`drift` is the largest change that the rounds leave in the trainer's base weights; `extra GiB` the peak of GPU memory
above what was allocated before. Then the mean |log-prob difference| between trainer and engine: after a sync, of tokens
decoded (by CUDA graphs, where there are any), and after sleeping; for a checkpoint also that of the base model itself
and of updates of two sizes under nearest and stochastic rounding. Medians over rounds; tables, then JSON on the last
line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, as a colocated one is
sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from sync_checks import checks, move, policy_logprobs, rounding_gaps
from sync_server import SyncServer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.availability import vllm_problem
from fura_rl.rollout import merged_weights, vllm_names
from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.rollout.probe import probe_sequences

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny" / "model"  # of random models
SHAPES = {
    "qwen3-1.7b": dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=4096,
    ),
    "tiny": dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, tie_word_embeddings=True, max_position_embeddings=512,
    ),
}  # fmt: skip
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ENGINE = dict(max_model_len=512, max_num_seqs=32, enable_prefix_caching=False, kv_cache_memory_bytes=2**30)
# CUDA graphs without torch.compile, which takes a minute
GRAPHS = dict(compilation_config=dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 4, 32]))
FURA = FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
LORA = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")


STARTED = time.perf_counter()


def log(*words: object) -> None:
    """What is known so far, on stderr."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s]", *words, file=sys.stderr, flush=True)


def make_checkpoint(shape: str, folder: Path, dtype: torch.dtype) -> None:
    """A model with random weights and a tokenizer of fewer tokens than it has."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        AutoModelForCausalLM.from_config(Qwen3Config(**SHAPES[shape]), dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def make_policy(path: str, dtype: torch.dtype, config: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(DEVICE)
    return move(get_peft_model(base, config), 0.01)


def make_engine(model: PeftModel, tokenizer: Any, sleeps: bool) -> FuraVLLMGeneration:
    return FuraVLLMGeneration(
        model, Accelerator(cpu=not CUDA), tokenizer, gpu_memory_utilization=0.3, enable_sleep_mode=sleeps,
        max_model_length=ENGINE["max_model_len"], max_num_seqs=ENGINE["max_num_seqs"],
        engine_kwargs={**ENGINE, "max_num_batched_tokens": 4096, **(GRAPHS if CUDA else {})},
    )  # fmt: skip


def stock_stream(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What TRL 1.16 sends of a PEFT model whose adapter is merged in place."""
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in name and "original_module" not in name:
            yield name.replace("modules_to_save.default.", ""), parameter.data


def stock_sync(model: PeftModel, engine: FuraVLLMGeneration) -> None:
    model.merge_adapter()
    if engine._packed:
        engine._load(stock_stream(model))
    else:
        for pair in stock_stream(model):
            vllm_names.model_of(engine.llm).load_weights([pair])
    model.unmerge_adapter()


def base_tensors(model: PeftModel) -> list[torch.Tensor]:
    return [p.data for name, p in model.named_parameters() if model.prefix not in name]


def measure(name: str, action: Callable[[], object], model: PeftModel, rounds: int) -> dict[str, Any]:
    """Median seconds, extra memory and drift of `rounds` rounds after two of warm-up."""
    before = [tensor.clone() for tensor in base_tensors(model)]
    seconds, extra = [], 0.0
    for number in range(rounds + 2):
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated() if CUDA else 0
        started = time.perf_counter()
        action()
        if CUDA:
            torch.cuda.synchronize()
            extra = max(extra, (torch.cuda.max_memory_allocated() - allocated) / 2**30)
        if number > 1:
            seconds.append(time.perf_counter() - started)
    log(name, statistics.median(seconds), f"extra {extra:.3f} GiB")
    drift = max(float((a - b).abs().max()) for a, b in zip(before, base_tensors(model), strict=True))
    return {"row": name, "seconds": statistics.median(seconds), "all": seconds, "extra_gib": extra, "drift": drift}


def run(
    path: str, arguments: argparse.Namespace, *, random: bool, sleeps: bool
) -> tuple[dict[str, Any], PeftModel, torch.Tensor]:
    """What was measured in this process, and what the server needs: the policy and sequences."""
    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = make_policy(path, dtype, FURA)
    rows = [measure_copy(model, arguments.rounds)]
    engine = make_engine(model, tokenizer, sleeps)
    report = {"rows": rows + fura_rows(model, engine, arguments.rounds), "gaps": {}}
    assert engine._in_place is not None and engine._in_place.complete
    ids_bt = probe_sequences(tokenizer)
    report["gaps"] = checks(model, engine, ids_bt)
    if not random:
        report["rounding"] = rounding_gaps(model, engine, ids_bt)
    log(report["gaps"], report.get("rounding"))
    lora = make_policy(path, dtype, LORA)
    report["rows"].append(measure("trl, lora_r32", lambda: stock_sync(lora, engine), lora, arguments.rounds))
    tensors = [tensor.nbytes for _, tensor in merged_weights(model)]
    report |= {"merged_bytes": sum(tensors), "largest_matrix_gib": max(tensors) / 2**30}
    return report, model, ids_bt


def measure_copy(model: PeftModel, rounds: int) -> dict[str, Any]:
    twins = [torch.empty_like(tensor) for tensor in base_tensors(model)]

    def copy_all() -> None:
        for twin, tensor in zip(twins, base_tensors(model), strict=True):
            twin.copy_(tensor)

    return measure("copy", copy_all, model, rounds)


def fura_rows(model: PeftModel, engine: FuraVLLMGeneration, rounds: int) -> list[dict[str, Any]]:
    engine.sync_weights()  # the first one, through vLLM's loader
    only_adapted = CUDA  # packed layers are reloaded whole
    return [
        measure("fura", engine.sync_weights, model, rounds),
        measure("fura, by name", lambda: engine._load(engine._stream(only_adapted=only_adapted)), model, rounds),
        measure("trl, fura", lambda: stock_sync(model, engine), model, rounds),
    ]


def print_report(name: str, report: dict[str, Any]) -> None:
    floor = report["rows"][0]["seconds"]
    table = Table("sync", "seconds", "x copy", "extra GiB", "drift of the base", "bytes", title=name)
    for row in report["rows"]:
        extra = f"{row['extra_gib']:.3f}" if CUDA else "-"
        cells = f"{row['seconds']:.4f}", f"{row['seconds'] / floor:.2f}", extra, f"{row['drift']:.1e}", "-"
        table.add_row(row["row"], *cells)
    table.add_row("server, merged", "-", "-", "-", "-", f"{report['merged_bytes']:,}")
    Console(width=120).print(table)
    print(f"largest matrix {report['largest_matrix_gib']:.3f} GiB")
    print("gap in nats: " + ", ".join(f"{where} {value:.2e}" for where, value in report["gaps"].items()))
    for row in report.get("rounding", ()):
        print(f"relative update {row['update']:.4f}, {row['rounding']:>10}: gap {row['gap']:.5f}")


def print_server(name: str, report: dict[str, Any]) -> None:
    server, floor = report["server"], report["rows"][0]["seconds"]
    share = server["bytes"] / report["merged_bytes"]
    print(
        f"{name}, server, adapter: {server['seconds']:.4f} s ({server['seconds'] / floor:.1f} x copy), "
        f"{server['bytes']:,} bytes ({share:.2%} of merged), gap {server['gap']:.2e}; "
        f"the first push {server['first_seconds']:.4f} s, {server['first_bytes']:,} bytes",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a weight sync, and how exact it is.")
    parser.add_argument("--model", nargs="*", default=[], help="checkpoints or hub names")
    parser.add_argument("--shape", nargs="*", default=[], choices=SHAPES, help="random weights of these shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16" if CUDA else "float32")
    parser.add_argument("--no-server", action="store_true")
    arguments = parser.parse_args()
    if problem := vllm_problem():
        parser.error(f"vLLM cannot be imported: {problem}")
    reports: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = {shape: str(folder / shape) for shape in arguments.shape}
        for shape, path in paths.items():
            make_checkpoint(shape, Path(path), getattr(torch, arguments.dtype))
        paths |= {Path(model).name: model for model in arguments.model}
        servers: dict[str, SyncServer] = {}
        for name, path in paths.items() if not arguments.no_server else ():
            servers[name] = stack.enter_context(SyncServer(path, folder / f"{name}.log", arguments.dtype))
        measured = {}
        for name, path in paths.items():
            log(name)
            sleeps = CUDA and name == list(paths)[-1]  # vLLM: one such engine a process
            reports[name], *measured[name] = run(path, arguments, random=name in arguments.shape, sleeps=sleeps)
            print_report(name, reports[name])
        for name, server in servers.items():
            model, ids_bt = measured[name]
            reports[name]["server"] = server.measure(move(model, 0.01), ids_bt, policy_logprobs, arguments.rounds)
            print_server(name, reports[name])
            if server.has_nccl:
                tokenizer = AutoTokenizer.from_pretrained(paths[name])
                merged = server.measure_merged(move(model, 0.01), tokenizer, ids_bt, arguments.rounds)
                far = float((policy_logprobs(model, ids_bt) - torch.tensor(merged.pop("logprobs"))).abs().mean())
                reports[name]["server_merged"] = {**merged, "gap": far}
                print(f"{name}, server, merged: {merged['seconds']:.4f} s, gap {far:.2e}", flush=True)
    device = torch.cuda.get_device_name() if CUDA else f"CPU, {os.cpu_count()} cores"
    print(json.dumps({"dtype": arguments.dtype, "device": device, "vllm": vllm_names.version(), "models": reports}))


if __name__ == "__main__":
    main()
