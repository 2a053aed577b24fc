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
_NEW_SENTENCE = re.compile(r"\n\n|[.!?][\s$\\)\]]*\s[A-Z]")
_SEPARATOR = re.compile(r"(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|[,;&+]")

_NUMBER = r"-?(?:\d{1,3}(?:[,\u202f ]\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+"
_FRACTION = r"-?\\[dtc]?frac\{-?[\d.]+\}\{-?[\d.]+\}"
# Not inside a word such as `A2`; other scripts do not put spaces around numbers.
_LAST_NUMBER = re.compile(rf"(?<![a-zA-Z0-9_.])({_FRACTION}|(?:{_NUMBER})(?:/\d+(?!\d))?)(\s*(?:\\?%|percent|pct))?")
# Bounded, so that delimiters that never close cost no quadratic time.
_MATH = re.compile(
    r"\$\$(.{1,400}?)\$\$|(?<!\\)\\\[(.{1,400}?)\\\]|(?<!\\)\\\((.{1,400}?)\\\)"
    r"|(?<!\\)\$((?:\\\$|[^$\n]){1,400}?)(?<!\\)\$\s*(?:%|percent|pct)?",
    re.DOTALL,
)
_ANSWER_PHRASE = re.compile(
    r"(?i:final answer|the answer|answer)(?:\s+\w+){0,4}?\s*(?:(?<!\w)(?:is|are)(?!\w)|=|:)[\s:]*"
)
_PHRASE_CHARS = 200
_SENTENCE_END = re.compile(r"\n|[.。](?:\s|$)")
_TEXT_COMMAND = re.compile(r"\\(?:begin|end)\{\w+\}|\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\[a-zA-Z]+")
_PLAIN_WORD = re.compile(r"(?!(?:and|or)(?![a-z]))[^\W\d_]{2,}")
_TRAILING_WORDS = re.compile(r"(?<=[\d\s}\)])(?:\s*[a-zA-Z]+){1,3}\s*$")


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
        listed = (
            len(between) <= _BETWEEN_BOXES_CHARS and not _NEW_SENTENCE.search(between) and _SEPARATOR.search(between)
        )
        if not (adjacent or listed):
            break
        group.insert(0, box)
    contents = [content for _, _, content in group]
    return [content for i, content in enumerate(contents) if content and content not in contents[:i]]


def _is_formula(text: str) -> bool:
    """Whether a text is one expression, perhaps with a unit at its end, and no prose."""
    symbols = _TRAILING_WORDS.sub("", _TEXT_COMMAND.sub(" ", text))
    words = [word for word in _PLAIN_WORD.findall(symbols) if not (len(word) == 2 and word.isupper())]  # AB: a segment
    return not words and any(char.isalnum() for char in text)


def last_number(text: str) -> str | None:
    """The last number of a text as written (`1,234.5`, `3/4`, `28%`), or None."""
    matches = list(_LAST_NUMBER.finditer(text[-TAIL_CHARS:]))
    return matches[-1].group().strip() if matches else None


def _last_value(text: str) -> str | None:
    """The last formula or the last number of a text, whichever stands later."""
    formulas = list(_MATH.finditer(text))
    if not formulas:
        return last_number(text)
    after = last_number(text[formulas[-1].end() :])
    if after is not None:
        return after
    content = next(group for group in formulas[-1].groups() if group)
    # A dollar sign may be money: then what stands between two of them is prose.
    is_prose = len(_PLAIN_WORD.findall(_TEXT_COMMAND.sub(" ", content))) > 1
    return last_number(content) if is_prose else formulas[-1].group().strip()


def last_expression(text: str) -> str | None:
    """What a text without a box answers: all of it if it is one formula, else what follows "the answer is", else the
    last formula or number.
    """
    if len(text) <= _PHRASE_CHARS and _is_formula(text):
        return text.strip()
    tail = text[-TAIL_CHARS:]
    phrases = list(_ANSWER_PHRASE.finditer(tail))
    if phrases:
        sentence = _SENTENCE_END.split(tail[phrases[-1].end() :].lstrip(), maxsplit=1)[0][:_PHRASE_CHARS].strip()
        value = sentence if _is_formula(sentence) else _last_value(sentence)
        if value is not None:
            return value
    return _last_value(tail)


def extract_reference(answer: str) -> list[str]:
    r"""The parts of a reference answer: usually the answer itself, as one part.

    A reference may also be a whole solution: then it is its boxes, what follows GSM8K's `####`, or its last formula.
    """
    if "box" in answer:
        boxes = extract_boxes(answer)
        if boxes:
            return boxes
        answer = answer[match.end() :].removeprefix("{") if (match := _BOX.search(answer)) else answer
    if "####" in answer:
        return [answer.rpartition("####")[2].strip()]
    if len(_PLAIN_WORD.findall(_TEXT_COMMAND.sub(" ", answer))) > 12:
        return [last_expression(answer) or answer]
    return [answer]


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
