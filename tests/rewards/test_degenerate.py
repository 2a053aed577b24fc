"""What a collapsed policy writes: graded in bounded time and memory, and without harm to the next batch."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from fura_rl.rewards import MathVerifier, extract_answer


def _load_benchmark() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "verifier.py"
    spec = importlib.util.spec_from_file_location("benchmark_verifier", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = _load_benchmark()
KINDS = dict(benchmark._degenerate_kinds(0))
ANSWERS = ["-3", r"\frac{1}{2}", "x^2+y^2=1", r"\{1,2\}", "no solution"]
# All others are turned away before a worker is asked; these take all of their time beside three of the answers,
# of which one will do.
ENDLESS = ("sum", "binomial")
CASES = [(kind, answer) for kind in KINDS for answer in (ANSWERS[1:4] if kind in ENDLESS else ANSWERS)]


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier(timeout=4.0) as verifier:
        yield verifier


@pytest.mark.parametrize(("kind", "answer"), CASES)
def test_a_degenerate_completion_is_graded_within_the_deadline(verifier: MathVerifier, kind: str, answer: str) -> None:
    verifier.start()
    started = time.monotonic()
    grade = verifier.grade([KINDS[kind]], [answer])[0]
    assert time.monotonic() - started < 3 * (4.0 + 0.1)  # the default deadline of a batch of one
    assert grade.correct is not True
    if kind not in ENDLESS:
        assert grade.reason in ("wrong", "no_answer")


def test_256_degenerate_completions(verifier: MathVerifier) -> None:
    """Under 10 s in all, every worker below the memory limit, and the next batch as good as any."""
    batch = benchmark.degenerate(256)
    with MathVerifier() as verifier:
        verifier.start()
        started = time.monotonic()
        grades = verifier.grade(batch.completions, batch.answers)
        assert time.monotonic() - started < 10
        assert not any(grade.correct for grade in grades)
        assert all(benchmark.resident_mib(pid) < 1024 for pid in verifier.worker_pids)
        after = benchmark.ordinary("ordinary", 64, 100, seed=6)
        graded = verifier.grade(after.completions, after.answers)
        assert [grade.correct for grade in graded] == after.labels


def test_a_right_answer_within_degenerate_text_still_counts(verifier: MathVerifier) -> None:
    text = "wait, " * 100_000 + r"\boxed{" * 1000 + r" so it is \boxed{\frac{3}{4}}"
    assert verifier.grade([text], ["0.75"])[0].correct


def test_many_boxes_with_nested_brackets_for_a_reference_of_several_parts(verifier: MathVerifier) -> None:
    nested = r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}"
    assert verifier.grade([r"\boxed{1}, " + nested, nested + ", " + nested], ["1, 2", "1, 2"])[0].correct is False


def test_lone_surrogates_and_null_bytes_reach_the_worker(verifier: MathVerifier) -> None:
    grades = verifier.grade(["\\boxed{\ud800x+1}", "\\boxed{\0(x+1)(x-1)}"], ["x+2", "x^2-1"])
    assert [grade.reason for grade in grades] == ["wrong", "correct"]


def test_extraction_reads_a_megabyte_quickly() -> None:
    started = time.monotonic()
    for text in (r"\boxed{" * 150_000, "$" * 1_000_000, "{" * 1_000_000, "the answer is " * 70_000, "1 " * 500_000):
        extract_answer(text)
        extract_answer(text, "number")
        extract_answer(text, "expression")
    assert time.monotonic() - started < 2
