r"""Read a plain number the way people write it: `1,234.5`, `\frac{3}{4}`, `-2/3`, `28%`, `15 cm^2`, `3 \times 10^8`.

Standard library only: the grading workers import this module without the rest of the package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

# Longer literals are compared as strings: Python refuses to convert more than 4,300 digits, and no answer needs them.
MAX_DIGITS = 300

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d*)?|\.\d+)"
_SIGN = r"(?:[+-]\s*)?"
_PLAIN = re.compile(rf"({_SIGN})({_DECIMAL})")
_FRACTION = re.compile(
    rf"({_SIGN})(?:\\frac\s*\{{\s*({_SIGN}{_DECIMAL})\s*\}}\s*\{{\s*({_SIGN}{_DECIMAL})\s*\}}"
    rf"|\(?\s*({_SIGN}{_DECIMAL})\s*\)?\s*/\s*\(?\s*({_SIGN}{_DECIMAL})\s*\)?)"
)
# `28_9`, `1010_{two}`: digits in a base. The value is not converted: the question asked for that base.
_IN_BASE = re.compile(r"(\d+)\s*_\s*\{?\s*(\w+)\s*\}?")
_MIXED = re.compile(rf"({_SIGN})(\d+)\s*\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}}|({_SIGN})(\d+) (\d+)/(\d+)")
_SCIENTIFIC = re.compile(
    rf"({_SIGN}{_DECIMAL})\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{{?\s*([+-]?\d{{1,2}})\s*\}}?"
    rf"|({_SIGN}{_DECIMAL})[eE]([+-]?\d{{1,2}})"
)
# Words after a number are its unit: from four letters on, since shorter ones may be a product of variables (`4ab`),
# unless they are well-known units. Not those that change the value (`5 million`), and no functions.
_SHORT_UNITS = (
    "cm|mm|km|dm|nm|ft|in|yd|mi|kg|mg|lbs?|oz|gal|ml|mL|kL|hrs?|mins?|secs?|ms|mph|kph|rpm|deg|rad|sq|cu|cc|pts?|qts?|"
    "days?|men|USD|EUR|Rs"
)
_LONG_WORD = r"(?!(?:arc)?(?:sin|cos|tan|cot|sec|csc)h|hundred|thousand|[mbtr]+illion|dozen|percent|base)[a-zA-Z]{4,}+"
_WORD = rf"(?:(?:{_SHORT_UNITS})(?![a-zA-Z])|{_LONG_WORD})\.?"
_UNIT = re.compile(rf"{_WORD}(?:[\s/.]++[a-zA-Z]++\.?){{0,3}}+(?:\s*\^\s*\{{?\s*-?\d\s*\}}?)?")
_ENDS_QUANTITY = re.compile(r"(?:[\d})]|\\pi)$")
_FIRST_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}")


@dataclass(frozen=True)
class Number:
    """A number as written: its value, whether it was a decimal (hence perhaps rounded), whether a percentage, in which
    base if one was named."""

    value: Fraction
    decimal: bool = False
    percent: bool = False
    base: str = ""


def _value(sign: str, digits: str) -> Fraction:
    value = Fraction(re.sub(r"[ ,]", "", digits).rstrip(".") or "0")
    return -value if "-" in sign else value


def _signed(text: str) -> Fraction:
    match = _PLAIN.fullmatch(text.strip())
    assert match is not None
    return _value(match[1], match[2])


def _bare(text: str) -> Number | None:
    if match := _PLAIN.fullmatch(text):
        return Number(_value(match[1], match[2]), decimal="." in match[2])
    if match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = (match[i] or match[i + 4] or "" for i in range(1, 5))
        if int(bottom) == 0:
            return None
        value = int(whole) + Fraction(int(top), int(bottom))
        return Number(-value if "-" in sign else value)
    if match := _FRACTION.fullmatch(text):
        top, bottom = (match[2] or match[4]), (match[3] or match[5])
        if _signed(bottom) == 0:
            return None
        value = _signed(top) / _signed(bottom)
        return Number(-value if "-" in match[1] else value)
    if match := _SCIENTIFIC.fullmatch(text):
        mantissa, exponent = match[1] or match[3], match[2] or match[4]
        return Number(_signed(mantissa) * Fraction(10) ** int(exponent), decimal="." in mantissa)
    if match := _IN_BASE.fullmatch(text):
        return Number(Fraction(int(match[1])), base=match[2])
    return None


def read_number(form: str) -> Number | None:
    """The number that a canonical form consists of, or None if it is anything else (or longer than `MAX_DIGITS`)."""
    if not any(c.isdigit() for c in form[:40]) or sum(c.isdigit() for c in form[: 4 * MAX_DIGITS]) > MAX_DIGITS:
        return None
    if len(form) > 4 * MAX_DIGITS:
        return None
    percent = form.endswith("%")
    text = form[:-1].strip() if percent else form
    number = _bare(text)
    if number is None and not percent:
        number = _bare(strip_unit(text))
    return number and replace(number, percent=percent)


def strip_unit(form: str) -> str:
    r"""A canonical form without the unit after its last number or bracket, as in `15 cm^2` and `3 \pi feet`."""
    word = _FIRST_WORD.search(form)
    if word and _UNIT.fullmatch(form, word.start()):
        quantity = form[: word.start()].rstrip()
        if _ENDS_QUANTITY.search(quantity):
            return quantity
    return form


def equal_numbers(a: Number, b: Number, float_rounding: int) -> bool:
    """Whether two numbers agree: exactly, or to `float_rounding` decimals if one of them was written as a decimal.

    A percentage equals the number it is written with and the share it stands for: `28%` is `28` and `0.28`.
    """

    def same(x: Fraction, y: Fraction) -> bool:
        if x == y:
            return True
        if not (a.decimal or b.decimal) or round(x, float_rounding) != round(y, float_rounding):
            return False
        # Rounding would make every tiny number zero.
        return abs(x - y) <= max(abs(x), abs(y)) * Fraction(1, 100)

    if a.base and b.base and a.base != b.base:
        return False
    if a.percent == b.percent:
        return same(a.value, b.value)
    return same(a.value, b.value) or (same(a.value / 100, b.value) if a.percent else same(a.value, b.value / 100))
