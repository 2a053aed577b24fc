"""`fura-rl eval`, `fura-rl compare` and `fura-rl overlap`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fura_rl.errors import FuraError

if TYPE_CHECKING:
    from .benchmarks import Benchmark
    from .sampling import Sampling

BENCHMARKS_HELP = "Names (math500, aime25, aime24, amc23, gsm8k, minerva_math, olympiadbench) or JSONL files."


def eval_command(
    benchmarks: Annotated[
        list[str], typer.Option("--benchmarks", "--benchmark", "-b", help=BENCHMARKS_HELP + " Comma-separated.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for results.json, samples.jsonl and report.html.")],
    model: Annotated[str | None, typer.Option(help="Model name or path (with --server: the tokenizer's).")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter to merge into the model.")] = None,
    preset: Annotated[str, typer.Option(help="paper, greedy, avg32 or long.")] = "paper",
    prompt: Annotated[
        str | None, typer.Option(help="boxed, qwen-boxed, plain or a file; the preset's if left out.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where benchmarks lie as JSONL, e.g. math500.jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first problems of each benchmark.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Override the preset; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Override the preset.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Override the preset; 0 keeps all tokens.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", "-k", help="Samples a problem.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest completion, in tokens.")] = None,
    seed: Annotated[int, typer.Option(help="From which every sample's seed is derived.")] = 0,
    engine: Annotated[str, typer.Option(help="auto, vllm or transformers.")] = "auto",
    server: Annotated[str | None, typer.Option(help="Sample from this OpenAI-compatible server.")] = None,
    server_model: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight at a server.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
    gpu_memory: Annotated[float, typer.Option(help="Share of the GPU's memory for vLLM.")] = 0.9,
    tensor_parallel: Annotated[int, typer.Option(help="GPUs of the engine.")] = 1,
    eager: Annotated[bool, typer.Option(help="No compilation: starts faster, samples slower.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time, for transformers.")] = 8,
    scratch: Annotated[Path | None, typer.Option(help="For the merged checkpoint; --out if left out.")] = None,
    workers: Annotated[int, typer.Option(help="Processes of the verifier.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer in the verifier.")] = 5.0,
) -> None:
    """Score a model on benchmarks: fura-rl eval --model Qwen/Qwen3-1.7B -b math500,aime25 --out runs/base."""
    if model is None:
        raise FuraError(
            "Name the model with --model (with --server, the model whose tokenizer and chat template apply)."
        )
    if server and adapter:
        raise FuraError("--adapter cannot be combined with --server: the server decides which weights it runs.")
    _one_of("--engine", engine, ("auto", "vllm", "transformers"))
    from .run import RunSettings, run_evaluation

    settings = RunSettings(
        model=model,
        adapter=adapter,
        benchmarks=load_all(benchmarks, data_dir, limit),
        sampling={},
        prompt=prompt or _preset(preset).prompt,
        out=out,
        server=server,
        server_model=server_model,
        concurrency=concurrency,
        engine=cast(Any, engine),
        dtype=dtype,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel,
        eager=eager,
        batch_size=batch_size,
        scratch=scratch or out,
        workers=workers,
        timeout=timeout,
        command=["fura-rl", *sys.argv[1:]],
    )
    changes = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "n": samples, "max_tokens": max_tokens}
    sampling = resolve_sampling(preset, model, [b.name for b in settings.benchmarks], {**changes, "seed": seed})
    evaluation = run_evaluation(replace(settings, sampling=sampling))
    print(evaluation.table())
    print(
        f"{evaluation.timing['tokens']:,.0f} tokens in {evaluation.timing['sample_seconds']:,.1f} s "
        f"({evaluation.timing['tokens_per_second']:,.0f} tokens/s). Report: {out / 'report.html'}"
    )


def resolve_sampling(preset: str, model: str, names: list[str], changes: dict[str, Any]) -> dict[str, Sampling]:
    """Sampling by benchmark: the preset, the model card's where the preset says so, then what the user overrides."""
    chosen = _preset(preset)
    card: dict[str, Any] = {}
    if chosen.from_model_card:
        from .models import model_card_sampling

        card = model_card_sampling(model)
    given = {key: value for key, value in changes.items() if value is not None}
    return {name: replace(chosen[name], **{**card, **given}) for name in names}


