"""Reject answers too large to be worth algebra, before any worker is asked.

A collapsed policy writes 10,000-digit numbers, towers of powers and fractions nested a thousand deep. None equals an
ordinary reference answer unless its spelling does, and the exact path has already looked at that. The limits are far
above what reference answers need: the longest of MATH has 159 characters, the deepest is nested 3 deep.
"""

from __future__ import annotations

import math
import re

MAX_CHARS = 500
MAX_DEPTH = 10
MAX_DIGIT_RUN = 120
MAX_CELLS = 100
MAX_POWERS = 40
MAX_BARS = 24
# Digits of the largest power of a number, and the largest power of a sum, that sympy is asked to work out.
MAX_POWER_DIGITS = 5_000
MAX_SUM_POWER = 64

_DIGIT_RUN = re.compile(rf"\d{{{MAX_DIGIT_RUN + 1},}}")
_BRACKETS = re.compile(r"[{}()\s]")
_POWER_CHAIN = re.compile(r"\d+(?:\.\d+)?(?:(?:\^|\*\*)[-+]?\d+)+")
_SUM_POWER = re.compile(r"\)\s*\^\s*\{?\s*(\d+)")
_HUGE_FACTORIAL = re.compile(r"(?:\d{5,}|!|\)|\})\s*!|\\d?binom\s*\{\s*\d{6,}")
_UNEVALUATED = re.compile(r"\\i*int(?![a-zA-Z])|\\lim(?![a-zA-Z])")


def _depth(form: str) -> int:
    depth = deepest = 0
    for char in form:
        if char in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "})]":
            depth -= 1
    return deepest


def _power_digits(chain: str) -> float:
    """About how many digits `a^b^c` has, read from the right."""
    base, *exponents = [abs(float(number)) for number in re.split(r"\^|\*\*", chain)]
    exponent = 1.0
    for value in reversed(exponents):
        if exponent * math.log10(max(value, 1.0)) > 12:
            return math.inf
        exponent = value**exponent
    return exponent * abs(math.log10(base)) if base > 0 else 0.0


def too_large(form: str) -> str | None:
    """Why a canonical form is too large for algebra, in words, or None if it is not."""
    if len(form) > MAX_CHARS:
        return f"longer than {MAX_CHARS} characters"
    if _DIGIT_RUN.search(form):
        return f"a number of more than {MAX_DIGIT_RUN} digits"
    if _depth(form) > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    if form.count("&") > MAX_CELLS or form.count("|") > MAX_BARS or form.count("^") > MAX_POWERS:
        return "too many cells, bars or powers"
    if any(_power_digits(chain) > MAX_POWER_DIGITS for chain in _POWER_CHAIN.findall(_BRACKETS.sub("", form))):
        return f"a power of more than {MAX_POWER_DIGITS} digits"
    has_variable = re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", form))
    if has_variable and any(int(power) > MAX_SUM_POWER for power in _SUM_POWER.findall(form)):
        return f"a sum to a power above {MAX_SUM_POWER}"
    if _HUGE_FACTORIAL.search(form):
        return "a factorial of a large number"
    if _UNEVALUATED.search(form):
        return "an integral or limit left to work out"
    return None
