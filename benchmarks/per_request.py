"""Adapters per request in one process: `python benchmarks/swap.py --per-request`, whose text says what is measured."""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from fura_rl import FuraConfig
from fura_rl.adapter import save_adapter
from fura_rl.rollout.vllm_names import WORKER_EXTENSION

TOLERANCE = {"bfloat16": 0.05, "float32": 1e-4}  # mean |log-prob difference| to merged weights
RANK = 32
DISTINCT = 4  # adapters on disk of each kind; further slots hold the same ones again
PROMPT_TOKENS = 32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Sampled = tuple[list[int], list[float]]


def save_adapters(model: str, folder: Path) -> None:
    """Random adapters: `fura0` in full, `fura1` and further as their delta, `lora0` and further."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for kind, config in {
        "fura": FuraConfig(target_modules=LINEAR, task_type="CAUSAL_LM"),
        "lora": LoraConfig(r=RANK, target_modules=LINEAR, init_lora_weights=False),
    }.items():
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        policy = get_peft_model(base, config)
        for number in range(DISTINCT):
            torch.manual_seed(number)
            with torch.no_grad():
                for parameter in policy.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.02)
            if kind == "lora":
                policy.save_pretrained(folder / f"lora{number}")
            else:
                save_adapter(policy, folder / f"fura{number}", "full" if number == 0 else "delta")


class Engine:
    """A `vllm.LLM` of this process; with tensor parallelism, its workers are processes of their own.

    Args:
        settings: Of adapters per request; None for an engine without LoRA.
        eager: Without torch.compile and CUDA graphs.
    """

    def __init__(self, options: argparse.Namespace, settings: dict[str, Any] | None, eager: bool = False) -> None:
        from vllm import LLM

        from fura_rl.rollout.multi_settings import MultiSettings

        slots = max(options.adapters)
        lora: dict[str, Any] = {}
        if settings is not None:
            os.environ.update(MultiSettings(**settings).to_environment())
            rank = RANK if settings.get("with_lora", True) else 1
            lora = dict(enable_lora=True, max_loras=slots, max_cpu_loras=2 * slots, max_lora_rank=rank)
        if not eager and torch.cuda.is_available():
            sizes = sorted({1, 8, 16, 32, 64, options.requests})
            lora["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        started = time.perf_counter()
        self.llm = LLM(
            options.model, dtype=options.dtype, enforce_eager=eager or not torch.cuda.is_available(),
            max_model_len=512, max_num_seqs=options.requests, max_num_batched_tokens=8192, seed=0,
            enable_prefix_caching=False, gpu_memory_utilization=options.memory,
            tensor_parallel_size=options.tensor_parallel_size, worker_extension_cls=WORKER_EXTENSION, **lora,
        )  # fmt: skip
        self.start_seconds = time.perf_counter() - started

    def generate(self, prompts: list[list[int]], requests: list[Any], tokens: int) -> list[Sampled]:
        """Greedy tokens and their log-probs, all in one batch, each row with its own adapter."""
        from vllm import SamplingParams

        options = SamplingParams(max_tokens=tokens, temperature=0, logprobs=0, ignore_eos=True)
        inputs: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(inputs, options, lora_request=requests, use_tqdm=False)
        return [
            (list(out.outputs[0].token_ids), [next(iter(entry.values())).logprob for entry in out.outputs[0].logprobs])
            for out in outputs
        ]

    def run_full_batch(self, requests: list[Any], options: argparse.Namespace) -> float:
        """Seconds for a full batch whose rows have these adapters in turn."""
        from vllm import SamplingParams

        generator = torch.Generator().manual_seed(0)
        prompts: list[Any] = [
            {"prompt_token_ids": torch.randint(5, 400, (PROMPT_TOKENS,), generator=generator).tolist()}
            for _ in range(options.requests)
        ]
        chosen = [requests[i % len(requests)] for i in range(options.requests)]
        sampling = SamplingParams(max_tokens=options.tokens, temperature=0, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        self.llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - started

    def gpu_ms(self, requests: list[Any], options: argparse.Namespace) -> float:
        """Milliseconds that a GPU of this process works for one token of each row: what no busy host can change."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run_full_batch(requests, options)
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1000 / options.tokens

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()  # ends workers of other processes
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def gap(found: Sampled, merged: Sampled) -> tuple[float, int]:
    """Mean |log-prob difference| over the tokens up to and with the first that differs, and how many were equal."""
    equal = next((i for i, (a, b) in enumerate(zip(found[0], merged[0], strict=True)) if a != b), len(found[0]))
    pairs = list(zip(found[1], merged[1], strict=True))[: max(equal, 1)]
    return statistics.mean(abs(a - b) for a, b in pairs), equal


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the engines one after another and prints as it goes."""
    from fura_rl.rollout import attach
    from fura_rl.rollout.multi import load_adapter, register

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", flush=True)

    begin = time.perf_counter()
    seconds, _ = timed(save_adapters, options.model, folder)
    say(f"adapters written in {seconds:.1f} s")
    report: dict[str, Any] = {"seconds": {}, "tokens_a_second": {}, "gap": {}}
    torch.manual_seed(0)
    prompt = torch.randint(5, 400, (PROMPT_TOKENS,)).tolist()

    # merged weights: what each adapter has to answer, and the time of a swap
    engine = Engine(options, None, eager=True)
    adapters = attach(engine.llm, keep=options.keep)
    merged = {"base": engine.generate([prompt], [None], 32)[0]}
    swaps, phases = [], []
    for number in (1, 2, 3, 1, 2, 3, 0):
        swaps.append(timed(adapters.swap, folder / f"fura{number}")[0])
        phases.append(adapters.seconds)
        merged[f"fura{number}"] = engine.generate([prompt], [None], 32)[0]
    engine.close()
    say(
        f"merged engine (eager): start {engine.start_seconds:.1f} s, swaps {[round(s, 3) for s in swaps]}, last in full"
    )
    for kind, chosen in {"first": phases[:1], "later": phases[1:-1], "in full": phases[-1:]}.items():
        medians = {p: round(1000 * statistics.median(seconds[p] for seconds in chosen), 1) for p in chosen[0]}
        say(f"{kind} swap by phase, ms: {medians}")
    report["seconds"] = {"merged swap, first": swaps[0], "merged swap, later": statistics.median(swaps[1:-1])}

    register()
    engines: dict[str, tuple[Engine, list[Any]]] = {}
    for kind, settings in {"fura": {"with_lora": False}, "lora": {"with_fura": False}}.items():
        engine = Engine(options, settings)
        say(f"engine for {kind}: start {engine.start_seconds:.1f} s")
        names = [f"{kind}{number % DISTINCT}" for number in range(max(options.adapters))]
        loads, requests = zip(*[timed(load_adapter, engine.llm, name, folder / name) for name in names], strict=True)
        engines[kind] = engine, list(requests)
        report["seconds"][f"{kind} load"] = statistics.median(loads)
        say(f"{kind}: loads {[round(s, 3) for s in loads[:6]]} s" + (", the first in full" if kind == "fura" else ""))
    check(engines["fura"][0], prompt, merged, engines["fura"][1], options, report, say)
    report["rounds"] = measure_rates(engines, options, say)
    report["tokens_a_second"] = {name: statistics.median(rates) for name, rates in report["rounds"].items()}
    if torch.cuda.is_available() and options.tensor_parallel_size == 1:
        report["gpu_ms"] = {
            f"{kind} {count}": engine.gpu_ms(requests[:count] or [None], options)
            for count in (0, *options.adapters)
            for kind, (engine, requests) in engines.items()
        }
        say(f"GPU ms of a token of each row: { {name: round(ms, 3) for name, ms in report['gpu_ms'].items()} }")
    for engine, _ in engines.values():
        engine.close()

    if options.together:
        engine = Engine(options, {}, eager=True)
        names = ["fura0", "lora0", "fura1", "lora1"]
        beside = [None, *(load_adapter(engine.llm, name, folder / name) for name in names)]
        mixed = engine.generate([prompt] * 5, beside, 32)
        for name, request, found in zip(["base", *names], beside, mixed, strict=True):
            other = merged[name] if name in merged else engine.generate([prompt], [request], 32)[0]
            report["gap"][f"beside LoRA: {name}"] = gap(found, other)
        say(f"eager: {format_gaps(report['gap'], 'beside')}")
        engine.close()
    return report


def measure_rates(
    engines: dict[str, tuple[Engine, list[Any]]], options: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Tokens a second of each round, by engine and number of adapters.

    The engines take turns, in turned order, since a host that others use is a third quicker in one minute than in
    another. What a round compares was then measured within seconds.
    """
    rates: dict[str, list[float]] = {}
    for count in (0, *options.adapters):
        for number in range(options.rounds + 1):
            for kind in sorted(engines, reverse=number % 2 == 1):
                engine, requests = engines[kind]
                seconds = engine.run_full_batch(requests[:count] or [None], options)
                if number:  # the first one warms up
                    rates.setdefault(f"{kind} {count}", []).append(options.requests * options.tokens / seconds)
        found = [f"{kind} {[round(rate) for rate in rates[f'{kind} {count}']]}" for kind in engines]
        say(f"{count} adapters, tokens/s: {'; '.join(found)}")
    return rates


