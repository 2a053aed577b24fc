"""AMC 2023: problems of the AMC 12A and 12B of 2023 that have an integer answer.

Source: math-ai/amc23 (test). Licence: none stated; the problems are the MAA's. Size: 40.
Metric: accuracy of one greedy completion (the FuRA paper), or avg@k.
Conventions: multiple choice turned into free answers, which are integers.
"""

from .base import Row, Spec


def _integer(answer: object) -> str:
    """The hub stores answers as numbers or text such as "27.0"."""
    number = float(str(answer))
    return str(int(number)) if number.is_integer() else str(answer)


def to_row(row: Row, index: int) -> Row:
    return {
        "problem": row.get("problem") or row.get("question"),
        "answer": _integer(row["answer"]),
        "unique_id": f"amc23-{row['id']}",
        "subject": "AMC 2023",
    }


AMC23 = Spec(
    name="amc23",
    repo="math-ai/amc23",
    split="test",
    revision="80815d37005feb82cd7f8fbc6901d5d3eff43057",
    rows=40,
    files=("amc23.jsonl",),
    to_row=to_row,
    file_sha256="7f8b7e4883eb2ded803ede4c34455356a67fc5e1ba0de3086d34cce72f74f686",
)