def load_all(names: list[str], data_dir: Path | None, limit: int | None) -> list[Benchmark]:
    """Benchmarks from options that may each hold several names."""
    from .benchmarks import load_benchmark

    split = [name.strip() for option in names for name in option.split(",") if name.strip()]
    return [load_benchmark(name, data_dir, limit) for name in split]


def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Output directories of fura-rl eval; the first is the baseline.")],
    out: Annotated[Path | None, typer.Option(help="Directory for compare.md, compare.json and compare.png.")] = None,
    force: Annotated[bool, typer.Option(help="Compare although prompt, sampling or problems differ.")] = False,
    all_pairs: Annotated[bool, typer.Option(help="Every pair, not only each one with the first.")] = False,
    flips: Annotated[int, typer.Option(help="How many changed problems to list, each way.")] = 10,
) -> None:
    """Is B better than A, problem by problem? fura-rl compare runs/base runs/tuned."""
    from .compare import compare, markdown, plot
    from .results import read_results

    comparisons = compare([read_results(run) for run in runs], force, all_pairs)
    text = markdown(comparisons)
    for c in comparisons:
        for word, ids in (("gained", c.gained), ("lost", c.lost)):
            more = f" and {len(ids) - flips} more" if len(ids) > flips else ""
            text += (
                f"\n\n{c.benchmark}, {c.b} against {c.a}, {word} {len(ids)}: {', '.join(ids[:flips]) or 'none'}{more}"
            )
    print(text)
    if out is not None:
        from .journal import write_atomically, writing

        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(out / "compare.md", text + "\n")
            write_atomically(out / "compare.json", json.dumps([c.to_dict() for c in comparisons], indent=2) + "\n")
            plot(comparisons, out / "compare.png")
        print(f"\nWritten to {out}: compare.md, compare.json, compare.png")


def overlap_command(
    train: Annotated[Path, typer.Argument(help="Training set: a JSONL file with problem and answer.")],
    benchmarks: Annotated[
        list[str], typer.Option("--benchmarks", "--benchmark", "-b", help=BENCHMARKS_HELP + " Comma-separated.")
    ],
    data_dir: Annotated[Path | None, typer.Option(help="Where benchmarks lie as JSONL, e.g. math500.jsonl.")] = None,
    threshold: Annotated[float, typer.Option(help="Jaccard similarity of n-grams from which a pair is listed.")] = 0.7,
    ngram: Annotated[int, typer.Option(help="Length of the n-grams, in tokens.")] = 3,
    show: Annotated[int, typer.Option(help="How many pairs to print for each benchmark.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Write every pair to this JSONL file.")] = None,
) -> None:
    """Which benchmark problems does a training set contain? fura-rl overlap train.jsonl -b math500."""
    if not 0 < threshold <= 1 or ngram < 1:
        raise FuraError(f"--threshold must be in (0, 1] and --ngram at least 1, not {threshold} and {ngram}.")
    from .benchmarks import load_benchmark
    from .journal import write_atomically, writing
    from .overlap import overlap, summarise

    if not train.is_file():
        raise FuraError(f"The training set {train} does not exist.")
    problems = load_benchmark(str(train)).problems
    lines = []
    for benchmark in load_all(benchmarks, data_dir, None):
        matches = overlap(problems, benchmark, threshold, ngram)
        s = summarise(matches, benchmark, threshold)
        print(
            f"{s['benchmark']}: of {s['problems']} problems {s['copies']} have a copy in {train.name} "
            f"({s['copies_with_equal_answer']} with an equal answer), {s['templates']} a twin if numbers are ignored "
            f"({s['pairs']} pairs)."
        )
        for m in matches[:show]:
            print(
                f"  {m.id} ~ {m.train_id}: copy {m.copy:.2f}, template {m.template:.2f}, answers "
                f"{'equal' if m.same_answer else 'differ'}"
            )
        lines += [json.dumps({"benchmark": benchmark.name, **m.to_dict()}) for m in matches]
    if out is not None:
        with writing(out.parent):
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, "".join(line + "\n" for line in lines))


def _preset(name: str) -> Any:
    from .sampling import PRESETS

    _one_of("--preset", name, tuple(PRESETS))
    return PRESETS[name]


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FuraError(f"{option} {value!r} is unknown: choose one of {', '.join(allowed)}.")
