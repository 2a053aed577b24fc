r"""Find the final answer in a completion: the last `\boxed{}`, and, if asked for, a fallback."""

from __future__ import annotations

import re
from typing import Literal

Fallback = Literal["number", "expression"]

# A fallback reads only the end of a completion: the final answer stands there, and the cost stays bounded.
TAIL_CHARS = 3_000
# The longest box content that is still read as an answer; the longest MATH gold has 159 characters.
MAX_ANSWER_CHARS = 20_000
# How many of the last boxes are looked at: bounds the work on text that repeats an unclosed `\boxed{`.
MAX_BOXES = 16

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# TeX boxes the next token when there is no brace: `\boxed 7`, `\boxed\frac12`. The token ends where the formula does.
_UNBRACED = re.compile(r"[^\s$.,;{}][^\s${}]*")
_BETWEEN_BOXES_CHARS = 60
_SEPARATOR = re.compile(r"(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|[,;&+]")

_NUMBER = r"-?(?:\d{1,3}(?:[,\u202f ]\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+"
_LAST_NUMBER = re.compile(rf"(?<![\w.])(?:\$\s*)?((?:{_NUMBER})(?:/\d+(?!\d))?\s*\\?%?)")
# Bounded, so that delimiters that never close cost no quadratic time.
_MATH = re.compile(
    r"\$\$(.{1,400}?)\$\$|(?<!\\)\\\[(.{1,400}?)\\\]|(?<!\\)\\\((.{1,400}?)\\\)|(?<!\\)\$([^$\n]{1,400}?)(?<!\\)\$",
    re.DOTALL,
)
_ANSWER_PHRASE = re.compile(r"(?i:final answer|the answer|answer)\s*(?:\w+\s+){0,4}?(?:is|are|=|:)+\s*:?\s*")


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one just before `start`, or None if it is not closed within the limit."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + MAX_ANSWER_CHARS):
        if match.group() == "{":
            depth += 1
        elif match.group() == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""The last closed boxes as (start, end, content), in the order of the text; a box inside a box counts alone."""
    starts: list[int] = []
    position = len(text)
    while len(starts) < MAX_BOXES:
        position = max(text.rfind(name, 0, position) for name in (r"\boxed", r"\fbox", r"\framebox"))
        if position < 0:
            break
        starts.append(position)
    found: list[tuple[int, int, str]] = []
    for start in starts:  # from the last to the first
        opened = _BOX.match(text, start)
        if opened is None:
            continue
        content_start = opened.end()
        if text[content_start : content_start + 1] == "{":
            end = _closing_brace(text, content_start + 1)
            if end is None:  # a truncated completion
                continue
            content = text[content_start + 1 : end]
            end += 1
        else:
            token = _UNBRACED.match(text, content_start, content_start + MAX_ANSWER_CHARS)
            if token is None:
                continue
            content, end = token.group().rstrip(".,;:!?"), token.end()
        if found and end > found[-1][0]:  # it wraps a box already found: the inner one is the answer
            continue
        found.append((start, end, content.strip()))
    return found[::-1]


def extract_boxes(text: str) -> list[str]:
    r"""The boxes that together form the final answer: the last one and those listed right before it.

    `\boxed{1} and \boxed{2}` gives `["1", "2"]`; a box repeated in a conclusion is named once. Empty if there is no
    closed box.
    """
    boxes = _boxes(text)
    if not boxes:
        return []
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : group[0][0]]
        # One sentence that lists answers: nothing but a few words and a separator stands between its boxes.
        adjacent = len(between) < 10
        listed = len(between) <= _BETWEEN_BOXES_CHARS and "\n\n" not in between and _SEPARATOR.search(between)
        if not (adjacent or listed):
            break
        group.insert(0, box)
    contents = [content for _, _, content in group]
    return [content for i, content in enumerate(contents) if content and content not in contents[:i]]


def _from_phrase(tail: str) -> str | None:
    """What follows the last "the answer is" up to the end of its sentence."""
    phrases = list(_ANSWER_PHRASE.finditer(tail))
    if not phrases:
        return None
    rest = tail[phrases[-1].end() :]
    math = _MATH.match(rest)
    if math:
        return next(group for group in math.groups() if group)
    sentence = re.split(r"\n|\.(?:\s|$)", rest, maxsplit=1)[0].strip()
    return sentence if 0 < len(sentence) <= 60 else None


def last_number(text: str) -> str | None:
    """The last number of a text as written (`1,234.5`, `3/4`, `28%`), or None."""
    matches = _LAST_NUMBER.findall(text[-TAIL_CHARS:])
    return matches[-1].strip() if matches else None


def last_expression(text: str) -> str | None:
    """What a text without a box seems to answer: after "the answer is", else the last formula, else the last number."""
    tail = text[-TAIL_CHARS:]
    phrase = _from_phrase(tail)
    if phrase is not None:
        return phrase
    formulas = _MATH.findall(tail)
    if formulas:
        return next(group for group in formulas[-1] if group)
    return last_number(tail)


def extract_answer(text: str, fallback: Fallback | None = None) -> str | None:
    r"""The final answer of a completion.

    Args:
        text: The completion.
        fallback: What to read if there is no box: nothing (default; right for a reward, which should teach the
            format), the last `"number"`, or the last `"expression"`.

    Returns:
        The content of the last closed `\boxed{}` or `\fbox{}`, else what the fallback finds, else None.
    """
    boxes = _boxes(text)
    if boxes:
        return boxes[-1][2] or None
    if fallback is None:
        return None
    return last_number(text) if fallback == "number" else last_expression(text)
