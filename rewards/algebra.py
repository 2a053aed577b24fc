"""Equality by computer algebra: math-verify on the parts that structure leaves open. Runs in a worker only."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from .equivalence import compare

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# Boxes are opened and units removed before; math-verify's own removal of units takes the variable of `5 t` for one.
_CONFIG = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none"),
        boxed_match_priority=-1,
    ),
)


@lru_cache(maxsize=4096)
def _parse(form: str) -> list[Any]:
    # No timeout of its own: math-verify's is an alarm, and the process has one already.
    return parse(f"${form}$", extraction_config=_CONFIG, parsing_timeout=None)


def equal(gold: str, answer: str, float_rounding: int) -> bool:
    """Whether two canonical forms are equal, by structure first and math-verify for what structure leaves open."""

    def leaf(g: str, a: str) -> bool:
        return verify(_parse(g), _parse(a), float_rounding=float_rounding, timeout_seconds=None)

    return bool(compare(gold, answer, leaf, float_rounding))


def plain_equal(gold: str, answer: str, float_rounding: int) -> bool:
    """What math-verify says by itself about two answers as they were written: a second opinion for the audit."""
    reference = gold if "$" in gold else f"${gold}$"
    return verify(
        parse(reference, parsing_timeout=None),
        parse(rf"$\boxed{{{answer}}}$", parsing_timeout=None),
        float_rounding=float_rounding,
        timeout_seconds=None,
    )
