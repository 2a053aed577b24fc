"""`fura-rl watch`: the numbers of a run in a terminal, and when it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fura_rl.cli import app
from fura_rl.trainer import watch
from fura_rl.trainer.report_page import read_run
from fura_rl.trainer.watch import BARS, ended, frame, seconds_left, sparkline


def text_of(run):
    console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(frame(run))
    return console.export_text()


@pytest.fixture
def run_dir(tmp_path):
    """Three of ten steps of a run, 4 seconds each, by a process that exists."""
    rows = [{"step": s, "time": 100.0 + 4 * s, "reward": s / 4, "time/train": 3.0, "time/sync": 1.0} for s in (1, 2, 3)]
    values = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "truncated": 0.25, "no_answer": 0.0, "mean_tokens": 9.0}
    score = {f"eval_x[1]_{name}": value for name, value in values.items()}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"step": 0, **score}, *rows]))
    write_facts(tmp_path, os.getpid())
    return tmp_path


def write_facts(folder, pid):
    facts = {"max_steps": 10, "pid": pid, "host": socket.gethostname(), "started": time.time() - 60}
    (folder / "run.json").write_text(json.dumps(facts))


def test_sparkline():
    assert sparkline([]) == "" and sparkline([2.0, 2.0]) == BARS[0] * 2
    assert sparkline([0, 7]) == BARS[0] + BARS[-1]
    assert sparkline(list(range(1000)), width=8) == BARS


def test_a_frame_shows_numbers_and_time_left(run_dir):
    run = read_run(run_dir)
    assert seconds_left(run) == 7 * 4.0 and ended(run) is None
    text = text_of(run)
    assert "step 3 of 10" in text and "0:00:28 left" in text
    reward = next(line.split() for line in text.splitlines() if line.strip().startswith("reward"))
    assert reward == ["reward", "0.750", "0.250", sparkline([1, 2, 3])]
    assert "x[1]" in text and "0.500 [0.400, 0.600]" in text and "cut off 25%" in text  # brackets are no markup
    assert [line.split()[:3] for line in text.splitlines()[-2:]] == [["train", "3.00", "75%"], ["sync", "1.00", "25%"]]


def test_the_end_of_a_run(run_dir):
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    write_facts(run_dir, finished.pid)
    assert "process is gone" in ended(read_run(run_dir))
    (run_dir / "summary.json").write_text('{"steps": 3}')
    assert ended(read_run(run_dir)) == "stopped after step 3 of 10"
    (run_dir / "summary.json").write_text('{"steps": 3, "error": "The disk is full."}')
    assert ended(read_run(run_dir)) == "stopped after step 3 of 10: The disk is full."
    (run_dir / "summary.json").write_text('{"steps": 10}')
    assert ended(read_run(run_dir)) == "finished"


def test_once_prints_one_frame(run_dir):
    result = CliRunner().invoke(app, ["watch", str(run_dir), "--once"])
    assert result.exit_code == 0 and "step 3 of 10" in result.output


def test_it_follows_until_the_run_ends(run_dir, monkeypatch):
    """Into a pipe: a picture at the start, one for each step, one at the end."""

    def go_on():
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 4, "time": 120.0, "reward": 1.0}) + "\n")
        (run_dir / "summary.json").write_text('{"steps": 10}')

    monkeypatch.setattr(watch.time, "sleep", lambda seconds: go_on())  # after the first picture
    result = CliRunner().invoke(app, ["watch", str(run_dir), "--every", "0.1"])
    assert result.exit_code == 0
    assert "step 3 of 10" in result.output and "step 4 of 10" in result.output.split("finished")[0]


def test_ctrl_c_ends_the_watching_not_the_run(run_dir):
    process = subprocess.Popen(
        [sys.executable, "-m", "fura_rl.cli", "watch", run_dir, "--every", "0.1"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert "step 3 of 10" in read_until(process, "of 10")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "The run goes on" in out
    finally:
        process.kill()


def read_until(process, words):
    """The lines of a process up to the one that holds `words`."""
    lines = ""
    while words not in lines:
        line = process.stdout.readline()
        assert line, "it ended"
        lines += line
    return lines


@pytest.mark.slow
def test_a_real_run(tiny_run):
    text = text_of(read_run(tiny_run))
    for words in ("step 2 of 2   finished", "reward", "completion length", "entropy", "test ", "generate", "GiB"):
        assert words in text
