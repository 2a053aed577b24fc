"""The benchmark of quantised bases runs on a CPU, a step and a short fine-tuning alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quantized.py"


def run(*options: object) -> list[dict]:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    command = [sys.executable, SCRIPT, *map(str, options), "--tiny"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])[
        "results"
    ]


@pytest.mark.slow
def test_a_step_of_every_method():
    (result,) = run("step", "--steps", 2)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["floor", "qfura", "qlora_r32", "qlora_r64", "qdora_r32"]
    assert all(row["failed"] is None and row["ms"] > 0 for row in rows.values())
    assert rows["qlora_r32"]["ms_to_qlora"] == 1
    assert rows["qlora_r64"]["trainable"] == 2 * rows["qlora_r32"]["trainable"] < 2 * rows["qdora_r32"]["trainable"]
    assert rows["floor"]["trainable"] == 0 < rows["qfura"]["trainable"]
    assert 0 < result["nf4_error"] < 0.5


@pytest.mark.slow
def test_both_methods_learn(tmp_path, tiny_model, tiny_problems):
    lines = [json.loads(line) for line in (tiny_problems / "train.jsonl").read_text().splitlines()[:24]]
    data = tmp_path / "solutions.jsonl"
    solved = [{"problem": line["problem"], "solution": f"It is \\boxed{{{line['answer']}}}."} for line in lines]
    data.write_text("".join(json.dumps(line) + "\n" for line in solved))
    files = ["--model", tiny_model, "--train", data, "--test", data]
    (result,) = run("loss", *files, "--steps", 6, "--rates", 3e-3, "--seeds", 1, 1, "--batch", 4, "--held-out", 8)
    first, second, lora, _ = (result["rows"][i] for i in (0, 2, 1, 3))
    assert [row["method"] for row in result["rows"]] == ["qfura", "qlora_r32"] * 2
    assert first["held_out"] == second["held_out"]  # a seed is a run
    assert first["held_out"] < result["before"] - 0.1 and lora["held_out"] < result["before"] - 0.1
    assert 0.08 < result["nf4_error"] < 0.11 and first["update"] > 0 and first["merged"] > 0
