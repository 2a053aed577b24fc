"""`fura-rl` by itself, `fura-rl doctor`, and what a user sees after a mistake."""

import os
import subprocess
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fura_rl import doctor
from fura_rl.cli import COMMANDS, app, main


def test_without_arguments_every_command_is_listed_with_an_example():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert set(COMMANDS) == {command.name for command in app.registered_commands}
    text = " ".join(result.output.split())
    for name, (what, example) in COMMANDS.items():
        assert f"{name} {what} {example}" in text and example.startswith(f"fura-rl {name}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_offered(shell):
    result = CliRunner().invoke(app, [], prog_name="fura-rl", env={"_FURA_RL_COMPLETE": f"source_{shell}"})
    assert "_FURA_RL_COMPLETE" in result.output


def test_a_wrong_name_gets_the_nearest_one():
    result = CliRunner().invoke(app, ["comparr"])
    assert result.exit_code == 2 and "Did you mean 'compare'?" in result.output


def test_a_mistake_is_one_sentence_and_an_example(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fura-rl", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {tmp_path} has no metrics.jsonl")
    assert hint == "An example: fura-rl report runs/demo (options: fura-rl report --help)"


def test_doctor_names_a_broken_engine_and_what_is_not_installed(tmp_path):
    """As a user starts it: exit status 1, and the reason for each thing that is amiss."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    metadata = tmp_path / "vllm-0.30.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0\n")
    process = subprocess.run(
        [sys.executable, "-m", "fura_rl.cli", "doctor"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    assert "ok   adapter: loss" in process.stdout and "ok   verifier: 4 answers" in process.stdout
    assert "FAIL engine: vLLM 0.30.0 is installed but cannot be imported: ImportError: libcudart" in process.stdout
    for package, _, remedy in doctor.OPTIONAL:
        line = next(line for line in process.stdout.splitlines() if line.split()[:1] == [package])
        assert (doctor.installed(package) is None) == (remedy in line)


def test_doctor_finds_what_is_wrong(monkeypatch):
    """The checks can fail: a merge that loses precision, and a grade that is not what it should be."""
    assert doctor.check_adapter() and doctor.check_verifier()
    monkeypatch.setattr(doctor, "TOLERANCE", -1.0)
    with pytest.raises(doctor.Failed, match="merged and adapted logits differ"):
        doctor.check_adapter()
    console = Console(file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    assert doctor.doctor(console) is False
    assert "FAIL adapter: merged and adapted logits differ" in " ".join(console.export_text().split())
