"""Contamination: which benchmark problems have a twin in a training set.

Both sides are cut into tokens (words, LaTeX commands, numbers, single symbols; diagrams in [asy] removed), and problems
are compared by the Jaccard similarity of their sets of n-grams. Two readings of each pair:
- `copy`: the n-grams as they are, so a high value means the same problem, perhaps typeset differently;
- `template`: every number masked, so a high value means the same question with other numbers.
The second is what a list of near-duplicates between MATH-500 and MATH train holds; both matter, for different reasons.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .benchmarks import Benchmark, Problem

NGram = tuple[str, ...]
DIAGRAM = re.compile(r"\[asy\].*?\[/asy\]", re.DOTALL)
TOKEN = re.compile(r"\\[a-z]+|[^\W\d_]+|\d+|\S")


@dataclass(frozen=True)
class Match:
    """A benchmark problem and its nearest problem in the training set.

    Args:
        id, train_id: Ids of the two problems.
        copy, template: Jaccard similarities, numbers kept and numbers masked.
        same_answer: Whether the gold answers are equal as text.
    """

    id: str
    train_id: str
    copy: float
    template: float
    same_answer: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def tokens(text: str, mask_numbers: bool) -> list[str]:
    """Lower-case tokens of a problem; numbers become "0" if masked."""
    words = TOKEN.findall(DIAGRAM.sub(" ", text).lower())
    return ["0" if mask_numbers and word.isdigit() else word for word in words]


def ngrams(words: Sequence[str], n: int) -> frozenset[NGram]:
    """The set of n-grams; a shorter text is one gram."""
    return frozenset(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def jaccard(a: frozenset[NGram], b: frozenset[NGram]) -> float:
    """Size of the intersection over size of the union."""
    return len(a & b) / len(a | b)


def overlap(train: Sequence[Problem], benchmark: Benchmark, threshold: float = 0.7, n: int = 3) -> list[Match]:
    """Every pair whose masked similarity reaches `threshold`, the most alike first.

    Args:
        train: The training set.
        benchmark: Whose problems are looked up.
        threshold: Jaccard similarity, 0 to 1.
        n: Length of the n-grams, in tokens.
    """
    masked = [ngrams(tokens(p.problem, mask_numbers=True), n) for p in train]
    index: dict[NGram, list[int]] = defaultdict(list)
    for position, grams in enumerate(masked):
        for gram in grams:
            index[gram].append(position)
    matches = []
    for problem in benchmark.problems:
        grams = ngrams(tokens(problem.problem, mask_numbers=True), n)
        for position in _candidates(grams, index, masked, threshold):
            twin = train[position]
            plain = (ngrams(tokens(p.problem, mask_numbers=False), n) for p in (problem, twin))
            matches.append(
                Match(
                    problem.id,
                    twin.id,
                    copy=jaccard(*plain),
                    template=jaccard(grams, masked[position]),
                    same_answer=problem.answer.strip() == twin.answer.strip(),
                )
            )
    return sorted(matches, key=lambda m: (-m.copy, -m.template, m.id, m.train_id))


def _candidates(
    grams: frozenset[NGram], index: dict[NGram, list[int]], masked: list[frozenset[NGram]], threshold: float
) -> Iterable[int]:
    """Positions of training problems whose similarity reaches the threshold.

    Sets of similarity t share at least ceil(t * len) grams, so one of them is among any len - ceil(t * len) + 1: only
    as many, the rarest, need be looked up.
    """
    rarest = sorted(grams, key=lambda gram: (len(index.get(gram, ())), gram))
    needed = len(grams) - math.ceil(threshold * len(grams) - 1e-9) + 1
    seen: Counter[int] = Counter()
    for gram in rarest[:needed]:
        seen.update(index.get(gram, ()))
    return [position for position in sorted(seen) if jaccard(grams, masked[position]) >= threshold]


def summarise(matches: Sequence[Match], benchmark: Benchmark, threshold: float) -> dict[str, Any]:
    """Counts of benchmark problems (not pairs) with a twin, as a copy and as a template."""
    copies = {match.id for match in matches if match.copy >= threshold}
    templates = {match.id for match in matches}
    return {
        "benchmark": benchmark.name,
        "problems": len(benchmark.problems),
        "copies": len(copies),
        "copies_with_equal_answer": len({m.id for m in matches if m.copy >= threshold and m.same_answer}),
        "templates": len(templates),
        "pairs": len(matches),
    }
