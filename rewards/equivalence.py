r"""Equality of two answers by structure: lists, sets, tuples, intervals, matrices, assignments, text, numbers.

Every comparison is three-valued: True, False, or None for "not decided here". The parent process decides what it can
without algebra; a worker repeats the comparison with a `leaf` that asks math-verify about the parts left open.
Standard library only: the grading workers import this module without the rest of the package.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .canonical import compact
from .numerals import equal_numbers, read_number

Leaf = Callable[[str, str], "bool | None"]

# Matching unordered elements is quadratic.
MAX_ELEMENTS = 64

_OPEN, _CLOSE = "([{", ")]}"
_MATRIX = re.compile(r"\\begin\{matrix\}(.*)\\end\{matrix\}", re.DOTALL)
_TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_RELATION = re.compile(r"\\leq|\\geq|\\neq|\\in(?![a-zA-Z])|[<>]|(?<![<>!\\])=")
# A name, not an expression: letters with subscripts and arguments, lengths such as |AB|, ratios of names, tuples of
# names. It carries no arithmetic, so dropping `name =` keeps the value.
_NAME = re.compile(
    r"(?=.*[a-zA-Z])(?:\\(?:angle|triangle|operatorname|mathrm|frac|overline|alpha|beta|gamma|theta|lambda|mu|phi|omega)"
    r"|[a-zA-Z]|_\{?[a-zA-Z0-9,]++\}?|\^\{?(?:-1|\\prime|')\}?|'|\((?:[a-zA-Z]|-?\d+|,| )*+\)|[\s,:|{}])++"
)
_WORDS = re.compile(r"[a-zA-Z][a-zA-Z \-'.,!?]*+")
_CHOICE = re.compile(r"\(?\s*([A-H])\s*\)?\s*(?:[.:)]\s*\S.*)?|\(\s*([A-H])\s*\)\s*\S.*")


def split_top(form: str, *separators: str) -> list[str]:
    r"""Split at the separators (tokens such as `,` or `\cup`) outside every bracket.

    Brackets need not match in kind, as in `[0, 1)`.
    """
    parts: list[str] = []
    depth, start = 0, 0
    for match in _TOKEN.finditer(form):
        token = match.group()
        bare = token[-1] if token in ("\\{", "\\}") else token
        if bare in _OPEN:
            depth += 1
        elif bare in _CLOSE:
            depth = max(0, depth - 1)
        elif depth == 0 and token in separators:
            parts.append(form[start : match.start()])
            start = match.end()
    parts.append(form[start:])
    return [part.strip() for part in parts]


def _enclosed(form: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) if one pair of brackets spans the whole form."""
    tokens = list(_TOKEN.finditer(form))
    if len(tokens) < 2:
        return None
    depth = 0
    for match in tokens:
        bare = match.group()[-1] if match.group() in ("\\{", "\\}") else match.group()
        if bare in _OPEN:
            depth += 1
        elif bare in _CLOSE:
            depth -= 1
            if depth == 0 and match is not tokens[-1]:
                return None
        elif depth == 0:
            return None
    first, last = tokens[0], tokens[-1]
    if depth != 0:
        return None
    return first.group(), form[first.end() : last.start()].strip(), last.group()


@dataclass(frozen=True)
class Shape:
    """The outermost structure of a form. `kind` is scalar, list, set, bracket, union or matrix."""

    kind: str
    parts: tuple[str, ...] = ()
    brackets: str = ""  # "()", "[)", ... of a tuple or an interval
    rows: int = 0


def shape_of(form: str) -> Shape:
    """Read the outermost structure; brackets around a single part are dropped."""
    if match := _MATRIX.fullmatch(form):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[1]) if row.strip()]
        cells = [cell.strip() for row in rows for cell in row.split("&")]
        return Shape("matrix", tuple(cells), rows=len(rows))
    pieces = split_top(form, r"\cup")
    if len(pieces) > 1:
        return Shape("union", tuple(pieces))
    for separator in (";", ","):
        parts = [part for part in split_top(form, separator) if part]
        if len(parts) > 1:
            return Shape("list", tuple(parts))
    enclosed = _enclosed(form)
    if enclosed:
        opening, inside, closing = enclosed
        inner = shape_of(inside)
        is_set = opening == r"\{" and closing == r"\}"
        if inner.kind == "list":
            if is_set or (opening, closing) == ("{", "}"):
                return Shape("set", inner.parts)
            return Shape("bracket", inner.parts, opening[-1] + closing[-1])
        if is_set:
            return Shape("set", (inside,) if inside else ())
        if inside and opening in "({" and closing in ")}":
            return inner if inner.kind != "scalar" else Shape("scalar", (inside,))
    signs = re.findall(r"\\pm(?![a-zA-Z])|\\mp(?![a-zA-Z])", form)
    if len(signs) == 1:
        plus = re.sub(r"\\pm(?![a-zA-Z])", "+", re.sub(r"\\mp(?![a-zA-Z])", "-", form))
        minus = re.sub(r"\\pm(?![a-zA-Z])", "-", re.sub(r"\\mp(?![a-zA-Z])", "+", form))
        return Shape("list", (plus.lstrip("+ "), minus.strip()))
    return Shape("scalar", (form,))


