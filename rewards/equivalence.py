r"""Equality of two answers in canonical form: by spelling, by number, by structure, and part by part.

Every comparison is three-valued: True, False, or None for "not decided here". The parent process decides what it can
without algebra; a worker repeats the comparison with a `leaf` that asks math-verify about the parts left open.
Standard library only: the grading workers import this module without the rest of the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .canonical import compact
from .numerals import equal_numbers, read_number, strip_unit
from .structure import Shape, as_interval, is_equation, shape_of, split_name, split_top

Leaf = Callable[[str, str], "bool | None"]

# Matching unordered elements is quadratic.
MAX_ELEMENTS = 64
MAX_NESTING = 4

_WORDS = re.compile(r"[a-zA-Z][a-zA-Z \-'.,!?]*+")
# A letter that may stand for a choice, with or without the text of the choice: `C`, `(C)`, `C. 42`, `(C) 42`.
_CHOICE = re.compile(r"\(?\s*([A-H])\s*\)?\s*(?:[.:)]\s*\S.*)?|\(\s*([A-H])\s*\)\s*\S.*")


def _all(results: Sequence[bool | None]) -> bool | None:
    if any(result is False for result in results):
        return False
    return True if all(results) else None


def _ordered(gold: Sequence[str], answer: Sequence[str], same: Leaf) -> bool | None:
    return _all([same(g, a) for g, a in zip(gold, answer, strict=True)])


def _unordered(gold: Sequence[str], answer: Sequence[str], same: Leaf) -> bool | None:
    """Whether the elements can be paired off. Cheap matches are taken first; equality is taken to be transitive."""
    left = list(answer)
    open_gold = []
    for element in gold:
        key = compact(element)
        twin = next((other for other in left if compact(other) == key), None)
        if twin is None:
            open_gold.append(element)
        else:
            left.remove(twin)
    undecided = False
    for element in open_gold:
        results = [same(element, other) for other in left]
        if True in results:
            left.pop(results.index(True))
        elif None in results:
            undecided = True
        else:
            return False
    return None if undecided else True


def _flat(shape: Shape) -> list[str]:
    return [piece for part in shape.parts for piece in split_top(part, ",")]


def _distinct(shape: Shape) -> Shape:
    return Shape(shape.kind, tuple({compact(part): part for part in shape.parts}.values()))


def _compare_collections(gold: Shape, answer: Shape, same: Leaf) -> bool | None:
    """Lists and sets: without order, unless names on one side say which value is which."""
    if len(gold.parts) != len(answer.parts):
        # Groups (`p=5,q=2; p=7,q=2`) may also be written as one list, and a solution may be listed twice.
        flat_gold, flat_answer = _flat(gold), _flat(answer)
        if len(flat_gold) == len(flat_answer):
            return _unordered(flat_gold, flat_answer, same)
        gold, answer = _distinct(gold), _distinct(answer)
        if len(gold.parts) != len(answer.parts):
            return False
    names = [{split_name(part)[0] for part in shape.parts} for shape in (gold, answer)]
    for named, other in (names, names[::-1]):
        if len(named) > 1 and "" not in named and other == {""}:  # `AB = 4, CD = 5` against `4, 5`
            return _ordered(gold.parts, answer.parts, same)
    return _unordered(gold.parts, answer.parts, same)


def _compare_shapes(gold: Shape, answer: Shape, same: Leaf) -> bool | None:
    kinds = {gold.kind, answer.kind}
    if kinds <= {"list", "set"}:
        return _compare_collections(gold, answer, same)
    if kinds == {"matrix"}:
        if (gold.rows, len(gold.parts)) != (answer.rows, len(answer.parts)):
            return False
        return _ordered(gold.parts, answer.parts, same)
    if kinds == {"union"}:
        # Pieces may be merged or split differently, so only agreement is decided here.
        same_count = len(gold.parts) == len(answer.parts)
        return (_unordered(gold.parts, answer.parts, same) or None) if same_count else None
    if kinds == {"bracket"}:
        if gold.brackets != answer.brackets or len(gold.parts) != len(answer.parts):
            return False
        return _ordered(gold.parts, answer.parts, same)
    if kinds == {"bracket", "list"} and "()" in (gold.brackets, answer.brackets):
        # A tuple without its parentheses keeps its order.
        return _ordered(gold.parts, answer.parts, same) if len(gold.parts) == len(answer.parts) else False
    if kinds == {"bracket", "set"}:
        return False
    if kinds == {"set", "scalar"}:
        return same(gold.parts[0], answer.parts[0]) if len(gold.parts) == len(answer.parts) == 1 else None
    return None


def _compare_text(gold: str, answer: str) -> bool | None:
    """Words and multiple-choice letters; None if neither side is certainly text."""
    choices = [_CHOICE.fullmatch(form) for form in (gold, answer)]
    if choices[0] and choices[1]:
        return (choices[0][1] or choices[0][2]) == (choices[1][1] or choices[1][2])
    words = [re.sub(r"[^a-z0-9]+", " ", form.casefold()).strip() for form in (gold, answer)]
    # A word of four letters or more is text; a shorter one may be a product of variables.
    is_text = [bool(_WORDS.fullmatch(form)) and max(map(len, form.split())) >= 4 for form in (gold, answer)]
    if any(is_text) and words[0] == words[1]:
        return True
    return False if all(is_text) else None


def compare(gold: str, answer: str, leaf: Leaf | None = None, float_rounding: int = 6, depth: int = 0) -> bool | None:
    """Whether two canonical forms are equal.

    Args:
        gold: The reference answer, in canonical form.
        answer: The answer to judge, in canonical form.
        leaf: Decides pairs that neither spelling nor number nor structure settles; without it they stay open.
        float_rounding: Decimals to which a decimal number must agree.
        depth: Nesting level reached; structures deeper than `MAX_NESTING` are left to `leaf`.

    Returns:
        True, False, or None if undecided.
    """
    if not gold or not answer:
        return False
    if compact(gold) == compact(answer):
        return True
    (gold_name, gold_value), (answer_name, answer_value) = split_name(gold), split_name(answer)
    if gold_name == answer_name and (gold_name or is_equation(gold) == is_equation(answer)):
        gold, answer = gold_value, answer_value
    elif not is_equation(gold):
        # `a + b = 5` answers 5, since it ends by saying so; a reference is taken at its word below.
        answer = split_top(answer, "=")[-1] if is_equation(answer) else answer_value
    elif not is_equation(answer):
        if gold_value == gold:
            return False
        gold = gold_value
    if compact(gold) == compact(answer):
        return True
    gold_number, answer_number = read_number(gold), read_number(answer)
    if gold_number and answer_number:
        return equal_numbers(gold_number, answer_number, float_rounding)
    text = _compare_text(gold, answer)
    if text is not None:
        return text

    shapes = shape_of(gold), shape_of(answer)
    if {shape.kind for shape in shapes} & {"bracket", "union"} and shapes[0].kind != shapes[1].kind:
        shapes = shape_of(as_interval(gold)), shape_of(as_interval(answer))
    kinds = {shape.kind for shape in shapes}
    if kinds != {"scalar"} and depth < MAX_NESTING:
        if any(len(shape.parts) > MAX_ELEMENTS for shape in shapes):
            return False

        def same(g: str, a: str) -> bool | None:
            return compare(g, a, leaf, float_rounding, depth + 1)

        decided = _compare_shapes(*shapes, same)
        if decided is not None:
            return decided
        if (gold_number or answer_number) and "set" not in kinds:
            return False  # one number against several, or against an interval or a matrix
    elif kinds == {"scalar"}:
        stripped = strip_unit(shapes[0].parts[0]), strip_unit(shapes[1].parts[0])
        if stripped != (gold, answer):  # without a unit or outer brackets it may be a number after all
            return compare(*stripped, leaf, float_rounding, depth) if depth < MAX_NESTING else None
    return leaf(gold, answer) if leaf else None
