"""The audit reads a run's completions and lists what its three opinions disagree on."""

import json
from pathlib import Path

import pytest

from fura_rl.errors import FuraError
from fura_rl.rewards import MathVerifier
from fura_rl.rewards.audit import audit, audit_command

RECORDS = [
    {"completion": r"so 5: \boxed{5}", "answer": "5"},  # all agree
    {"completion": "the answer is 5", "answer": "5"},
    {"completion": r"\boxed{6}, or rather 5", "answer": "5"},
    {"completion": r"\boxed{5}, see step 3", "answer": "5"},
    {
        "completion": [{"role": "assistant", "content": r"\boxed{4ab}"}],
        "answer": "4",
    },  # math-verify takes ab for a unit
    {"completion": r"\boxed{[1,2]}", "answer": "[1,2]"},  # the last number has nothing to say
    {"completion": "no reference", "answer": None},
]


def write(run: Path, records: list) -> Path:
    (run / "completions").mkdir(parents=True)
    lines = [json.dumps({"step": i, "reward": 0.0, "extra": [1], **record}) for i, record in enumerate(records)]
    (run / "completions" / "rank0.jsonl").write_text("\n".join(lines) + "\n\n")
    return run


def test_kinds_of_disagreement(tmp_path: Path) -> None:
    with MathVerifier(workers=1) as verifier:
        opinions = audit(write(tmp_path, RECORDS), verifier)
    assert [opinion.kind for opinion in opinions] == [
        None,
        "no box, but the last number is right",
        "the last number is right, the box not",
        "the box is right, the last number is not",
        "verifier and math-verify disagree on the box",
        None,
    ]
    assert opinions[4].source == "rank0.jsonl:5" and opinions[4].step == 4
    assert opinions[4].verdict is False and opinions[4].exact is None and opinions[4].math_verify is True


def test_command_prints_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audit_command(str(write(tmp_path, RECORDS)))
    printed = capsys.readouterr().out
    assert "6 completions, 4 with disagreement" in printed
    assert "4ab" in printed


def test_user_errors(tmp_path: Path) -> None:
    with pytest.raises(FuraError, match="No completions"):
        audit_command(str(tmp_path))
    with pytest.raises(FuraError, match="line 1 lacks"):
        audit_command(str(write(tmp_path / "a", [{"prompt": "?"}])))
    run = write(tmp_path / "b", RECORDS)
    (run / "completions" / "rank0.jsonl").write_text("{broken\n")
    with pytest.raises(FuraError, match="not JSON"):
        audit_command(str(run))
