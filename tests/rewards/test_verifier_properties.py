"""Properties of `grade` on generated input: it never raises, keeps its deadline, ignores layout, repeats itself."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fura_rl.rewards import MathVerifier

TIMEOUT = 2.0

COMMANDS = r"\frac \sqrt \left \right \pm \cup \\ \begin{pmatrix} \end{pmatrix} \infty \sum \boxed{ \pi and or cm"
FRAGMENTS = st.sampled_from([*"0123456789xyn+-*/=^_{}()[],;:.!|&%$<> π", *COMMANDS.split()])
NOISE = st.lists(FRAGMENTS, max_size=40).map("".join) | st.text(max_size=60)

INTEGERS = st.integers(-9999, 9999).map(str)
SIGNED = st.integers(-20, 20).map(str)
ANSWERS = st.one_of(
    INTEGERS,
    st.builds(r"\frac{{{}}}{{{}}}".format, SIGNED, st.integers(1, 20)),
    st.builds(r"{}\sqrt{{{}}}".format, st.integers(1, 20), st.integers(2, 20)),
    st.builds("({},{})".format, SIGNED, SIGNED),
    st.builds("[{},{})".format, SIGNED, st.integers(21, 30)),
    st.builds(r"\{{{},{}\}}".format, SIGNED, st.integers(21, 30)),
    st.builds("x^2+{}x+{}".format, st.integers(1, 9), st.integers(1, 9)),
    st.builds("({}+x)({}+x)".format, st.integers(1, 9), st.integers(1, 9)),
)


@pytest.fixture(scope="module")
def verifier():
    # No cache, so that a second call decides anew.
    with MathVerifier(timeout=TIMEOUT, cache_size=0) as verifier:
        yield verifier


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NOISE, NOISE | ANSWERS), min_size=1, max_size=4))
def test_grade_never_raises_and_keeps_its_deadline(verifier: MathVerifier, pairs: list[tuple[str, str]]) -> None:
    completions = [rf"noise \boxed{{{text}}}" for text, _ in pairs]
    verifier.start()
    started = time.monotonic()
    grades = verifier.grade(completions, [answer for _, answer in pairs])
    assert time.monotonic() - started < 3 * (TIMEOUT + 0.1 * 2)
    for grade in grades:
        assert (grade.correct is None) == (grade.reason in ("timeout", "error"))
        assert grade.correct is (True if grade.reason == "correct" else grade.correct)
        assert (grade.extracted is None) == (grade.reason == "no_answer")


def relayout(form: str, spaces: bool, dollars: bool, left: bool, boxed_space: bool) -> str:
    """The same formula with another layout."""
    if left:
        form = form.replace("(", r"\left(").replace(")", r"\right)").replace("[", r"\left[")
        form = form.replace(r"\{", r"\left\{").replace(r"\}", r"\right\}")
    if spaces:
        for token in ("+", ",", r"\sqrt", r"\frac"):
            form = form.replace(token, f" {token} " if token in "+," else f" {token}")
    if dollars:
        form = f"${form}$"
    return f" {form}\n" if boxed_space else form


@settings(max_examples=120, deadline=None, derandomize=True)
@given(ANSWERS, ANSWERS, *[st.booleans()] * 4)
def test_layout_changes_no_verdict(
    verifier: MathVerifier, gold: str, answer: str, spaces: bool, dollars: bool, left: bool, boxed_space: bool
) -> None:
    other = relayout(answer, spaces, dollars, left, boxed_space)
    other_gold = relayout(gold, spaces, dollars, left, boxed_space)
    pairs = [(answer, gold), (other, gold), (answer, other_gold), (other, other_gold), (other, answer)]
    grades = verifier.grade([rf"\boxed{{{given}}}" for given, _ in pairs], [reference for _, reference in pairs])
    assert len({grade.correct for grade in grades[:4]}) == 1
    assert grades[4].correct is True


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(NOISE | ANSWERS, ANSWERS), min_size=1, max_size=4))
def test_grade_is_deterministic(verifier: MathVerifier, pairs: list[tuple[str, str]]) -> None:
    completions, answers = [rf"\boxed{{{text}}}" for text, _ in pairs], [answer for _, answer in pairs]
    first, second = verifier.grade(completions, answers), verifier.grade(completions, answers)
    # What the deadline decides may fall on either side of it.
    decided = [i for i, pair in enumerate(zip(first, second, strict=True)) if "timeout" not in {g.reason for g in pair}]
    assert [first[i] for i in decided] == [second[i] for i in decided]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ANSWERS, ANSWERS)
def test_integer_and_list_verdicts_are_symmetric(verifier: MathVerifier, one: str, other: str) -> None:
    grades = verifier.grade_extracted([one, other], [other, one])
    assert grades[0].correct is grades[1].correct
