"""`evaluate`: benchmarks in, scores out: one batch of requests, one verifier, every completion kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from fura_rl.errors import FuraError
from fura_rl.prompts import Prompt

from .benchmarks import Benchmark, Problem
from .grading import Completion, GradedSample, Verifier, grade, group_answers
from .journal import Journal, sample_key
from .sampling import Request, Sample, Sampler, Sampling, sample_seed
from .scoring import Score, score


class SamplingByName(Protocol):
    """A dict or a `Preset`: sampling by benchmark name."""

    def __getitem__(self, benchmark: str, /) -> Sampling: ...


@dataclass(frozen=True)
class Draw:
    """One completion to draw: which benchmark, problem and sample of it, the request, and its prompt as text."""

    benchmark: Benchmark
    problem: Problem
    index: int
    request: Request
    prompt: str
    key: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns.

    Args:
        scores: By benchmark name.
        samples: By benchmark name: graded samples, (N, K).
        settings: What was run: prompt, and by benchmark its sampling, content hash and source.
        timing: Wall seconds by phase, tokens sampled, completions reused.
    """

    scores: dict[str, Score]
    samples: dict[str, list[list[GradedSample]]]
    settings: dict[str, Any]
    timing: dict[str, float]

    def to_dict(self, timing: bool = True) -> dict[str, Any]:
        """Settings and scores as plain types. Without `timing` it is a function of the completions and the settings."""
        values = {**self.settings, "scores": {name: s.to_dict(timing) for name, s in self.scores.items()}}
        return {**values, "timing": self.timing} if timing else values

    def summary(self) -> dict[str, float]:
        """Flat numbers for a tracker: `aime25/accuracy`, `aime25/low`, ..."""
        names = ("accuracy", "low", "high", "truncated", "no_answer", "mean_tokens")
        return {f"{b}/{name}": float(getattr(s, name)) for b, s in self.scores.items() for name in names}

    def table(self) -> str:
        """A Markdown table, a line a benchmark."""
        lines = [
            "| benchmark | metric | score | 95% interval | problems | truncated | no answer | timeouts | tokens |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, s in self.scores.items():
            lines.append(
                f"| {name} | {s.metric} | {s.accuracy:.3f} | {s.low:.3f} to {s.high:.3f} | {s.problems} "
                f"| {s.truncated:.1%} | {s.no_answer:.1%} | {s.timeouts} | {s.mean_tokens:.0f} |"
            )
        return "\n".join(lines)


def evaluate(
    sampler: Sampler,
    tokenizer: Any,
    benchmarks: Sequence[Benchmark],
    *,
    prompt: Prompt,
    sampling: SamplingByName | Sampling,
    verifier: Verifier,
    out_dir: str | Path | None = None,
    progress: bool = True,
    identity: str = "",
) -> Evaluation:
    """Samples, grades and scores benchmarks.

    Args:
        sampler: Where completions come from, for example `VLLMSampler(llm)` on a live engine.
        tokenizer: Renders prompts (chat template) into token ids.
        benchmarks: Sampled together, as one batch.
        prompt: The template; training uses the same object.
        sampling: For all benchmarks, or by name (a dict or `PRESETS["paper"]`).
        verifier: `fura_rl.rewards.MathVerifier`.
        out_dir: Keeps `samples.jsonl` here, and reuses the completions that it holds already.
        progress: Shows a progress bar with tokens/s.
        identity: Names the model's weights and the engine; completions in `out_dir` are reused only if it is equal.

    Raises:
        FuraError: No benchmarks, two of one name, a gold answer that cannot be read, a prompt beyond the context, or
            `out_dir` cannot be written.
    """
    draws = plan(tokenizer, benchmarks, prompt, sampling, identity)
    check_answers(verifier, benchmarks)
    started = time.perf_counter()
    journal = None if out_dir is None else Journal(out_dir, (draw.key for draw in draws))
    try:
        completions, timing = _complete(sampler, draws, journal, progress)
        sampled = time.perf_counter()
        graded = grade(verifier, completions, [draw.problem.answer for draw in draws])
        evaluation = _assemble(benchmarks, prompt, draws, graded, verifier, timing)
        if journal is not None:
            journal.finish(_lines(draws, graded))
    finally:
        if journal is not None:
            journal.close()
    timing |= {"grade_seconds": time.perf_counter() - sampled, "seconds": time.perf_counter() - started}
    return evaluation


def check_answers(verifier: Verifier, benchmarks: Sequence[Benchmark]) -> None:
    r"""Refuses gold answers that no completion could match: not even `\boxed{<the gold answer>}` is graded correct."""
    for benchmark in benchmarks:
        golds = [problem.answer for problem in benchmark.problems]
        grades = verifier.grade([f"\\boxed{{{gold}}}" for gold in golds], golds)
        bad = [p for p, g in zip(benchmark.problems, grades, strict=True) if not g.correct]
        if bad:
            others = f" (and of {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise FuraError(
                f"The gold answer {bad[0].answer!r} of problem {bad[0].id!r}{others} in {benchmark.source} cannot be "
                "read by the verifier: mend it, or take the problem out."
            )


