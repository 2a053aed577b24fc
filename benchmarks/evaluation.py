"""What evaluation adds to bare generation: `python benchmarks/evaluation.py --model M --data-dir D`.

Draws the same greedy completions of MATH-500 with `llm.generate` and with `evaluate`, on one engine, in pairs whose
order alternates (ABBA), so that a drift of the machine favours neither; what counts is the median over pairs of the
ratio of seconds a token. Both clocks run from token ids to completions with their texts: adding the requests, the
engine's steps, detokenising, and for `evaluate` the progress bar and the journal, until its last line is written.
Neither includes rendering prompts or grading. `outside` is wall time in neither the engine's `step` nor its
`add_request`: all that a caller of the engine can add by itself. JSON is the last line.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fura_rl.eval import Sampling, VLLMSampler, evaluate, load_benchmark
from fura_rl.eval.evaluation import plan
from fura_rl.eval.models import EngineOptions, load_tokenizer, open_sampler
from fura_rl.prompts import load_prompt


@dataclasses.dataclass
class Run:
    """One measured generation: wall seconds, those of them outside the engine, tokens, and steps of the engine."""

    seconds: float
    outside: float
    tokens: int
    steps: int


class Watch:
    """Counts an engine's steps and the wall seconds in its `step` and `add_request`."""

    def __init__(self, engine: Any) -> None:
        self.inside, self.steps = 0.0, 0
        engine.step, engine.add_request = self._timed(engine.step, 1), self._timed(engine.add_request, 0)

    def _timed(self, function: Callable[..., Any], steps: int) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            self.inside += time.perf_counter() - started
            self.steps += steps
            return result

        return timed

    def run(self, generate: Callable[[], tuple[float, int]]) -> Run:
        """Measures a function that returns its seconds and tokens."""
        self.inside, self.steps = 0.0, 0
        seconds, tokens = generate()
        return Run(seconds, seconds - self.inside, tokens, self.steps)


def main(
    model: Annotated[str, typer.Option(help="Model name or path.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where math500.jsonl lies.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first problems.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Pairs of measurements; an even number is fair to both.")] = 4,
    eager: Annotated[bool, typer.Option(help="No compilation.")] = False,
    gpu_memory: Annotated[float, typer.Option(help="Share of the GPU's memory.")] = EngineOptions.gpu_memory,
) -> None:
    """Measures evaluation against bare generation on the same prompts."""
    from vllm import SamplingParams

    from fura_rl.rewards import MathVerifier

    tokenizer = load_tokenizer(model)
    benchmark = load_benchmark("math500", data_dir, limit)
    prompt, sampling = load_prompt("qwen-boxed"), Sampling(max_tokens=max_tokens)
    prompts = [draw.request.prompt_token_ids for draw in plan(tokenizer, [benchmark], prompt, sampling)]
    context = max(map(len, prompts)) + max_tokens
    options = EngineOptions(engine="vllm", context=context, eager=eager, gpu_memory=gpu_memory)
    runs: dict[str, list[Run]] = {"llm.generate": [], "evaluate": []}
    with (
        MathVerifier() as verifier,
        tempfile.TemporaryDirectory() as scratch,
        open_sampler(model, None, tokenizer, options, Path(scratch)) as (sampler, _),
    ):
        assert isinstance(sampler, VLLMSampler)
        llm: Any = sampler.llm

        def bare() -> tuple[float, int]:
            started = time.perf_counter()
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            return time.perf_counter() - started, sum(len(output.outputs[0].token_ids) for output in outputs)

        def ours(problems: Any = benchmark) -> tuple[float, int]:
            with tempfile.TemporaryDirectory() as out:
                timing = evaluate(
                    sampler, tokenizer, [problems], prompt=prompt, sampling=sampling, verifier=verifier, out_dir=out
                ).timing
            return timing["sample_seconds"], int(timing["tokens"])

        bare()  # warms the engine up, then what evaluation imports at its first use
        ours(dataclasses.replace(benchmark, problems=benchmark.problems[:4]))
        watch = Watch(llm.llm_engine)
        print("| round | | seconds | outside | steps | tokens | tokens/s |\n|---|---|---|---|---|---|---|")
        for number in range(rounds):
            pair: list[tuple[str, Callable[[], tuple[float, int]]]] = [("llm.generate", bare), ("evaluate", ours)]
            for name, generate in pair if number % 2 == 0 else reversed(pair):
                llm.reset_prefix_cache()
                run = watch.run(generate)
                runs[name].append(run)
                print(
                    f"| {number + 1} | {name} | {run.seconds:.2f} | {run.outside:.3f} | {run.steps} | {run.tokens} "
                    f"| {run.tokens / run.seconds:,.0f} |",
                    flush=True,
                )
    # A token, not a run: greedy completions may differ by a few tokens between runs.
    a_token = {name: [run.seconds / run.tokens for run in values] for name, values in runs.items()}
    ratios = [ours / bare - 1 for bare, ours in zip(a_token["llm.generate"], a_token["evaluate"], strict=True)]
    added = [ours.outside - bare.outside for bare, ours in zip(runs["llm.generate"], runs["evaluate"], strict=True)]
    noise = max(a_token["llm.generate"]) / min(a_token["llm.generate"]) - 1
    overhead = statistics.median(ratios)
    print(f"\nOverhead, median of {rounds} pairs: {overhead:.1%} ({min(ratios):.1%} to {max(ratios):.1%})")
    print(f"Seconds outside the engine that evaluate adds: {statistics.median(added):.3f}")
    print(f"Slowest llm.generate over the fastest: {noise:.1%}")
    result = {"overhead": overhead, "overheads": ratios, "outside_added": added, "noise": noise}
    print(json.dumps(result | {name: [dataclasses.asdict(run) for run in values] for name, values in runs.items()}))


if __name__ == "__main__":
    typer.run(main)
