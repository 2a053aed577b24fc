"""Rewards that shape length and form; none of them needs the verifier except `CosineLength`.

Every class is a reward function in TRL's sense: `(completions, completion_ids=None, **columns) -> list[float]`, with
`completion_ids` the token ids of each completion. Classes, not closures, so that they can be pickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from fura_rl.errors import FuraError

from .extraction import extract_boxes
from .messages import text_of

FormatStyle = Literal["boxed", "think", "think_boxed"]
_THINK = re.compile(r"\A\s*(?:<think>)?((?:(?!</?think>).)*)</think>((?:(?!</?think>).)*)\Z", re.DOTALL)


def _lengths(completion_ids: Sequence[Sequence[int]] | None, name: str) -> list[int]:
    if completion_ids is None:
        raise FuraError(f"The {name} reward counts tokens and needs completion_ids, which TRL's trainer passes.")
    return [len(ids) for ids in completion_ids]


class FormatReward:
    r"""1.0 if a completion has the asked-for form, else 0.0.

    Args:
        format_style: `"boxed"`: there is a closed `\boxed{}`. `"think"`: one `</think>` ends the reasoning, and
            something follows it (the opening tag may belong to the prompt). `"think_boxed"`: both, the box after the
            tag.
    """

    __name__ = "format"

    def __init__(self, format_style: FormatStyle = "boxed") -> None:
        if format_style not in ("boxed", "think", "think_boxed"):
            raise FuraError(f"Unknown format_style {format_style!r}: choose 'boxed', 'think' or 'think_boxed'.")
        self.format_style = format_style

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(self._fits(text_of(completion))) for completion in completions]

    def _fits(self, text: str) -> bool:
        if self.format_style == "boxed":
            return bool(extract_boxes(text))
        match = _THINK.match(text)
        if match is None or not match[2].strip():
            return False
        return self.format_style == "think" or bool(extract_boxes(match[2]))


class SoftOverlong:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), from 0.0 to -1.0.

    Args:
        max_completion_length: Tokens a completion may have, L_max.
        overlong_buffer: Width in tokens of the ramp that ends at L_max; by default a quarter of it, as in DAPO
            (4,096 of 16,384).
    """

    __name__ = "soft_overlong"

    def __init__(self, max_completion_length: int, overlong_buffer: int | None = None) -> None:
        self.buffer = max_completion_length // 4 if overlong_buffer is None else overlong_buffer
        if not 0 < self.buffer <= max_completion_length:
            raise FuraError(f"overlong_buffer must lie in 1..{max_completion_length}; got {self.buffer}.")
        self.max_length = max_completion_length

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float]:
        start = self.max_length - self.buffer
        return [-min(1.0, max(0.0, (n - start) / self.buffer)) for n in _lengths(completion_ids, self.__name__)]


class Repetition:
    """Minus the share of repeated n-grams of tokens, scaled (arXiv 2502.03373, appendix C.2).

    Args:
        repetition_ngram: Length n of the n-grams, in tokens.
        repetition_penalty: The reward of a completion that only repeats itself; 0 or below.
    """

    __name__ = "repetition"

    def __init__(self, repetition_ngram: int = 20, repetition_penalty: float = -1.0) -> None:
        if repetition_ngram < 1 or repetition_penalty > 0:
            raise FuraError("repetition_ngram must be at least 1 and repetition_penalty at most 0.")
        self.ngram, self.penalty = repetition_ngram, repetition_penalty

    def __call__(
        self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None, **columns: Any
    ) -> list[float]:
        _lengths(completion_ids, self.__name__)
        assert completion_ids is not None
        return [self._reward(ids) for ids in completion_ids]

    def _reward(self, ids: Sequence[int]) -> float:
        total = len(ids) - self.ngram + 1
        if total <= 0:
            return 0.0
        distinct = len({tuple(ids[i : i + self.ngram]) for i in range(total)})
        return self.penalty * (1 - distinct / total) if distinct < total else 0.0


def cosine(length: int, max_length: int, start: float, end: float) -> float:
    """Half a cosine wave from `start` at length 0 to `end` at `max_length` and beyond."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(length, max_length) / max_length))
