"""The benchmark of bf16 factors: the three forms start as one model, and the published one's core hardly moves."""

import json
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "precision.py"


@pytest.mark.slow
def test_cores_that_move(tiny_model, tiny_problems):
    files = ["--train", str(tiny_problems / "train.jsonl"), "--test", str(tiny_problems / "test.jsonl")]
    options = ["--rates", "9e-5", "--steps", "4", "--held-out", "8"]
    process = forked.run(SCRIPT, "--model", tiny_model, *files, *options)
    assert process.returncode == 0, process.stderr[-3000:]
    published, control, fura = json.loads(process.stdout.strip().splitlines()[-1])["rows"]
    assert published["moved"] < 0.2 < 0.99 < control["moved"]
    assert fura["moved"] > 0.99
    assert published["start"] == pytest.approx(fura["start"], rel=0.02)
    assert fura["update"] == pytest.approx(control["update"], rel=0.02)  # the same path but for bf16's L
