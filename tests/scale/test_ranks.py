"""The main job on two ranks of one machine, each with its own engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launch(tmp_path, tiny_model, tiny_problems):
    """Starts the main job of one step on two ranks; returns the finished process and the run's directory."""

    def start(reward: str, environment=None, **changes):
        recipe = tmp_path / "recipe.yaml"
        options = dict(
            model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
            output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=16, num_generations=8,
            max_completion_length=32, learning_rate=1e-3, rewards=[reward], save_strategy="no", max_logp_gap=1e-3,
            vllm_max_model_length=256, benchmarks=[str(tiny_problems / "test.jsonl")], benchmark_max_tokens=32,
        )  # fmt: skip
        recipe.write_text(yaml.safe_dump({**options, **changes}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        process = subprocess.run(
            [*command, str(ROOT / "fura_rl" / "train_grpo.py"), "--config", str(recipe)],
            capture_output=True, text=True, timeout=500,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", **(environment or {})},
        )  # fmt: skip
        return process, tmp_path / "run"

    return start


@pytest.mark.slow
@pytest.mark.vllm
def test_two_ranks_train_one_policy_and_share_the_evaluation(launch):
    process, run = launch("accuracy")
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("--- result") == 1
    summary = json.loads((run / "summary.json").read_text())
    assert [e["step"] for e in summary["evaluations"]] == [0, 1]
    assert all(e["scores"]["test"]["problems"] == 16 for e in summary["evaluations"])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "reward" in line] == [1]


@pytest.mark.slow
def test_an_error_on_one_rank_ends_both(launch, tmp_path):
    """A hung rank would end this test by its time limit."""
    (tmp_path / "broken.py").write_text(
        "import os\n\ndef reward(completions, **columns):\n"
        "    if os.environ['RANK'] == '1':\n        raise RuntimeError('no reward on this rank')\n"
        "    return [0.0] * len(completions)\n"
    )
    process, _ = launch("broken:reward", {"PYTHONPATH": str(tmp_path)}, use_vllm=False, benchmarks=[])
    assert process.returncode != 0
    assert "no reward on this rank" in process.stderr
