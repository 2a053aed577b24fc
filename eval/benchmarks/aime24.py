"""AIME 2024: the American Invitational Mathematics Examination, contests I and II of 2024.

Source: HuggingFaceH4/aime_2024 (train). Licence: none stated; the problems are the MAA's. Size: 30.
Metric: avg@k, as for AIME 2025, with the same wide intervals.
Conventions: T=0.6, top_p=0.95; answers are integers from 0 to 999, leading zeros ("025") dropped.
"""

from .base import Row, Spec


def to_row(row: Row, index: int) -> Row:
    return {"problem": row["problem"], "answer": str(int(row["answer"])), "unique_id": row["id"]}


AIME24 = Spec(
    name="aime24",
    repo="HuggingFaceH4/aime_2024",
    split="train",
    revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    rows=30,
    files=("aime24.jsonl",),
    to_row=to_row,
    file_sha256="5c12009e1248193c6112476fb8865e3cef7f5cbde9682e8b569165bf6dcebbfc",
)
