r"""What counts as the answer of a completion: the last closed box, and the fallbacks."""

import pytest

from fura_rl.rewards import extract_answer
from fura_rl.rewards.extraction import MAX_ANSWER_CHARS, extract_boxes, extract_reference, last_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so $\boxed{5}$", "5"),
        (r"\boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed { 7 }", "7"),
        (r"\fbox{8}", "8"),
        (r"\framebox{9}", "9"),
        (r"\boxed{x = \boxed{6}}", "6"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"$\boxed 7$.", "7"),
        (r"\boxed\frac12$", r"\frac12"),
        ("\\boxed{\n1\n}", "1"),
        (r"\boxed{2} and then \boxed{3", "2"),  # truncated: the last complete box
        (r"\boxed{12", None),
        (r"\boxed{}", None),
        (r"\boxed{1} \boxed{}", None),  # the last box counts, even if empty
        (r"\boxedness{3}", None),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_closed_box(text: str, expected: str | None) -> None:
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} and \boxed{2}", ["1", "2"]),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", ["1", "2", "3"]),
        (r"\boxed{7}. So the answer is \boxed{7}", ["7"]),
        (r"First \boxed{30}. The other angles are equal, so they are \boxed{75, 75}.", ["75, 75"]),
        (r"\boxed{1} " + "x" * 200 + r" or \boxed{2}", ["2"]),
        ("none", []),
    ],
)
def test_boxes_that_form_one_answer(text: str, expected: list[str]) -> None:
    assert extract_boxes(text) == expected


def test_box_longer_than_the_limit_is_no_answer() -> None:
    assert extract_answer(r"\boxed{" + "1" * MAX_ANSWER_CHARS + "}") is None


@pytest.mark.parametrize(
    ("text", "number", "expression"),
    [
        ("It costs $1,234.50 in all.", "1,234.50", "1,234.50"),
        ("Final Answer: The final answer is $28 \\%$. I hope it is correct.", "28 \\%", "$28 \\%$"),
        ("so $x^2 > 5$ holds", "5", "$x^2 > 5$"),
        ("The answer is 3/4.", "3/4", "3/4"),
        ("There are 12 of them, as shown in part B.", "12", "12"),
        (r"\frac{4}{23}", r"\frac{4}{23}", r"\frac{4}{23}"),
        (r"10\text{ units}", "10", r"10\text{ units}"),
        ("一共有**858颗**糖果。", "858", "858"),
        ("no number here", None, None),
        ("model A2", None, None),
    ],
)
def test_fallbacks(text: str, number: str | None, expression: str | None) -> None:
    assert extract_answer(text, "number") == number
    assert extract_answer(text, "expression") == expression


def test_a_box_wins_over_every_fallback() -> None:
    text = r"\boxed{4}. The final answer is $5$."
    assert extract_answer(text, "number") == extract_answer(text, "expression") == "4"


def test_last_number_keeps_sign_and_separators() -> None:
    assert last_number("from 7 to -1,000,000") == "-1,000,000"


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("72", ["72"]),
        (r"\frac{1}{2}", [r"\frac{1}{2}"]),
        ("She has 5 - 3 = <<5-3=2>>2 left.\n#### 1,200", ["1,200"]),
        (r"We add and get $\boxed{14}$.", ["14"]),
        (r"\boxed{1} or \boxed{2}", ["1", "2"]),
        (r"\boxed{17", ["17"]),
    ],
)
def test_reference_answers_may_be_whole_solutions(reference: str, parts: list[str]) -> None:
    assert extract_reference(reference) == parts
