"""The benchmark of a training step runs on a CPU and reports every method it can run there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


def run(*options: str) -> dict:
    run = subprocess.run([sys.executable, SCRIPT, "--tiny", *options], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_methods():
    rows = {row["method"]: row for row in run()["rows"]}
    assert list(rows) == ["floor", "full", "lora_r32", "lora_r64", "dora_r32", "oft", "published", "fura_torch"]
    for row in rows.values():
        assert row["failed"] is None
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]
    assert rows["lora_r32"]["to_lora"] == rows["floor"]["to_floor"] == 1
    assert rows["floor"]["trainable"] == 0
    assert 2 * rows["lora_r32"]["trainable"] == rows["lora_r64"]["trainable"]
    # all of a layer but its norms, which are 2 x 32 and 2 x 8 numbers, and the final norm; adapters train less
    projections = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert rows["full"]["trainable"] == projections + 2 * 32 + 2 * 8 + 32 + 8 * 32
    assert rows["published"]["trainable"] == rows["fura_torch"]["trainable"]


@pytest.mark.slow
def test_a_choice_of_methods_with_checkpointing():
    result = run("--rows", "fura_torch", "floor", "--checkpointing")
    assert [row["method"] for row in result["rows"]] == ["fura_torch", "floor"]
    assert "checkpointing" in result["title"]
    assert result["rows"][0]["to_lora"] is None
    assert result["rows"][0]["to_floor"] > 0
