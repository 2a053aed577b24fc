"""The benchmark of a whole step on the tiny model: phases add up to the step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "grpo_step.py"


@pytest.mark.slow
def test_phases_of_a_step():
    process = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--steps", "4", "--methods", "fura"], capture_output=True, text=True,
        timeout=1500, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    (row,) = json.loads(process.stdout.strip().splitlines()[-1])["rows"]
    assert row["method"] == "fura"
    assert len(row["steps"]) == 2
    for step in row["steps"]:
        phases = sum(step[name] for name in ("generate", "train", "logprobs", "reward", "sync", "probe", "other"))
        assert phases == pytest.approx(step["total"])
        assert min(step["generate"], step["train"], step["tokens"]) > 0
        assert step["other"] > -0.01  # phases do not overlap
