"""Rewards that ask the verifier: right or wrong, and right or wrong scaled by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fura_rl.errors import FuraError

from .messages import text_of
from .shaping import _lengths, cosine
from .verifier import Grade, MathVerifier

LogMetric = Callable[[str, float], None]


def _grade(
    verifier: MathVerifier, completions: Sequence[Any], answer: Sequence[Any] | None, solution: Sequence[Any] | None
) -> tuple[list[Grade], list[bool]]:
    """Grades, and for each completion whether there was a reference answer at all."""
    column = answer if answer is not None else solution
    if column is None:
        raise FuraError("The data set needs a column `answer` or `solution` with the reference answers.")
    answers = [None if value is None else str(value) for value in column]
    grades = verifier.grade([text_of(completion) for completion in completions], answers)
    return grades, [bool(value and value.strip()) for value in answers]


class Accuracy:
    """1.0 if the verifier calls a completion correct, else 0.0; None (no reward) where there is no reference answer.

    What cannot be decided in time counts as wrong: every reference answer of the benchmarks is decided in
    milliseconds, so an answer that is not was written to be undecidable, or by a collapsed policy.

    Args:
        verifier: The verifier to ask.
        max_completion_length: If given, the share of completions that reached this many tokens is logged too.
    """

    __name__ = "accuracy"

    def __init__(self, verifier: MathVerifier, max_completion_length: int | None = None) -> None:
        self.verifier, self.max_length = verifier, max_completion_length

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        log_metric: LogMetric | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        grades, has_answer = _grade(self.verifier, completions, answer, solution)
        if log_metric is not None:
            for name, value in self._metrics(grades, completion_ids).items():
                log_metric(f"verifier/{name}", value)
        return [float(g.correct is True) if known else None for g, known in zip(grades, has_answer, strict=True)]

    def _metrics(self, grades: list[Grade], completion_ids: Sequence[Sequence[int]] | None) -> dict[str, float]:
        count = max(1, len(grades))
        metrics = {
            reason: sum(grade.reason == reason for grade in grades) / count
            for reason in ("correct", "no_answer", "timeout", "error")
        }
        if self.max_length is not None and completion_ids is not None:
            metrics["truncated"] = sum(len(ids) >= self.max_length for ids in completion_ids) / count
        return {**metrics, **self.verifier.last_batch}


class CosineLength:
    """Correctness scaled by length (arXiv 2502.03373, appendix C.1): short right
    and long wrong answers fare better.

    Args:
        verifier: The verifier to ask; after `accuracy` its cache already has the verdicts.
        max_completion_length: Length in tokens at which the cosine ends.
        cosine_correct: Rewards of a correct completion of length 0 and of `max_completion_length`.
        cosine_wrong: The same for a wrong one.
    """

    __name__ = "cosine_length"

    def __init__(
        self,
        verifier: MathVerifier,
        max_completion_length: int,
        cosine_correct: Sequence[float] = (1.0, 0.5),
        cosine_wrong: Sequence[float] = (-1.0, -0.5),
    ) -> None:
        if len(cosine_correct) != 2 or len(cosine_wrong) != 2:
            raise FuraError("cosine_correct and cosine_wrong take two rewards each: at length 0 and at full length.")
        self.verifier, self.max_length = verifier, max_completion_length
        self.bounds = {True: tuple(cosine_correct), False: tuple(cosine_wrong)}

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        solution: Sequence[Any] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        lengths = _lengths(completion_ids, self.__name__)
        grades, has_answer = _grade(self.verifier, completions, answer, solution)
        return [
            cosine(length, self.max_length, *self.bounds[grade.correct is True]) if known else None
            for grade, known, length in zip(grades, has_answer, lengths, strict=True)
        ]
