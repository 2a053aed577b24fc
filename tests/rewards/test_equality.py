r"""Pairs of answers that are equal, and pairs that look alike and are not: by the exact path and by algebra."""

import pytest

from fura_rl.rewards import MathVerifier
from fura_rl.rewards.canonical import canonical, compact
from fura_rl.rewards.equivalence import compare
from fura_rl.rewards.limits import too_large
from fura_rl.rewards.numerals import read_number
from fura_rl.rewards.structure import as_interval, shape_of, split_name

# (reference, answer, equal, decided without algebra)
CASES = [
    # spelling
    (r"\frac12", r"\dfrac{1}{2}", True, True),
    (r"\left(\frac12,3\right)", "(0.5, 3)", True, True),
    ("x^{2}", "x^2", True, True),
    (r"2\sqrt{13}", r"2 \sqrt 13", True, True),
    (r"\text{Evelyn}", "evelyn", True, True),
    (r"\text{even}", "odd", False, None),
    ("A", r"\text{(A)}", True, True),
    ("(A)", "A) 5", True, True),
    ("A", r"\text{B}", False, True),
    ("73", "**73**", True, True),
    ("−5", "-5", True, True),  # a typographic minus
    ("$12$", "12", True, True),
    # numbers
    ("1000", "1,000.00", True, True),
    ("1{,}000", "1000", True, True),
    (r"32349", r"32,\! 349", True, True),
    ("32349", "32, 349", False, True),
    (r"\frac{1}{3}", "0.333333", True, True),
    (r"\frac{1}{3}", "0.33", False, True),
    (r"-\frac{1}{2}", r"\frac{1}{-2}", True, True),
    (r"2\frac{1}{2}", "5/2", True, True),
    (r"3\times10^8", "300000000", True, True),
    (r"50\%", "0.5", True, True),
    ("50", "50 percent", True, True),
    ("0.1", "0.01", False, True),
    ("0.0000001", "0.0000004", False, True),
    ("7" * 400, "7" * 399 + "8", False, None),
    (r"28_9", "28_{9}", True, True),
    ("28_9", "28_7", False, True),
    # units
    ("10", r"10\text{ m}", True, True),
    ("15", "15 cm^2", True, True),
    (r"2\sqrt{3}", r"2\sqrt{3} \text{ feet}", True, True),
    ("72", "72 degrees", True, True),
    (r"90^\circ", "90", True, True),
    (r"\$18.90", "18.9", True, True),
    ("5", "5 or so I would guess after all", False, True),
    ("5", "5 apples were left to her by Tom", False, False),
    ("4", "4ab", False, False),
    ("5", "5t", False, False),
    ("5", "5 million", False, False),
    (r"8:34\text{ p.m.}", r"8:34\text{ a.m.}", False, False),
    # structure
    ("(1,2)", "[1,2]", False, True),
    ("(1,2)", "(2,1)", False, True),
    ("(1,2)", r"\{1,2\}", False, True),
    (r"\{1,2\}", "2, 1", True, True),
    ("1,2", "1,2,3", False, True),
    ("10,20", "10", False, True),
    (r"x=\pm 2", "-2, 2", True, True),
    (r"\pm 2", "2", False, True),
    ("AB=4,CD=5", "4, 5", True, True),
    ("AB=4,CD=5", "5, 4", False, True),
    ("p=5,q=2;p=7,q=2", "(5,2),(7,2)", True, True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", True, True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False, True),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty,2)", True, True),
    (r"(-\infty,2)\cup(3,\infty)", r"x<2 \text{ or } x>3", True, True),
    ("(-3,2)", "-3 < x < 2", True, True),
    (r"[2,\infty)", r"x \ge 2", True, True),
    (r"[2,\infty)", "x > 2", False, True),
    # names
    ("5", "x = 5", True, True),
    ("x=5", "5", True, True),
    ("x=5", "y=5", False, False),
    ("5", "a + b = 5", True, True),
    ("x+y=1", "1", False, True),
    # algebra
    ("x^2-1", "(x-1)(x+1)", True, False),
    (r"\sin^2 x", r"1-\cos^2 x", True, False),
    (r"6\sqrt{5}", r"\sqrt{180}", True, False),
    ("2^{10}", "1024", True, False),
    (r"\binom{10}{3}", "120", True, False),
    ("6+9i", "9i+6", True, False),
    ("x+1", "x+2", False, False),
    ("-(ab+ac+bc)", "-ab-ac-bc", True, False),
]


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        yield verifier


def test_equality(verifier: MathVerifier) -> None:
    grades = verifier.grade_extracted([case[1] for case in CASES], [case[0] for case in CASES])
    wrong = [(case, grade) for case, grade in zip(CASES, grades, strict=True) if grade.correct is not case[2]]
    assert not wrong


@pytest.mark.parametrize("case", [case for case in CASES if case[3] is not None], ids=str)
def test_which_answers_need_algebra(case: tuple[str, str, bool, bool]) -> None:
    reference, answer, equal, without_algebra = case
    decided = compare(canonical(reference), canonical(answer))
    assert decided is (equal if without_algebra else None)


def test_float_rounding_is_configurable() -> None:
    assert compare(canonical(r"\frac{8}{3}"), "2.6667", float_rounding=2) is True
    assert compare(canonical(r"\frac{8}{3}"), "2.6667", float_rounding=6) is False


@pytest.mark.parametrize(
    ("form", "kind"),
    [("(x+1)(x+2)", "scalar"), ("(x+1)", "scalar"), ("(1,2]", "bracket"), ("{1,2}", "set"), ("1;2", "list")],
)
def test_shapes(form: str, kind: str) -> None:
    assert shape_of(form).kind == kind


def test_names_are_not_expressions() -> None:
    assert split_name("f(x) = x+1") == ("f(x)", "x+1")
    assert split_name(r"\frac{NO}{BO}=3") == (r"\frac{NO}{BO}", "3")
    assert split_name("2x = 4") == ("", "2x = 4")
    assert split_name("x = 2+3 = 5") == ("x", "5")
    assert split_name(r"\frac{1}{3} \approx 0.33") == ("", r"\frac{1}{3}")


def test_inequalities_as_intervals() -> None:
    assert as_interval(r"1 \leq x < 2") == "[1,2)"
    assert as_interval(r"2 > x \geq 1") == "[1,2)"
    assert as_interval(r"3 < x") == r"(3,\infty)"
    assert as_interval("x + y < 3") == "x + y < 3"


def test_spaces_that_end_a_command_survive() -> None:
    assert compact(canonical(r"\pi r + 1")) == r"\pi r+1"


def test_numbers_too_long_to_convert_are_not_numbers() -> None:
    assert read_number("7" * 400) is None
    assert too_large("7" * 400) is not None


@pytest.mark.parametrize("form", [r"2^{2005}", "(1.05)^{120}", r"x^{2005}", r"(x+1)^{10}", "100!", r"\binom{100}{50}"])
def test_ordinary_answers_are_within_the_limits(form: str) -> None:
    assert too_large(canonical(form)) is None


@pytest.mark.parametrize("form", ["9^{9^{9}}", "(9^9)^{9^9}", "(x+y)^{200}", "99999!", "((9!)!)!", r"\int_0^1 x dx"])
def test_answers_beyond_the_limits(form: str) -> None:
    assert too_large(canonical(form)) is not None
