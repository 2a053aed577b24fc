"""The verifier on real reference answers and on cases labelled by other projects."""

import functools
import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from fura_rl.rewards import MathVerifier


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_labelled_cases(shared_data: Path) -> None:
    """At least 98% of the labels of other projects' test suites; `float_rounding` as their test sets it."""
    cases = read(shared_data / "verifier_cases.jsonl")
    roundings = [(case["options"] or {}).get("float_rounding", 6) for case in cases]
    misses = []
    for rounding in sorted(set(roundings)):
        chosen = [case for case, of_case in zip(cases, roundings, strict=True) if of_case == rounding]
        with MathVerifier(timeout=120, fallback="expression", float_rounding=rounding) as verifier:
            grades = verifier.grade([case["prediction"] for case in chosen], [case["gold"] for case in chosen])
        misses += [(c, g) for c, g in zip(chosen, grades, strict=True) if g.correct is not c["equal"]]
    for case, grade in misses:
        print(case["id"], "equal" if case["equal"] else "different", repr(case["gold"][-80:]), "|", grade)
    assert len(cases) == 286
    assert 1 - len(misses) / len(cases) >= 0.98


@pytest.mark.parametrize(("name", "size"), [("math500", 500), ("math_train", 7498)])
def test_references_match_their_own_solutions(shared_data: Path, name: str, size: int) -> None:
    problems = read(shared_data / f"{name}.jsonl")
    assert len(problems) == size
    with MathVerifier() as verifier:
        grades = verifier.grade([p["solution"] for p in problems], [p["answer"] for p in problems])
    reasons = Counter(grade.reason for grade in grades)
    print([(p["answer"], g) for p, g in zip(problems, grades, strict=True) if not g.correct])
    assert reasons["correct"] / size >= 0.995
    assert reasons["error"] == reasons["timeout"] == 0


@pytest.mark.parametrize("name", ["math500", "math_train"])
def test_references_match_themselves_spelled_otherwise(shared_data: Path, name: str) -> None:
    """The layout that TeX ignores changes no verdict."""
    references = {p["answer"] for p in read(shared_data / f"{name}.jsonl")}
    # A comma between digits may separate thousands, where spaces around it would change the number.
    kept = sorted(a for a in references if r"\left" not in a and r"\d" not in a and not re.search(r"\d,\d", a))
    layout = {r"\frac": r"\dfrac", "(": r"\left(", ")": r"\right)", ",": " , "}
    respelled = [f"$ {functools.reduce(lambda a, item: a.replace(*item), layout.items(), a)} $" for a in kept]
    with MathVerifier() as verifier:
        grades = verifier.grade_extracted(respelled, kept)
    wrong = [(a, r) for a, r, g in zip(kept, respelled, grades, strict=True) if not g.correct]
    assert not wrong


@pytest.mark.slow
def test_no_reference_matches_that_of_another_problem(shared_data: Path) -> None:
    """Each MATH-500 reference against 20 other problems' references: only spellings of the same answer agree."""
    problems = read(shared_data / "math500.jsonl")
    rng = random.Random(0)
    pairs = [
        (problem["answer"], other["answer"])
        for problem in problems
        for other in rng.sample([p for p in problems if p is not problem], 20)
    ]
    with MathVerifier(timeout=120, batch_timeout=500) as verifier:
        grades = verifier.grade_extracted([other for _, other in pairs], [answer for answer, _ in pairs])
    assert len(pairs) == 10_000
    assert {grade.reason for grade in grades} == {"correct", "wrong"}
    matches = {pair for pair, grade in zip(pairs, grades, strict=True) if grade.correct and pair[0] != pair[1]}
    print(sorted(matches))
    # The same value with a name, a unit, degrees or a space; nothing else may agree.
    truly_equal = {
        ("x=5", "5"),
        (r"120^\circ", "120"),
        (r"2\sqrt{5}", r"2 \sqrt{5}"),
        ("15", r"15\mbox{ cm}^2"),
    }
    assert matches == truly_equal
