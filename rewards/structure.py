r"""The outermost structure of an answer in canonical form: list, set, tuple, interval, union, matrix, named value.

Standard library only: the grading workers import this module without the rest of the package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .canonical import compact

_OPEN, _CLOSE = "([{", ")]}"
_TOKEN = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_MATRIX = re.compile(r"\\begin\{matrix\}(.*)\\end\{matrix\}", re.DOTALL)
_PM, _MP = re.compile(r"\\pm(?![a-zA-Z])"), re.compile(r"\\mp(?![a-zA-Z])")
# A name, not an expression: letters with subscripts and arguments, lengths such as |AB|, ratios of names, tuples of
# names. It carries no arithmetic, so dropping `name =` keeps the value.
_NAME = re.compile(
    r"(?=.*[a-zA-Z])(?:\\(?:angle|triangle|frac|overline|alpha|beta|gamma|theta|lambda|mu|phi|omega)(?![a-zA-Z])"
    r"|[a-zA-Z]|_\{?[a-zA-Z0-9,]++\}?|\^\{?(?:-1|\\prime|')\}?|'|\((?:[a-zA-Z]|-?\d+|,| )*+\)|[\s,:|{}])++"
)
_INEQUALITY = re.compile(r"\\leq(?![a-zA-Z])|\\geq(?![a-zA-Z])|[<>]")
# `3 + 4 = 7` states a computation and its result.
_OPERATOR = r"[-+*/]|\\times|\\cdot|\\div"
_ARITHMETIC = re.compile(rf"[\d.,(\s]*[\d)]\s*(?:{_OPERATOR})(?:[\d.,()\s]|{_OPERATOR})*+")


def split_top(form: str, *separators: str) -> list[str]:
    r"""Split at the separators (tokens such as `,` or `\cup`) outside every bracket.

    Brackets need not match in kind, as in `[0, 1)`.
    """
    parts: list[str] = []
    depth, start = 0, 0
    for match in _TOKEN.finditer(form):
        token = match.group()
        bare = token[-1] if token in (r"\{", r"\}") else token
        if bare in _OPEN:
            depth += 1
        elif bare in _CLOSE:
            depth = max(0, depth - 1)
        elif depth == 0 and token in separators:
            parts.append(form[start : match.start()].strip())
            start = match.end()
    parts.append(form[start:].strip())
    return parts


def enclosed(form: str) -> tuple[str, str, str] | None:
    """(opening, inside, closing) if one pair of brackets spans the whole form."""
    tokens = list(_TOKEN.finditer(form))
    depth = 0
    for match in tokens:
        bare = match.group()[-1] if match.group() in (r"\{", r"\}") else match.group()
        if bare in _OPEN:
            depth += 1
        elif bare in _CLOSE:
            depth -= 1
        if depth <= 0 and match is not tokens[-1]:
            return None
    if len(tokens) < 2 or depth != 0:
        return None
    first, last = tokens[0], tokens[-1]
    return first.group(), form[first.end() : last.start()].strip(), last.group()


@dataclass(frozen=True)
class Shape:
    """The outermost structure of a form. `kind` is scalar, list, set, bracket, union or matrix."""

    kind: str
    parts: tuple[str, ...] = ()
    brackets: str = ""  # "()", "[)", ... of a tuple or an interval
    rows: int = 0  # of a matrix, whose parts are its cells


def _listed(form: str) -> list[str]:
    """The parts between semicolons, or else between commas."""
    for separator in (";", ","):
        parts = [part for part in split_top(form, separator) if part]
        if len(parts) > 1:
            return parts
    return [form] if form else []


def _both_signs(parts: Sequence[str]) -> tuple[str, ...]:
    r"""The parts with every `a \pm b` written out as its two values."""
    values: list[str] = []
    for part in parts:
        if len(_PM.findall(part)) + len(_MP.findall(part)) == 1:
            values += [_MP.sub("-", _PM.sub("+", part)).lstrip("+ "), _MP.sub("+", _PM.sub("-", part)).lstrip("+ ")]
        else:
            values.append(part)
    return tuple(values)


def shape_of(form: str) -> Shape:
    r"""Read the outermost structure.

    Brackets around a single part are dropped, and `a \pm b` is the list of its two values.
    """
    if form.count(r"\begin") == 1 and (match := _MATRIX.fullmatch(form)):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[1]) if row.strip()]
        return Shape("matrix", tuple(cell.strip() for row in rows for cell in row.split("&")), rows=len(rows))
    pieces = split_top(form, r"\cup")
    if len(pieces) > 1:
        return Shape("union", tuple(pieces))
    parts = _listed(form)
    if len(parts) > 1:
        return Shape("list", _both_signs(parts))
    if brackets := enclosed(form):
        opening, inside, closing = brackets
        parts = _listed(inside)
        if opening + closing == r"\{\}" or (opening + closing == "{}" and len(parts) > 1):
            return Shape("set", _both_signs(parts))
        if len(parts) > 1:
            return Shape("bracket", tuple(parts), opening[-1] + closing[-1])
        if parts and opening + closing in ("()", "{}"):
            return shape_of(inside)
    values = _both_signs([form])
    return Shape("list" if len(values) > 1 else "scalar", values)


def is_list(form: str) -> bool:
    """Whether a form gives several values without an order."""
    return shape_of(form).kind in ("list", "set")


def split_name(form: str) -> tuple[str, str]:
    r"""(`x`, `5`) for `x = 5`, `x \in 5` and `x \approx 5`; ("", form) if it does not start by naming the value.

    Of a chain of equations the last part is the value, of `exact \approx rounded` the exact one.
    """
    left, *rest = split_top(form, r"\approx")
    if rest:
        return (compact(left), rest[0]) if not left or _NAME.fullmatch(left) else split_name(left)
    if len(split_top(form, ",", ";")) > 1:
        return "", form
    head, *member = split_top(form, r"\in")
    if len(member) == 1 and _NAME.fullmatch(head):
        return compact(head), member[0]
    sides = split_top(form, "=")
    if len(sides) > 1 and all(sides):
        if _NAME.fullmatch(sides[0]):
            return compact(sides[0]), sides[-1]
        if len(sides) > 2 or _ARITHMETIC.fullmatch(sides[0]):
            return "", sides[-1]
    return "", form


def is_equation(form: str) -> bool:
    """Whether a single form has an equals sign outside every bracket."""
    return len(split_top(form, "=")) > 1 and len(split_top(form, ",", ";")) == 1


def as_interval(form: str) -> str:
    r"""An inequality about one name as the interval it describes: `x \geq 2` as `[2,\infty)`; any other form as it is.

    Several inequalities in a list (`x < 2 or x > 3`) become a union.
    """
    parts = _listed(form)
    if len(parts) > 1:
        intervals = [as_interval(part) for part in parts]
        return r" \cup ".join(intervals) if all(i != p for i, p in zip(intervals, parts, strict=True)) else form
    operators = _INEQUALITY.findall(form)
    sides = [side.strip() for side in _INEQUALITY.split(form)]
    if len(operators) not in (1, 2) or not all(sides) or sum(bool(_NAME.fullmatch(side)) for side in sides) != 1:
        return form
    if len(operators) == 1:
        operator, name_first = operators[0], bool(_NAME.fullmatch(sides[0]))
        closed, upper = operator in (r"\leq", r"\geq"), (operator in ("<", r"\leq")) == name_first
        bound = sides[1] if name_first else sides[0]
        if upper:
            return f"(-\\infty,{bound}{']' if closed else ')'}"
        return f"{'[' if closed else '('}{bound},\\infty)"
    if not _NAME.fullmatch(sides[1]) or len({operator in ("<", r"\leq") for operator in operators}) > 1:
        return form
    if operators[0] in (">", r"\geq"):
        sides, operators = sides[::-1], [operators[1], operators[0]]
    opening, closing = (
        ("[" if operators[0] in (r"\leq", r"\geq") else "("),
        ("]" if operators[1] in (r"\leq", r"\geq") else ")"),
    )
    return f"{opening}{sides[0]},{sides[2]}{closing}"
