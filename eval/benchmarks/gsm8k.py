"""GSM8K: grade-school word problems, the test split.

Source: openai/gsm8k, configuration "main" (test); Cobbe et al., arXiv 2110.14168. Licence: MIT. Size: 1,319.
Metric: accuracy, one greedy completion a problem.
Conventions: the gold answer is what follows "####", thousands separators removed, always a number. Many published
numbers are 8-shot, with the last number of the completion as the answer; here zero-shot, \\boxed{}.
"""

from .base import Row, Spec

SHA256 = "5ce871f10b043b8314aad55c6bef71d1811875cd65d55cbc07c9938b66d9b27b"


def to_row(row: Row, index: int) -> Row:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"problem": row["question"], "answer": answer, "unique_id": f"gsm8k-test-{index}"}


GSM8K = Spec(
    name="gsm8k",
    repo="openai/gsm8k",
    config="main",
    split="test",
    revision="740312add88f781978c0658806c59bc2815b9866",
    rows=1319,
    files=("gsm8k.jsonl", "gsm8k_test.jsonl"),
    to_row=to_row,
    hub_sha256=SHA256,
    file_sha256=SHA256,
)