def split_name(form: str) -> tuple[str, str]:
    r"""(`x`, `5`) for `x = 5`, `x \in 5` and `x \approx 5`; ("", form) if it does not start by naming the value.

    Of a chain of equations the last part is the value, of `exact \approx rounded` the exact one.
    """
    left, *rest = split_top(form, r"\approx")
    if rest:
        return (compact(left), rest[0]) if _NAME.fullmatch(left) else split_name(left)
    if len(split_top(form, ",", ";")) > 1:
        return "", form
    head, *member = split_top(form, r"\in")
    if len(member) == 1 and _NAME.fullmatch(head):
        return compact(head), member[0]
    sides = split_top(form, "=")
    if len(sides) > 1 and all(sides):
        if _NAME.fullmatch(sides[0]):
            return compact(sides[0]), sides[-1]
        if not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", sides[0])) or len(sides) > 2:
            return "", sides[-1]
    return "", form


def _all(results: Sequence[bool | None]) -> bool | None:
    if any(result is False for result in results):
        return False
    return True if all(results) else None


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


def _compare_parts(gold: Shape, answer: Shape, same: Leaf) -> bool | None:
    ordered_kinds = {"bracket", "list"}
    if gold.kind == "matrix" or answer.kind == "matrix":
        if gold.kind != answer.kind:
            return None
        if (gold.rows, len(gold.parts)) != (answer.rows, len(answer.parts)):
            return False
        return _all([same(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)])
    if gold.kind == "union" or answer.kind == "union":
        # Pieces may be merged or split differently; only agreement is decided here.
        if gold.kind == answer.kind and len(gold.parts) == len(answer.parts):
            return _unordered(gold.parts, answer.parts, same) or None
        return None
    if len(gold.parts) != len(answer.parts):
        flat_gold, flat_answer = (
            [piece for part in shape.parts for piece in split_top(part, ",")] for shape in (gold, answer)
        )
        if gold.kind == answer.kind == "list" and len(flat_gold) == len(flat_answer):
            return _unordered(flat_gold, flat_answer, same)
        return False
    if gold.kind == answer.kind == "bracket":
        if gold.brackets != answer.brackets:
            return False
        return _all([same(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)])
    if {gold.kind, answer.kind} == ordered_kinds:
        if "(" not in gold.brackets + answer.brackets or ")" not in gold.brackets + answer.brackets:
            return None
        return _all([same(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)])
    if {gold.kind, answer.kind} <= {"list", "set"}:
        names = [{split_name(part)[0] for part in shape.parts} for shape in (gold, answer)]
        if any("" not in one and len(one) > 1 and other == {""} for one, other in (names, names[::-1])):
            # `AB = 4, CD = 5` against `4, 5`: the order says which is which.
            return _all([same(g, a) for g, a in zip(gold.parts, answer.parts, strict=True)])
        return _unordered(gold.parts, answer.parts, same)
    return None


def _compare_text(gold: str, answer: str) -> bool | None:
    """Words and multiple-choice letters; None if neither side is certainly text."""
    choices = [_CHOICE.fullmatch(form) for form in (gold, answer)]
    if all(choices):
        letters = [match[1] or match[2] for match in choices if match]
        return letters[0] == letters[1]
    is_text = [bool(_WORDS.fullmatch(form)) and max(map(len, re.split(r"\W+", form))) >= 4 for form in (gold, answer)]
    if any(is_text):
        words = [re.sub(r"[^a-z0-9]+", " ", form.casefold()).strip() for form in (gold, answer)]
        if all(is_text) or words[0] == words[1]:
            return words[0] == words[1]
    return None


def compare(gold: str, answer: str, leaf: Leaf | None = None, float_rounding: int = 6, depth: int = 0) -> bool | None:
    """Whether two canonical forms are equal.

    Args:
        gold: The reference answer, in canonical form.
        answer: The answer to judge, in canonical form.
        leaf: Decides pairs of scalars that neither spelling nor number settles; None leaves them open.
        float_rounding: Decimals to which a decimal number must agree.
        depth: Nesting level reached; deep structures are left to `leaf`.

    Returns:
        True, False, or None if undecided.
    """
    if compact(gold) == compact(answer):
        return True
    if not gold or not answer:
        return False
    (gold_name, gold_value), (answer_name, answer_value) = split_name(gold), split_name(answer)
    if gold_name == answer_name or not (gold_name and answer_name):
        gold, answer = gold_value, answer_value
        if compact(gold) == compact(answer):
            return True
    numbers = read_number(gold), read_number(answer)
    if numbers[0] and numbers[1]:
        return equal_numbers(numbers[0], numbers[1], float_rounding)
    text = _compare_text(gold, answer)
    if text is not None:
        return text
    shapes = shape_of(gold), shape_of(answer)
    if {shape.kind for shape in shapes} != {"scalar"} and depth < 4:
        if any(len(shape.parts) > MAX_ELEMENTS for shape in shapes):
            return False

        def same(g: str, a: str) -> bool | None:
            return compare(g, a, leaf, float_rounding, depth + 1)

        decided = _compare_parts(*shapes, same) if "scalar" not in {s.kind for s in shapes} else None
        if decided is not None:
            return decided
        if any(shape.kind == "list" for shape in shapes) and not any(_RELATION.search(f) for f in (gold, answer)):
            return False
    elif numbers == (None, None) or any(numbers):
        gold, answer = shapes[0].parts[0], shapes[1].parts[0]
        if compact(gold) == compact(answer):
            return True
    return leaf(gold, answer) if leaf else None