def check(engine: Engine, prompt: list[int], merged: dict[str, Sampled], requests: Sequence[Any],
          options: argparse.Namespace, report: dict[str, Any], say: Callable[[str], None]) -> None:  # fmt: skip
    """A mixed batch, decoded from CUDA graphs where there are any, against merged weights."""
    chosen = [None, *requests[:3]] * 4  # sixteen rows: a captured size
    names = ["base", "fura0", "fura1", "fura2"][: len(chosen) // 4]
    found = engine.generate([prompt] * len(chosen), chosen, 32)
    for name, row in zip(names * 4, found, strict=True):
        report["gap"][name] = max(report["gap"].get(name, (0.0, 32)), gap(row, merged[name]))
    report["gap"]["control: fura0 read as fura1"] = gap(found[1], merged["fura1"])
    say(f"mixed batch against merged weights: {format_gaps(report['gap'], '')}")
    worst = max(report["gap"][name][0] for name in names)
    tolerance = TOLERANCE[options.dtype]
    say(f"{'within' if worst < tolerance else 'OUTSIDE'} the tolerance of {tolerance}")


def format_gaps(gaps: dict[str, tuple[float, int]], start: str) -> str:
    parts = [
        f"{name} {mean:.2g} ({equal} tokens equal)" for name, (mean, equal) in gaps.items() if name.startswith(start)
    ]
    return "; ".join(parts)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures, prints a table, and returns the numbers."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(options, Path(temporary))
    speeds, rounds = report["tokens_a_second"], report["rounds"]
    table = Table(
        title=f"{Path(options.model).name}, {options.dtype}, tensor parallelism {options.tensor_parallel_size}, "
        f"{options.requests} rows x {options.tokens} tokens, medians of {options.rounds} rounds"
    )
    for column in ("adapters in the batch", "FuRA tokens/s", f"LoRA r={RANK} tokens/s", "FuRA / LoRA", "by round"):
        table.add_column(column, justify="right")
    report["fura_to_lora"] = {}
    for count in (0, *options.adapters):
        pairs = zip(rounds[f"fura {count}"], rounds[f"lora {count}"], strict=True)
        ratios = sorted(fura / lora for fura, lora in pairs)
        report["fura_to_lora"][count] = ratios
        fura, lora = speeds[f"fura {count}"], speeds[f"lora {count}"]
        cells = [f"{fura:,.0f}", f"{lora:,.0f}", f"{statistics.median(ratios):.2f}"]
        table.add_row(str(count) if count else "0 (base)", *cells, f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
    Console(width=120).print(table)
    return report
