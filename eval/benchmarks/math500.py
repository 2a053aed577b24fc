"""MATH-500: 500 problems of the MATH test set, chosen by OpenAI for "Let's verify step by step".

Source: HuggingFaceH4/MATH-500 (test). Problems from Hendrycks et al., arXiv 2103.03874; the selection from Lightman et
al., arXiv 2305.20050. Licence: MIT (github.com/openai/prm800k, github.com/hendrycks/math); the problems themselves come
from contests (AMC, AIME and others). Seven subjects, levels 1 (easy) to 5.
Metric: accuracy, one greedy completion a problem; sampled avg@4 or avg@k in papers on reasoning models.
Conventions: zero-shot, final answer in \\boxed{}; graders differ in fractions, units and intervals by up to 2 points:
compare only numbers of one grader. The standard error at 50% is 2.2 points.
"""

from .base import Spec

SHA256 = "f4baeb27c3e5bac0396fdc3e42173df932f77910bb436684edaf9c6fa18cc3df"

MATH500 = Spec(
    name="math500",
    repo="HuggingFaceH4/MATH-500",
    split="test",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    rows=500,
    files=("math500.jsonl",),
    # The file of this revision, byte for byte, is also what the local format holds: one hash for both.
    hub_sha256=SHA256,
    file_sha256=SHA256,
)
