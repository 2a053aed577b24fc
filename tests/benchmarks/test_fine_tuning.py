"""The comparison of methods in fine-tuning: what it prints, and that finished runs are not made again."""

import json
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fine_tuning.py"


@pytest.mark.slow
def test_methods_rates_and_seeds(tiny_model, tiny_problems, tmp_path):
    text = tmp_path / "text.md"
    text.write_text("A page of words about something else. " * 40)
    other = tmp_path / "other.jsonl"  # a line of JSON may hold what str.splitlines takes for the end of a line
    row = {"problem": "One\u2028two?", "solution": "3 words"}
    other.write_text(f"{json.dumps(row, ensure_ascii=False)}\n" * 8, encoding="utf-8")
    command = [
        SCRIPT, "--model", str(tiny_model), "--train", str(tiny_problems / "train.jsonl"), "--test",
        str(tiny_problems / "test.jsonl"), "--unrelated", str(text), str(other), "--out", str(tmp_path / "rows.jsonl"),
        "--steps", "8", "--warmup", "2", "--held-out", "16", "--methods", "fura", "lora:lora_r=4", "full", "--rates",
        "2e-3", "full=1e-4", "full=1e-3",
    ]  # fmt: skip

    def run(*seeds):
        process = forked.run(*command, "--seeds", *seeds)
        assert process.returncode == 0, process.stderr[-3000:]
        return {row["method"]: row for row in json.loads(process.stdout.strip().splitlines()[-1])["rows"]}

    one = run("1")
    assert one.keys() == {"fura", "lora:lora_r=4", "full"} and one["fura"]["chosen"] == []
    assert one["full"]["rates"].keys() == {"0.0001", "0.001"} and one["fura"]["rates"].keys() == {"0.002"}
    assert all(row["learned"][0] > 0 for row in one.values())
    assert len({row["trainable"] for row in one.values()}) == 3
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 4 and len({json.loads(row)["before"] for row in rows}) == 1  # every method starts as the base

    two = run("1", "2")
    after = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert after[:4] == rows and len(after) == 8
    assert two["fura"]["seeds"] == 2 and two["fura"]["loss"][1] < two["fura"]["loss"][0] < two["fura"]["loss"][2]
    assert len(two["full"]["chosen"]) == 3


@pytest.mark.slow
def test_a_limit_that_leaves_no_example_is_said(tiny_model, tiny_problems, tmp_path):
    problems = str(tiny_problems / "train.jsonl")
    command = [
        SCRIPT, "--model", str(tiny_model), "--train", problems, "--test", problems, "--unrelated",
        problems, "--out", str(tmp_path / "rows.jsonl"), "--limit", "2",
    ]  # fmt: skip
    process = forked.run(*command)
    assert process.returncode == 1 and not (tmp_path / "rows.jsonl").exists()
    assert process.stderr.splitlines()[-1] == "error: No example of --train has 2 tokens or fewer: raise --limit."
