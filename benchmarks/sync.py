r"""What a sync of the merged policy into a colocated engine costs, against copying the weights once and TRL's own path.

    python benchmarks/sync.py [--model DIR_OR_NAME | --shape qwen3-1.7b] [--rounds 5] [--dtype bfloat16]

One engine in this process and one policy with FuRA on all linear layers; then the same policy with LoRA r=32.

- `copy`: every weight of the policy copied once into memory of its own, on the device: the floor.
- `merge`: the merged stream computed and dropped.
- `fura`: the merged stream loaded into the engine (after the first push: adapted tensors only, where the engine keeps
  the others; vLLM's CPU build repacks its weights and takes all of them each time).
- `trl, fura` and `trl, lora_r32`: `merge_adapter`, all parameters loaded into the engine, `unmerge_adapter`.

`drift` is the largest change that the round leaves in the trainer's base weights; `extra GiB` the peak of GPU memory
above what was allocated before. `bytes` compares what an adapter-only transport sends with the whole merged policy.
Medians over rounds; table, then JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, as a colocated one is

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.rollout import merged_weights

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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Engine:
    """A vLLM engine in this process, and how weights get into it."""

    def __init__(self, model: str, dtype: str, dummy: bool) -> None:
        from vllm import LLM

        self.llm: Any = LLM(
            model, dtype=dtype, enforce_eager=True, skip_tokenizer_init=dummy, max_model_len=512, max_num_seqs=8,
            load_format="dummy" if dummy else "auto", gpu_memory_utilization=0.4, enable_prefix_caching=False,
        )  # fmt: skip

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        if DEVICE == "cpu":  # linear weights are packed there
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            return
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        for name, tensor in weights:
            model.load_weights([(name, tensor)])


def stock_stream(model: PeftModel) -> Iterator[tuple[str, torch.Tensor]]:
    """What TRL 1.16 sends of a PEFT model whose adapter is merged in place."""
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix not in name and "original_module" not in name:
            yield name.replace("modules_to_save.default.", ""), parameter.data


def stock_sync(model: PeftModel, engine: Engine) -> None:
    model.merge_adapter()
    engine.load(stock_stream(model))
    model.unmerge_adapter()


def policy(source: str, dtype: torch.dtype, config: Any, dummy: bool) -> PeftModel:
    """The model on the device, adapted, with an adapter that has moved."""
    torch.manual_seed(0)
    if dummy:
        with torch.device(DEVICE):
            base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=dtype)
    else:
        base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(DEVICE)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def base_tensors(model: PeftModel) -> list[torch.Tensor]:
    return [p.data for name, p in model.named_parameters() if model.prefix not in name]


def measure(name: str, action: Callable[[], object], model: PeftModel, rounds: int) -> dict[str, Any]:
    """Median seconds, extra memory and drift of `rounds` rounds after one of warm-up."""
    before = [tensor.to("cpu", copy=True) for tensor in base_tensors(model)]
    seconds, extra = [], 0.0
    for number in range(rounds + 1):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
        started = time.perf_counter()
        action()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            extra = max(extra, (torch.cuda.max_memory_allocated() - allocated) / 2**30)
        if number:
            seconds.append(time.perf_counter() - started)
    drift = max(float((a - b.cpu()).abs().max()) for a, b in zip(before, base_tensors(model), strict=True))
    return {"row": name, "seconds": statistics.median(seconds), "all": seconds, "extra_gib": extra, "drift": drift}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of a weight sync into a colocated engine.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint or hub name")
    source.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16" if DEVICE == "cuda" else "float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model
        if arguments.shape:
            path = str(Path(folder) / "model")
            Qwen3Config(**SHAPES[arguments.shape], architectures=["Qwen3ForCausalLM"]).save_pretrained(path)
        rows, sizes = run(path, dtype, arguments)
    print_table(rows, sizes, arguments)


def fura_rows(engine: Engine, model: PeftModel, rounds: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    twins = [torch.empty_like(tensor) for tensor in base_tensors(model)]

    def copy_all() -> None:
        for twin, tensor in zip(twins, base_tensors(model), strict=True):
            twin.copy_(tensor)

    def merge_only() -> None:
        for _ in merged_weights(model):
            pass

    rows = [measure("copy", copy_all, model, rounds)]
    twins.clear()
    rows.append(measure("merge", merge_only, model, rounds))
    engine.load(merged_weights(model))
    only_adapted = DEVICE == "cuda"
    rows.append(measure("fura", lambda: engine.load(merged_weights(model, only_adapted=only_adapted)), model, rounds))
    rows.append(measure("trl, fura", lambda: stock_sync(model, engine), model, rounds))
    sizes = {
        "merged": sum(tensor.numel() * tensor.element_size() for _, tensor in merged_weights(model)),
        "adapter": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
    }
    return rows, sizes


def run(path: str, dtype: torch.dtype, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, int]]:
    dummy = arguments.shape is not None
    engine = Engine(path, arguments.dtype, dummy)
    config = FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    rows, sizes = fura_rows(engine, policy(path, dtype, config, dummy), arguments.rounds)
    lora = policy(path, dtype, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"), dummy)
    rows.append(measure("trl, lora_r32", lambda: stock_sync(lora, engine), lora, arguments.rounds))
    return rows, sizes


def print_table(rows: list[dict[str, Any]], sizes: dict[str, int], arguments: argparse.Namespace) -> None:
    floor = rows[0]["seconds"]
    table = Table("sync", "seconds", "x copy", "extra GiB", "drift of the base")
    for row in rows:
        extra = f"{row['extra_gib']:.2f}" if DEVICE == "cuda" else "-"
        table.add_row(
            row["row"], f"{row['seconds']:.4f}", f"{row['seconds'] / floor:.2f}", extra, f"{row['drift']:.1e}"
        )
    Console().print(table)
    share = sizes["adapter"] / sizes["merged"]
    print(f"bytes: merged {sizes['merged']:,}, adapter {sizes['adapter']:,} ({share:.2%})")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {os.cpu_count()} cores"
    print(
        json.dumps(
            {
                "model": arguments.model or arguments.shape,
                "dtype": arguments.dtype,
                "device": device,
                "rows": rows,
                "bytes": sizes,
            }
        )
    )


if __name__ == "__main__":
    main()
