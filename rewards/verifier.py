r"""`MathVerifier`: the one object that decides right or wrong, in rewards, in evaluation and in tests.

A completion goes through three stages, cheapest first:

1. Extraction (`extraction.py`): the last `\boxed{}` is the answer.
2. The exact path (`canonical.py`, `numerals.py`, `equivalence.py`): spelling, numbers and structure, in microseconds.
3. Algebra (`algebra.py` in a worker process): math-verify decides what is left, under a deadline and a memory limit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fura_rl.errors import FuraError

from .canonical import canonical
from .equivalence import compare
from .extraction import Fallback, extract_answer, extract_boxes, extract_reference
from .limits import too_large
from .pool import CLOSED, WorkerPool
from .structure import is_list

# Longer answers are compared as they are written; of a reference that is a whole solution, the end is read.
MAX_FORM_CHARS = 2_000
MAX_REFERENCE_CHARS = 20_000

Reason = Literal["correct", "wrong", "no_answer", "timeout", "error"]


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    Attributes:
        correct: True or False; None if it could not be decided (`timeout`, `error`).
        extracted: The answer as the completion wrote it; None if it gave none.
        reason: Why.
    """

    correct: bool | None
    extracted: str | None
    reason: Reason


_VERDICT = {True: Grade(True, None, "correct"), False: Grade(False, None, "wrong")}


