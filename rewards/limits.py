"""Reject answers too large to be worth algebra, before any worker is asked.

A collapsed policy writes 10,000-digit numbers, towers of powers and fractions nested a thousand deep. None equals an
ordinary reference answer unless its spelling does, and the exact path has already looked at that.
"""

from __future__ import annotations

import re

MAX_CHARS = 1_000
MAX_DEPTH = 24
MAX_DIGIT_RUN = 120
MAX_CELLS = 120
MAX_POWERS = 40
MAX_EXPONENT = 20_000

_DIGIT_RUN = re.compile(rf"\d{{{MAX_DIGIT_RUN + 1},}}")
_EXPONENT = re.compile(r"(?:\^|\*\*)\s*\{?\s*[+-]?\s*(\d+)")
# A number raised to a number inside an exponent: 9^{9^9}.
_TOWER = re.compile(r"(?:\^|\*\*)\s*[{(]*\s*\d+\s*(?:\^|\*\*)\s*[{(]*\s*\d")
_FACTORIAL = re.compile(r"(?:\d{5,}|!|\))\s*!")


def _depth(form: str) -> int:
    depth = deepest = 0
    for char in form:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
    return deepest


def too_large(form: str) -> str | None:
    """Why a canonical form is too large for algebra, in words, or None if it is not."""
    if len(form) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if _DIGIT_RUN.search(form):
        return f"a number of more than {MAX_DIGIT_RUN} digits"
    if _depth(form) > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    if form.count("&") > MAX_CELLS:
        return f"a matrix of more than {MAX_CELLS} cells"
    if form.count("^") > MAX_POWERS or _TOWER.search(form):
        return "a tower of powers"
    if any(int(exponent[:12]) > MAX_EXPONENT for exponent in _EXPONENT.findall(form)):
        return f"an exponent above {MAX_EXPONENT}"
    if _FACTORIAL.search(form):
        return "a factorial of a large number"
    return None
