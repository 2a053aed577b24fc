"""OlympiadBench: olympiad mathematics in English, text only, open-ended, with a final answer.

Source: Hothan/OlympiadBench, configuration "OE_TO_maths_en_COMP" (train); He et al., arXiv 2402.14008.
Licence: Apache-2.0 (github.com/OpenBMB/OlympiadBench). Size: 674.
Metric: accuracy, one greedy completion a problem.
Conventions: some problems have several answers, joined by commas as the original judge does; some ask for a tolerance
or a unit, which this grader does not know. Some papers count 675 problems (with one that has an image).
"""

from .base import Row, Spec


def to_row(row: Row, index: int) -> Row:
    context = f"{row['context']}\n" if row.get("context") else ""
    return {
        "problem": context + row["question"],
        "answer": ", ".join(answer.strip().strip("$") for answer in row["final_answer"]),
        "unique_id": row["id"],
        "subject": row.get("subfield"),
    }


OLYMPIADBENCH = Spec(
    name="olympiadbench",
    repo="Hothan/OlympiadBench",
    config="OE_TO_maths_en_COMP",
    split="train",
    revision="91184b52131e7fc9455fef848035173aea8cc01a",
    rows=674,
    files=("olympiadbench.jsonl",),
    to_row=to_row,
)
