"""Where the verifier's opinions part: a list of completions of a run worth a look by eye.

Three opinions are compared on every completion: the exact path (spelling, numbers, structure), math-verify by itself on
the boxed answer, and the last number of the completion. Where they disagree, a grader is wrong, or a model has found
an answer that only looks right.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fura_rl.errors import FuraError

from .canonical import canonical
from .extraction import extract_answer, last_number
from .messages import text_of
from .numerals import read_number
from .verifier import MathVerifier

# A whole completion may be megabytes; an answer this long is no case for a second opinion.
_MAX_OPINION_CHARS = 500


@dataclass(frozen=True)
class Opinions:
    """What was said of one completion: True, False, or None for no opinion.

    Attributes:
        source: File name and line number of the completion.
        step: Training step, if the file names it.
        answer: The reference answer.
        extracted: The last box, or None.
        exact: The exact path on the last box.
        math_verify: math-verify by itself on the last box.
        last_number: The verifier on the last number of the text, box or not.
        verdict: The verifier itself, as the reward uses it.
    """

    source: str
    step: int | None
    answer: str
    extracted: str | None
    exact: bool | None
    math_verify: bool | None
    last_number: bool | None
    verdict: bool | None

    @property
    def kind(self) -> str | None:
        """Which opinions disagree, in words; None if none do."""
        boxed = {opinion for opinion in (self.exact, self.math_verify, self.verdict) if opinion is not None}
        if self.extracted is not None and len(boxed) > 1:
            return "verifier and math-verify disagree on the box"
        if self.extracted is None:
            return "no box, but the last number is right" if self.last_number else None
        if self.last_number is not None and self.verdict is not None and self.last_number != self.verdict:
            return (
                "the box is right, the last number is not" if self.verdict else "the last number is right, the box not"
            )
        return None


def read_completions(run_dir: str | Path) -> Iterator[tuple[str, dict]]:
    """Records of `completions/*.jsonl` under a run's folder, each with its file name and line.

    Raises:
        FuraError: There is no such file, or a line is no JSON object with `completion` and `answer`.
    """
    files = sorted(Path(run_dir).glob("completions/*.jsonl"))
    if not files:
        raise FuraError(f"No completions to audit: {run_dir} has no completions/*.jsonl.")
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise FuraError(f"{path.name}, line {number} is not JSON: {error}.") from error
                if not isinstance(record, dict) or not {"completion", "answer"} <= record.keys():
                    raise FuraError(f"{path.name}, line {number} lacks `completion` or `answer`.")
                yield f"{path.name}:{number}", record


def audit(run_dir: str | Path, verifier: MathVerifier) -> list[Opinions]:
    """All opinions on every completion of a run that has a reference answer."""
    records = [(source, record) for source, record in read_completions(run_dir) if record["answer"] is not None]
    texts = [text_of(record["completion"]) for _, record in records]
    answers = [str(record["answer"]) for _, record in records]
    boxes = [extract_answer(text) for text in texts]
    grades = verifier.grade(texts, answers)
    by_number = verifier.grade_extracted([last_number(text) for text in texts], answers)
    asked = [i for i, box in enumerate(boxes) if box is not None and len(box) <= _MAX_OPINION_CHARS]
    replies = verifier.second_opinions([boxes[i] or "" for i in asked], [answers[i] for i in asked])
    opinions = dict(zip(asked, replies, strict=True))
    return [
        Opinions(
            source=source,
            step=record.get("step"),
            answer=answers[i],
            extracted=box,
            exact=None if box is None else verifier.exact(box, answers[i]),
            math_verify=opinions.get(i),
            # On an answer that is no number it has nothing to say.
            last_number=by_number[i].correct if by_number[i].extracted and read_number(canonical(answers[i])) else None,
            verdict=grades[i].correct,
        )
        for i, ((source, record), box) in enumerate(zip(records, boxes, strict=True))
    ]


def audit_command(run_dir: str, limit: int = 20) -> None:
    """List completions of a run on which the exact path, math-verify and the last number disagree.

    Args:
        run_dir: The folder of a training run; its `completions/*.jsonl` are read.
        limit: How many completions of each kind to show.
    """
    with MathVerifier() as verifier:
        opinions = audit(run_dir, verifier)
    console = Console()
    counts = Counter(opinion.kind for opinion in opinions)
    console.print(f"{len(opinions)} completions, {len(opinions) - counts[None]} with disagreement")
    for kind, count in counts.most_common():
        if kind is None:
            continue
        table = Table(title=f"{kind}: {count}", title_justify="left")
        for column in ("where", "step", "answer", "boxed", "verdict", "exact", "math-verify", "last number"):
            table.add_column(column, overflow="fold")
        for opinion in [opinion for opinion in opinions if opinion.kind == kind][:limit]:
            said = (opinion.verdict, opinion.exact, opinion.math_verify, opinion.last_number)
            cells = (opinion.source, opinion.step, opinion.answer, (opinion.extracted or "")[:80], *said)
            # Brackets of an answer are not console markup.
            table.add_row(*("-" if cell is None else str(cell).replace("[", r"\[") for cell in cells))
        console.print(table)