class MathVerifier:
    r"""Grades completions against reference answers, in bounded time and memory.

    Use it as a context manager, or call `close()`. Safe to use from threads (batches take turns), after a fork (the
    child starts its own workers) and when pickled into a spawned process (the copy starts empty).

    Args:
        workers: Processes for the answers that need algebra; they start when first needed (0.5 s, 60 MiB each).
        timeout: Seconds of algebra allowed for one answer.
        memory_limit: MiB of address space a worker may use (Linux; elsewhere only time is limited).
        batch_timeout: Seconds for the algebra of one `grade` call; by default `timeout` plus 0.1 s for each answer that
            each worker has to take on.
        fallback: What counts as the answer of a completion without a box: nothing (default), the last `"number"` or
            the last `"expression"`.
        float_rounding: Decimals to which an answer written as a decimal must agree.
        cache_size: How many verdicts of algebra on pairs (answer, extracted) are kept before the cache starts afresh.

    Raises:
        FuraError: A setting is out of range.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 5.0,
        memory_limit: int = 1024,
        *,
        batch_timeout: float | None = None,
        fallback: Fallback | None = None,
        float_rounding: int = 6,
        cache_size: int = 100_000,
    ) -> None:
        if workers < 1 or timeout <= 0 or (batch_timeout is not None and batch_timeout <= 0):
            raise FuraError("MathVerifier needs at least one worker and positive timeouts.")
        if memory_limit < 256:
            raise FuraError(
                f"memory_limit is in MiB and must be at least 256 (math-verify's own need); got {memory_limit}."
            )
        if fallback not in (None, "number", "expression"):
            raise FuraError(f"Unknown fallback {fallback!r}: choose 'number', 'expression' or None.")
        self._settings: dict[str, Any] = {
            "workers": workers,
            "timeout": timeout,
            "memory_limit": memory_limit,
            "batch_timeout": batch_timeout,
            "fallback": fallback,
            "float_rounding": float_rounding,
            "cache_size": cache_size,
        }
        self.workers, self.timeout, self.batch_timeout = workers, timeout, batch_timeout
        self.fallback, self.float_rounding, self.cache_size = fallback, float_rounding, cache_size
        self._cache: dict[tuple[str, str], Grade] = {}
        self._pool = WorkerPool(workers, memory_limit)
        self.last_batch: dict[str, float] = {}

    def start(self, wait: bool = True) -> None:
        """Start the workers now, so that the first answer that needs algebra need not wait for them.

        Args:
            wait: Until they are ready; otherwise they become so beside whatever comes next.

        Raises:
            FuraError: The verifier is closed, or a worker did not start.
        """
        self._pool.start(wait)

    def grade(self, completions: Sequence[str], answers: Sequence[str | None]) -> list[Grade]:
        r"""Grade every completion against the answer at the same place.

        Args:
            completions: What the model wrote (B strings of any content).
            answers: Reference answers (B): bare LaTeX, a number, text, `$...$` or a solution that ends in a box.
                None or an empty string cannot be graded and gives `error`.

        Returns:
            B grades, in order.

        Raises:
            FuraError: The lengths differ, or the verifier is closed.
        """
        if len(completions) != len(answers):
            raise FuraError(f"{len(completions)} completions but {len(answers)} answers: one answer each is needed.")
        started = time.monotonic()
        extracted = [self.extract(text, answer) for text, answer in zip(completions, answers, strict=True)]
        grades = self.grade_extracted(extracted, answers)
        self.last_batch["seconds"] = time.monotonic() - started
        return grades

    def extract(self, completion: str, answer: str | None = None) -> str | None:
        r"""The answer a completion gives: the last box, or all boxes of the last list if `answer` has several parts."""
        if answer is not None:
            boxes = extract_boxes(completion)
            # Only where the reference lists several values may several boxes form one answer; where it is a single
            # value, `\boxed{3} or \boxed{5}` answers 5.
            if len(boxes) > 1 and self._reference(answer)[1]:
                last = canonical(boxes[-1][:MAX_FORM_CHARS])
                if too_large(last) or not is_list(last):
                    return ", ".join(boxes)
        return extract_answer(completion, self.fallback)

    def grade_extracted(self, extracted: Sequence[str | None], answers: Sequence[str | None]) -> list[Grade]:
        """Grade answers that are already extracted (B strings; None where a completion gave none)."""
        if self._pool.closed:
            raise FuraError(CLOSED)
        started = time.monotonic()
        pairs = [(answer or "", given) for answer, given in zip(answers, extracted, strict=True)]
        verdicts: dict[tuple[str, str | None], Grade] = {}
        hits = 0
        open_pairs: dict[tuple[str, str], dict[str, Any]] = {}
        for pair in pairs:
            answer, given = pair
            if pair in verdicts or pair in open_pairs:
                continue
            if given is None:
                verdicts[pair] = Grade(False, None, "no_answer")
                continue
            cached = self._cache.get((answer, given))
            if cached is not None:
                verdicts[pair], hits = cached, hits + 1
                continue
            outcome = self._exact(answer, given)
            if isinstance(outcome, dict):
                open_pairs[(answer, given)] = outcome
            else:
                verdicts[pair] = outcome
        # Short answers first: what the batch deadline cuts off is what is likely to be degenerate.
        ordered = sorted(open_pairs, key=lambda pair: len(pair[1]))
        replies = self._run([open_pairs[pair] for pair in ordered])
        for pair, reply in zip(ordered, replies, strict=True):
            verdicts[pair] = self._store(pair, reply)
        self.last_batch = {
            "seconds": time.monotonic() - started,
            "cache_hits": hits / len(pairs) if pairs else 0.0,
            "algebra": len(ordered) / len(pairs) if pairs else 0.0,
        }
        return [Grade(verdicts[pair].correct, pair[1], verdicts[pair].reason) for pair in pairs]

    def exact(self, extracted: str, answer: str) -> bool | None:
        """The verdict of the exact path alone; None where algebra would be asked."""
        outcome = self._exact(answer, extracted)
        return outcome.correct if isinstance(outcome, Grade) else None

    def second_opinions(self, extracted: Sequence[str], answers: Sequence[str]) -> list[bool | None]:
        """What math-verify by itself, with its defaults, says of each pair; None if it cannot tell in time."""
        requests = [
            {"gold": answer, "answer": given, "float_rounding": self.float_rounding, "plain": True}
            for given, answer in zip(extracted, answers, strict=True)
        ]
        return [reply.get("equal") for reply in self._run(requests)]

    def _run(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not requests:
            return []
        budget = self.batch_timeout or self.timeout + 0.1 * -(-len(requests) // self.workers)
        return self._pool.run(requests, self.timeout, budget)

    def _reference(self, answer: str) -> tuple[str, bool]:
        """The canonical form of a reference answer, and whether it lists several values."""
        parts = extract_reference(answer[-MAX_REFERENCE_CHARS:])
        form = canonical(", ".join(parts)[:MAX_FORM_CHARS])
        return form, len(parts) > 1 or is_list(form)

    def _exact(self, answer: str, given: str) -> Grade | dict[str, Any]:
        """A verdict without algebra, or the request for a worker."""
        if not answer.strip():
            return Grade(None, given, "error")
        if given.strip() == answer.strip():
            return _VERDICT[True]
        if len(given) > MAX_FORM_CHARS:
            return _VERDICT[False]
        gold, form = self._reference(answer)[0], canonical(given)
        if gold == form:
            return _VERDICT[True]
        if too_large(form):
            return _VERDICT[False]
        decided = compare(gold, form, None, self.float_rounding)
        if decided is not None:
            return _VERDICT[decided]
        return {"gold": gold, "answer": form, "float_rounding": self.float_rounding}

    def _store(self, pair: tuple[str, str], reply: dict[str, Any]) -> Grade:
        if "equal" in reply:
            grade = _VERDICT[reply["equal"]]
        else:
            grade = Grade(None, pair[1], "timeout" if reply["error"] == "timeout" else "error")
        # A timeout may be the batch's or the machine's fault, so only decisions are kept.
        if grade.correct is not None and self.cache_size > 0:
            if len(self._cache) >= self.cache_size:
                self._cache.clear()  # single dict operations need no lock, neither with threads nor after a fork
            self._cache[pair] = grade
        return grade

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers now alive."""
        return self._pool.pids

    def close(self) -> None:
        """End the worker processes. Grading afterwards raises `FuraError`; closing twice does nothing."""
        self._pool.close()

    def __enter__(self) -> MathVerifier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._settings,)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        return f"MathVerifier({settings}) at {os.getpid()}"


def _rebuild(settings: dict[str, Any]) -> MathVerifier:
    return MathVerifier(**settings)
