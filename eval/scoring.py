"""From graded samples to scores with intervals: accuracy, avg@k, pass@k, maj@k, by subject and level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from . import statistics as stats
from .benchmarks import Benchmark, Problem
from .grading import GradedSample


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval, over `problems` problems."""

    value: float
    low: float
    high: float
    problems: int


@dataclass(frozen=True)
class Score:
    """What one benchmark says about one model.

    Args:
        accuracy: Mean over problems of the share of correct samples: accuracy for k = 1, avg@k above.
        low, high: Its 95% interval: Wilson's for k = 1, a bootstrap over problems above.
        k: Samples a problem.
        problems: Number of problems.
        truncated, no_answer: Shares of samples cut off at the token limit, and without a \\boxed{} answer.
        timeouts, errors: Samples that the verifier gave up on; they count as wrong.
        mean_tokens: Mean length of a completion.
        pass_at_k: By number of samples k: probability that at least one of k is correct (unbiased).
        maj_at_k: By number of voters k: accuracy of the most frequent answer.
        by_subject, by_level: The accuracy in parts, where the benchmark has them.
        seconds: This benchmark's share, by tokens, of the time that the whole batch took to sample.
        tokens_per_second: Of the whole batch; 0 if nothing was sampled, everything being reused.
    """

    accuracy: float
    low: float
    high: float
    k: int
    problems: int
    truncated: float
    no_answer: float
    timeouts: int
    errors: int
    mean_tokens: float
    pass_at_k: dict[int, Estimate]
    maj_at_k: dict[int, Estimate]
    by_subject: dict[str, Estimate]
    by_level: dict[str, Estimate]
    seconds: float = 0.0
    tokens_per_second: float = 0.0

    def to_dict(self, timing: bool = True) -> dict[str, Any]:
        """Plain types, ready for JSON; without `timing` it depends on the samples alone."""
        values = asdict(self)
        for name in ("pass_at_k", "maj_at_k"):
            values[name] = {str(k): value for k, value in values[name].items()}
        if not timing:
            del values["seconds"], values["tokens_per_second"]
        return values

    @property
    def metric(self) -> str:
        return "accuracy" if self.k == 1 else f"avg@{self.k}"


def score(
    benchmark: Benchmark,
    graded: Sequence[Sequence[GradedSample]],
    groups: Sequence[Sequence[int | None]],
    seconds: float = 0.0,
    tokens_per_second: float = 0.0,
) -> Score:
    """The score of one benchmark.

    Args:
        benchmark: N problems.
        graded: K graded samples for each of them, (N, K).
        groups: A label a sample, equal for equivalent answers, None without an answer, (N, K).
        seconds, tokens_per_second: See `Score`.
    """
    correct_NK = np.array([[bool(sample.correct) for sample in row] for row in graded])
    n, k = correct_NK.shape
    means_N = correct_NK.mean(axis=1)
    interval = stats.mean_interval(means_N)
    samples = [sample for row in graded for sample in row]
    ks = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
    pass_NM = [[stats.pass_at_k(int(row.sum()), k, j) for j in ks] for row in correct_NK]
    maj_NM = [
        [stats.maj_at_k(labels, row.tolist(), j, seed=i) for j in ks]
        for i, (labels, row) in enumerate(zip(groups, correct_NK, strict=True))
    ]
    return Score(
        accuracy=float(means_N.mean()),
        low=interval.low,
        high=interval.high,
        k=k,
        problems=n,
        truncated=_share(samples, lambda s: s.completion.finish_reason == "length"),
        no_answer=_share(samples, lambda s: s.reason == "no_answer"),
        timeouts=sum(s.reason == "timeout" for s in samples),
        errors=sum(s.reason == "error" for s in samples),
        mean_tokens=float(np.mean([s.completion.tokens for s in samples])),
        pass_at_k=_estimates(ks, pass_NM),
        maj_at_k=_estimates(ks, maj_NM),
        by_subject=_parts(benchmark.problems, means_N, lambda p: p.subject),
        by_level=_parts(benchmark.problems, means_N, lambda p: p.level),
        seconds=seconds,
        tokens_per_second=tokens_per_second,
    )


def _share(samples: Sequence[GradedSample], test: Callable[[GradedSample], bool]) -> float:
    return sum(map(test, samples)) / len(samples)


def _estimates(ks: Sequence[int], values_NM: Sequence[Sequence[float]]) -> dict[int, Estimate]:
    values = np.array(values_NM)
    intervals = stats.mean_intervals(values)
    return {
        k: Estimate(float(column.mean()), interval.low, interval.high, len(column))
        for k, column, interval in zip(ks, values.T, intervals, strict=True)
    }


def _parts(
    problems: Sequence[Problem], means_N: np.ndarray, part: Callable[[Problem], str | None]
) -> dict[str, Estimate]:
    members: dict[str, list[float]] = {}
    for problem, mean in zip(problems, means_N, strict=True):
        name = part(problem)
        if name is not None:
            members.setdefault(name, []).append(float(mean))
    parts = {}
    for name in sorted(members):
        interval = stats.mean_interval(members[name])
        parts[name] = Estimate(float(np.mean(members[name])), interval.low, interval.high, len(members[name]))
    return parts
