"""The demo's word problems: the generator, checked by a reader that knows nothing of it, and the flawed attempts."""

import json
import operator
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "examples" / "tiny"
sys.path.insert(0, str(TINY))

import flaws  # noqa: E402
from problems import problems, records, split_of  # noqa: E402

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def equations(solution: str) -> list[tuple[int, str, int, int]]:
    return [(int(a), op, int(b), int(c)) for a, op, b, c in EQUATION.findall(solution)]


def right(equation: tuple[int, str, int, int]) -> bool:
    left, op, other, result = equation
    return OPERATIONS[op](left, other) == result


def read_and_solve(text: str) -> int:
    """Solves a problem from its text alone: who has how many, sentence by sentence."""
    holds: dict[str, int] = {}
    *story, question = re.split(r"(?<=[.]) ", text)
    for sentence in story:
        who, verb = sentence.split()[:2]
        numbers = [int(x) for x in re.findall(r"\d+", sentence)]
        count = numbers[0] * numbers[1] if " in each" in sentence else numbers[0]
        if more := re.search(r"(more|fewer) \w+ than (\w+)\.", sentence):
            holds[who] = holds[more[2]] + (count if more[1] == "more" else -count)
        elif times := re.search(r"times as many \w+ as (\w+)\.", sentence):
            holds[who] = holds[times[1]] * count
        elif verb == "has":
            assert who not in holds
            holds[who] = count
        elif verb in ("buys", "finds", "gets"):
            holds[who] += count
        else:
            assert verb in ("sells", "loses", "gives"), sentence
            holds[who] -= count
    if "together" in question:
        return sum(holds.values())
    return holds[re.search(r"does (\w+) have\?", question)[1]]


@pytest.fixture(scope="module", params=["train", "test"])
def rows(request):
    return records(request.param, 2000, seed=3)


def test_answers_agree_with_an_independent_reader(rows):
    assert all(read_and_solve(row["problem"]) == int(row["answer"]) for row in rows)


def test_every_equation_of_every_solution_is_right_and_ends_in_the_boxed_answer(rows):
    for row in rows:
        work = equations(row["solution"])
        assert 1 <= len(work) <= 3
        assert all(right(equation) for equation in work), row
        assert work[-1][3] == int(row["answer"])
        assert row["solution"].endswith(f"\\boxed{{{row['answer']}}}")
        assert all(2 <= equation[3] <= 50 for equation in work)


def test_steps_use_numbers_of_the_problem_or_earlier_results(rows):
    for row in rows:
        known = {int(x) for x in re.findall(r"\d+", row["problem"])}
        for left, _, other, result in equations(row["solution"]):
            assert {left, other} <= known, row
            known.add(result)


def test_all_lengths_and_operations_occur(rows):
    work = [equations(row["solution"]) for row in rows]
    assert min(sum(len(w) == n for w in work) for n in (1, 2, 3)) > 200
    assert min(sum(any(e[1] == op for e in w) for w in work) for op in "+-*") > 200


def test_same_seed_same_problems_other_seed_others():
    assert records("train", 200, seed=5) == records("train", 200, seed=5)
    assert records("train", 50, seed=5) == records("train", 200, seed=5)[:50]
    first, other = ({row["problem"] for row in records("train", 200, seed=s)} for s in (5, 6))
    assert len(first & other) < 20


def test_splits_share_no_text_and_no_operands():
    def texts_and_operands(split, seeds):
        texts = [row["problem"] for seed in seeds for row in records(split, 3000, seed=seed)]
        return set(texts), {tuple(sorted(map(int, re.findall(r"\d+", text)))) for text in texts}

    train_texts, train_operands = texts_and_operands("train", (0, 1))
    test_texts, test_operands = texts_and_operands("test", (0, 1))
    assert not train_texts & test_texts
    assert not train_operands & test_operands


def test_problems_are_distinct():
    texts = [problem.text for problem in islice(problems("test", 0), 2000)]
    assert len(set(texts)) == len(texts)


def test_split_depends_on_the_numbers_only():
    by_numbers: dict[tuple[int, ...], set[str]] = {}
    for problem in [*islice(problems("train", 1), 3000), *islice(problems("test", 1), 3000)]:
        by_numbers.setdefault(problem.operands, set()).add(split_of(problem))
    assert all(len(splits) == 1 for splits in by_numbers.values())


def test_command_line_writes_both_files(tmp_path):
    command = [sys.executable, str(TINY / "problems.py"), "--out", str(tmp_path / "d"), "--train", "20", "--test", "10"]
    subprocess.run(command, check=True, capture_output=True)
    for split, count in (("train", 20), ("test", 10)):
        rows = [json.loads(line) for line in (tmp_path / "d" / f"{split}.jsonl").read_text().splitlines()]
        assert rows == records(split, count, seed=0)
        assert all(set(row) == {"problem", "answer", "solution"} for row in rows)


def attempts(kind: str, count: int = 500):
    rng = random.Random(kind)
    for problem in islice(problems("train", 9), count):
        yield problem, flaws.attempt(problem, kind, rng)


def test_rates_sum_to_one_and_are_what_is_drawn():
    rng = random.Random(0)
    drawn = [flaws.draw_kind(rng, flaws.RATES) for _ in range(20_000)]
    assert sum(flaws.RATES.values()) == pytest.approx(1)
    assert all(abs(drawn.count(kind) / 20_000 - rate) < 0.015 for kind, rate in flaws.RATES.items())


def test_right_attempts_are_right():
    for problem, text in attempts("right"):
        assert all(right(equation) for equation in equations(text))
        assert text.endswith(f"\\boxed{{{problem.answer}}}")


def test_guesses_show_no_working_and_are_rarely_right():
    hits = 0
    for problem, text in attempts("guess"):
        assert not equations(text)
        hits += text.endswith(f"\\boxed{{{problem.answer}}}")
    assert hits < 0.12 * 500


def test_a_slip_makes_exactly_one_equation_wrong():
    wrong = [sum(not right(equation) for equation in equations(text)) for _, text in attempts("slip")]
    assert set(wrong) <= {0, 1}
    assert wrong.count(1) > 0.9 * len(wrong)


def test_a_wrong_operation_is_computed_rightly_but_differs_in_one_step():
    changed = 0
    for problem, text in attempts("wrong operation"):
        work = equations(text)
        assert all(right(equation) for equation in work)
        pairs = zip(work, equations(problem.solution("story")), strict=True)
        differ = sum(one[1] != other[1] for one, other in pairs)
        assert differ <= 1
        changed += differ
    assert changed > 0.7 * 500


def test_stopping_early_leaves_out_steps_and_no_box_leaves_out_the_box():
    for problem, text in attempts("stops early"):
        work = equations(text)
        assert len(work) < len(problem.steps) or len(problem.steps) == 1
        assert text.endswith(f"\\boxed{{{work[-1][3]}}}")
    for problem, text in attempts("no box"):
        assert "boxed" not in text
        assert text.endswith(f"The answer is {problem.answer}.")
