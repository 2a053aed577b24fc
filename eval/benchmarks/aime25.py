"""AIME 2025: the American Invitational Mathematics Examination, contests I and II of February 2025.

Source: math-ai/aime25 (test). Licence: Apache-2.0 for the collection; the problems are the MAA's. Size: 30.
Metric: avg@k (mean accuracy over k sampled completions a problem; k = 8 in the FuRA paper, 16 to 64 elsewhere).
Conventions: T=0.6, top_p=0.95; answers are integers from 0 to 999. With 30 problems the interval is wide however many
samples are drawn: a standard error of 5 points and more comes from the choice of problems alone.
"""

from .base import Spec

AIME25 = Spec(
    name="aime25",
    repo="math-ai/aime25",
    split="test",
    revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    rows=30,
    files=("aime25.jsonl",),
    file_sha256="9881ee50886a7acf1007d947f1ce96bfb66fcd898c11271a7a22bf6bb1bfa595",
)
