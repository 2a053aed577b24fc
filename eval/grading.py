"""Grading of samples by the verifier, and the grouping of equal answers for maj@k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Grade(Protocol):
    @property
    def correct(self) -> bool | None: ...
    @property
    def extracted(self) -> str | None: ...
    @property
    def reason(self) -> str: ...


class Verifier(Protocol):
    """What evaluation needs of `fura_rl.rewards.MathVerifier`."""

    def grade(self, completions: list[str], answers: list[str]) -> Sequence[Grade]: ...


@dataclass(frozen=True)
class Completion:
    """A finished completion; `tokens` is its length."""

    text: str
    tokens: int
    finish_reason: str
    seed: int


@dataclass(frozen=True)
class GradedSample:
    """A completion with its grade; see `fura_rl.rewards.Grade`."""

    completion: Completion
    correct: bool | None
    extracted: str | None
    reason: str


def grade(verifier: Verifier, completions: Sequence[Completion], answers: Sequence[str]) -> list[GradedSample]:
    """Grades each completion against its gold answer, in one call to the verifier."""
    grades = verifier.grade([completion.text for completion in completions], list(answers))
    return [
        GradedSample(completion, grade.correct, grade.extracted, grade.reason)
        for completion, grade in zip(completions, grades, strict=True)
    ]


def group_answers(verifier: Verifier, graded: Sequence[Sequence[GradedSample]]) -> list[list[int | None]]:
    """Labels equal answers of a problem equally, equality being the verifier's, not the string's.

    All answers that equal the gold one are one group. The others are compared among themselves: each round asks, for
    every problem at once, which of its unlabelled answers equal the first of them.

    Args:
        graded: K graded samples for each problem, (N, K).

    Returns:
        Labels (N, K): whole numbers within a problem, 0 for right answers, None for a sample without an answer.
    """
    labels = [{s.extracted: 0 for s in row if s.correct and s.extracted is not None} for row in graded]
    waiting = [
        list(dict.fromkeys(s.extracted for s in row if s.extracted is not None and s.extracted not in known))
        for row, known in zip(graded, labels, strict=True)
    ]
    label = 1
    while any(waiting):
        pairs = [(n, answer) for n, answers in enumerate(waiting) for answer in answers[1:]]
        grades = verifier.grade([f"\\boxed{{{a}}}" for _, a in pairs], [waiting[n][0] for n, _ in pairs])
        equal = {pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct}
        for n, answers in enumerate(waiting):
            labels[n].update({a: label for i, a in enumerate(answers) if i == 0 or (n, a) in equal})
            waiting[n] = [a for a in answers if a not in labels[n]]
        label += 1
    return [
        [None if s.extracted is None else known[s.extracted] for s in row]
        for row, known in zip(graded, labels, strict=True)
    ]