def plan(
    tokenizer: Any,
    benchmarks: Sequence[Benchmark],
    prompt: Prompt,
    sampling: SamplingByName | Sampling,
    identity: str = "",
) -> list[Draw]:
    """Every completion that an evaluation needs, in the order of benchmarks, problems and samples."""
    names = [benchmark.name for benchmark in benchmarks]
    if not names:
        raise FuraError("There is no benchmark to evaluate.")
    if len(set(names)) < len(names):
        raise FuraError(f"Two benchmarks have the same name: {', '.join(names)}.")
    draws = []
    for benchmark in benchmarks:
        chosen = sampling if isinstance(sampling, Sampling) else sampling[benchmark.name]
        for problem in benchmark.problems:
            token_ids = prompt.token_ids(problem.problem, tokenizer)
            text = tokenizer.decode(token_ids)
            for index in range(chosen.n):
                request = Request(token_ids, chosen, sample_seed(chosen.seed, benchmark.name, problem.id, index))
                draws.append(Draw(benchmark, problem, index, request, text, sample_key(identity, request)))
    return draws


def _complete(
    sampler: Sampler, draws: list[Draw], journal: Journal | None, progress: bool
) -> tuple[list[Completion], dict[str, float]]:
    """A completion for each draw: from the journal, or else from the sampler, journalled as it finishes."""
    done = dict(journal.finished) if journal is not None else {}
    missing = [draw for draw in draws if draw.key not in done]
    reused = len(draws) - len(missing)
    tokens = 0
    started = time.perf_counter()
    with tqdm(
        total=len(draws), initial=reused, desc="evaluate", unit="sample", mininterval=0.5, disable=not progress
    ) as bar:

        def on_sample(index: int, sample: Sample) -> None:
            nonlocal tokens
            draw = missing[index]
            done[draw.key] = Completion(sample.text, len(sample.token_ids), sample.finish_reason, draw.request.seed)
            tokens += len(sample.token_ids)
            if journal is not None:
                journal.append(_line(draw, done[draw.key]))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tok/s", refresh=False)
            bar.update()

        if missing:
            sampler.sample([draw.request for draw in missing], on_sample)
            if journal is not None:
                journal.flush()
    seconds = time.perf_counter() - started
    timing = {
        "sample_seconds": seconds,
        "tokens": float(tokens),
        "tokens_per_second": tokens / seconds if missing else 0.0,
        "sampled": float(len(missing)),
        "reused": float(reused),
    }
    return [done[draw.key] for draw in draws], timing


def _assemble(
    benchmarks: Sequence[Benchmark],
    prompt: Prompt,
    draws: list[Draw],
    graded: list[GradedSample],
    verifier: Verifier,
    timing: dict[str, float],
) -> Evaluation:
    rows: dict[str, dict[str, list[GradedSample]]] = {benchmark.name: {} for benchmark in benchmarks}
    for draw, sample in zip(draws, graded, strict=True):
        rows[draw.benchmark.name].setdefault(draw.problem.id, []).append(sample)
    samples = {name: list(by_problem.values()) for name, by_problem in rows.items()}
    everything = sum(sample.completion.tokens for sample in graded)
    scores = {}
    for benchmark in benchmarks:
        matrix = samples[benchmark.name]
        share = sum(sample.completion.tokens for row in matrix for sample in row) / max(1, everything)
        scores[benchmark.name] = score(
            benchmark,
            matrix,
            group_answers(verifier, matrix),
            seconds=timing["sample_seconds"] * share,
            tokens_per_second=timing["tokens_per_second"],
        )
    chosen = {draw.benchmark.name: draw.request.sampling for draw in draws}
    settings = {
        "prompt": {"name": prompt.name, "text": prompt.text},
        "benchmarks": {
            b.name: {
                "problems": len(b.problems),
                "sha256": b.sha256,
                "source": b.source,
                "sampling": chosen[b.name].to_dict(),
            }
            for b in benchmarks
        },
    }
    return Evaluation(scores, samples, settings, timing)


def _line(draw: Draw, completion: Completion) -> dict[str, Any]:
    return {
        "benchmark": draw.benchmark.name,
        "id": draw.problem.id,
        "sample": draw.index,
        "key": draw.key,
        "seed": completion.seed,
        "prompt": draw.prompt,
        "completion": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
    }


def _lines(draws: list[Draw], graded: list[GradedSample]) -> list[dict[str, Any]]:
    return [
        {
            **_line(draw, sample.completion),
            "answer": draw.problem.answer,
            "extracted": sample.extracted,
            "correct": sample.correct,
            "reason": sample.reason,
        }
        for draw, sample in zip(draws, graded, strict=True)
    ]
