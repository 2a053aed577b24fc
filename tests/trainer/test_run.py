"""The main job as users start it: a recipe in, a run directory out, with the real engine or without one."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from forked import Forked
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "fura_rl" / "train_grpo.py"),
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path, tiny_model, tiny_problems):
    train, test = str(tiny_problems / "train.jsonl"), str(tiny_problems / "test.jsonl")
    options = dict(
        model_name_or_path=str(tiny_model), dataset_name=train, output_dir=str(tmp_path / "run"), prompt="plain",
        max_steps=2, per_device_train_batch_size=32, num_generations=8, max_completion_length=80, learning_rate=1e-3,
        rewards=["accuracy", "format"], save_strategy="no", vllm_max_model_length=256, max_logp_gap=1e-3,
        benchmarks=[test], benchmark_steps=1, benchmark_max_tokens=80,
    )  # fmt: skip
    file = tmp_path / "recipe.yaml"

    def write(**changes):
        file.write_text(yaml.safe_dump({**options, **changes}))
        return file

    return write


def launch(recipe, *arguments, **environment):
    return subprocess.run(
        [*LAUNCH, "--config", str(recipe), *arguments], capture_output=True, text=True, timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip


def check_run(run: Path, engine: str) -> dict:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["engine"] == engine and summary["steps"] == 2 and summary["seed"] == 42
    assert [e["step"] for e in summary["evaluations"]] == [0, 1, 2]
    score = summary["evaluations"][0]["scores"]["test"]
    assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1 and score["problems"] == 16
    assert {"generate", "reward", "train", "evaluate", "total"} <= set(summary["seconds"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward" in line] == [1, 2]
    rollouts = [json.loads(line) for line in (run / "completions" / "step_000002.jsonl").read_text().splitlines()]
    assert len(rollouts) == 8
    assert {"step", "prompt", "completion", "answer", "extracted", "rewards", "advantage"} == set(rollouts[0])
    with safe_open(run / "adapter_model.safetensors", "pt") as file:
        moved = [name for name in file.keys() if "core" in name and file.get_tensor(name).abs().max() > 0]  # noqa: SIM118
    assert moved
    for name in ("adapter_config.json", "tokenizer.json", "config.yaml", "curves.png"):
        assert (run / name).stat().st_size > 0
    return summary


@pytest.mark.slow
@pytest.mark.vllm
def test_main_job_with_vllm(recipe, tmp_path):
    """The command line wins over the recipe; the result is printed and written."""
    process = launch(recipe(seed=7), "--seed", "42")
    assert process.returncode == 0, process.stderr[-3000:]
    summary = check_run(tmp_path / "run", "vllm")
    assert summary["seconds"]["sync"] > 0
    for words in ("--- configuration", "trainable parameters:", "--- result", "step 0", "step 2"):
        assert words in process.stdout
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["sync/logp_gap_max"] for line in logs if "sync/logp_gap_max" in line) < 1e-3


@pytest.mark.slow
def test_without_vllm_transformers_generates_and_says_why(recipe, tmp_path):
    """An unusable vLLM (here one whose import fails) is named in a warning, and the run goes on."""
    broken = tmp_path / "site" / "vllm"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    process = launch(recipe(), PYTHONPATH=str(tmp_path / "site"))  # not forked: those have imported the real one
    assert process.returncode == 0, process.stderr[-3000:]
    assert "libcudart.so.13" in process.stderr and "transformers generates" in process.stderr
    check_run(tmp_path / "run", "transformers")


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_in_one_sentence(recipe, tmp_path):
    """On a real, small file system that fills up after the first step; what was written before stays readable."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=204M", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        file = recipe(output_dir=str(disk / "run"), benchmarks=[], benchmark_steps=None, max_steps=40, use_vllm=False)
        metrics = disk / "run" / "metrics.jsonl"
        process = Forked("-m", "fura_rl.train_grpo", "--config", file)
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.read_text().count("\n")):
            assert time.monotonic() < deadline and process.process.is_alive()
            time.sleep(0.05)
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(b"\0" * 4096)
        done = process.wait(300)
        assert done.returncode != 0
        assert "error: The disk is full" in done.stderr and "Traceback" not in done.stderr
        assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
