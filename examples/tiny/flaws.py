"""Flawed attempts at a problem: what the tiny model is pretrained on beside right solutions.

The demo needs a model that knows how to solve its problems and does not do so reliably. Its last stretch of pretraining
therefore imitates an unreliable pupil, whose attempts are drawn from `RATES`. Two things have to be unlearned: choosing
a bad procedure (guessing without any working, stopping early, leaving out the box) and bad work inside a good one (the
wrong operation, a slip in the arithmetic). Errors are carried on into the later steps, as a pupil would.
"""

from __future__ import annotations

import random
from dataclasses import replace

from problems import LARGEST, SMALLEST, STYLES, Equation, Problem

RATES = {
    "right": 0.60,
    "guess": 0.26,  # no working, a number near the answer
    "slip": 0.04,  # one result is off by one, by ten (a carry), or by one row of the times table
    "wrong operation": 0.04,  # one step adds instead of subtracting or multiplying, or subtracts instead of adding
    "stops early": 0.03,  # the last steps are missing
    "no box": 0.03,  # all right, but the answer is not boxed
}
# The last, short stage of pretraining: more guesses, nothing else new.
UNRELIABLE = {**RATES, "right": 0.30, "guess": 0.56}


def attempt(problem: Problem, kind: str, rng: random.Random) -> str:
    """What the pupil writes; a right solution where the kind does not fit (one step cannot stop early)."""
    style = rng.choice(STYLES)
    if kind == "guess":
        near = problem.answer + rng.randint(-9, 9)
        return f"I guess \\boxed{{{min(LARGEST, max(SMALLEST, near))}}}"
    if kind == "no box":
        return problem.solution(style).replace("\\boxed{", "").replace("}", ".")
    if kind == "stops early" and len(problem.steps) > 1:
        return problem.solution(style, problem.work()[: rng.randrange(1, len(problem.steps))])
    if kind == "slip":
        return problem.solution(style, work_with_flaw(problem, slip, rng))
    if kind == "wrong operation":
        return problem.solution(style, work_with_flaw(problem, wrong_operation, rng))
    return problem.solution(style)


def draw_kind(rng: random.Random, rates: dict[str, float]) -> str:
    """A kind of attempt, as likely as `rates` says."""
    return rng.choices(list(rates), list(rates.values()))[0]


def slip(equation: Equation, rng: random.Random) -> Equation:
    """The same step with a wrong result."""
    offsets = [1, 10] if equation.op != "*" else [1, 10, equation.left, equation.right]
    return replace(equation, result=equation.result + rng.choice(offsets) * rng.choice((1, -1)))


def wrong_operation(equation: Equation, rng: random.Random) -> Equation:
    """The same numbers, rightly combined by another operation; never below zero."""
    small, large = sorted((equation.left, equation.right))
    if equation.op == "+":
        return Equation.of(large, "-", small)
    return Equation.of(equation.left, "+", equation.right)


def work_with_flaw(problem: Problem, flaw, rng: random.Random) -> list[Equation]:
    """The working with one random step flawed; right if ten tries leave the range of the numbers."""
    for _ in range(10):
        at = rng.randrange(len(problem.steps))
        work = problem.work(lambda i, equation, at=at: flaw(equation, rng) if i == at else equation)
        if all(SMALLEST <= equation.result <= LARGEST for equation in work):
            return work
    return problem.work()
