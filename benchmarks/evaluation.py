"""What evaluation adds to bare generation: `python benchmarks/evaluation.py --model M --data-dir D`.

Draws the same greedy completions of MATH-500 with `llm.generate` and with `evaluate` (progress and journal included),
in turns, on one engine, and prints seconds, tokens/s and the ratio; JSON is the last line.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fura_rl.eval import Sampling, VLLMSampler, evaluate, load_benchmark
from fura_rl.eval.evaluation import plan
from fura_rl.eval.models import EngineOptions, load_tokenizer, open_sampler
from fura_rl.prompts import load_prompt


def main(
    model: Annotated[str, typer.Option(help="Model name or path.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where math500.jsonl lies.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first problems.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest completion.")] = 1024,
    rounds: Annotated[int, typer.Option(help="Measurements of each; the median counts.")] = 3,
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
    seconds: dict[str, list[float]] = {"llm.generate": [], "evaluate": []}
    tokens: dict[str, int] = {}
    with (
        MathVerifier() as verifier,
        tempfile.TemporaryDirectory() as scratch,
        open_sampler(model, None, tokenizer, options, Path(scratch)) as (sampler, _),
    ):
        assert isinstance(sampler, VLLMSampler)
        llm: Any = sampler.llm

        def bare() -> int:
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
            outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        def ours(directory: str) -> int:
            result = evaluate(
                sampler, tokenizer, [benchmark], prompt=prompt, sampling=sampling, verifier=verifier, out_dir=directory
            )
            seconds["evaluate"].append(result.timing["sample_seconds"])
            return int(result.timing["tokens"])

        bare()  # warms the engine up
        for number in range(rounds):
            llm.reset_prefix_cache()
            started = time.perf_counter()
            tokens["llm.generate"] = bare()
            seconds["llm.generate"].append(time.perf_counter() - started)
            llm.reset_prefix_cache()
            tokens["evaluate"] = ours(f"{scratch}/{number}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: tokens[name] / medians[name] for name in medians}
    print("| | seconds | tokens | tokens/s |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {tokens[name]} | {rates[name]:,.0f} |")
    # Tokens/s, not seconds: greedy completions may differ by a few tokens between rounds.
    print(json.dumps({"overhead": rates["llm.generate"] / rates["evaluate"] - 1, "seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    typer.run(main)
