"""The main job on two ranks of one machine, each with its own engine."""

import json
import os

import pytest
import yaml
from forked import Forked, free_port


@pytest.mark.slow
@pytest.mark.vllm
def test_two_ranks_train_one_policy_and_share_the_evaluation(tmp_path, tiny_model, tiny_problems):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    options = dict(
        model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
        output_dir=str(run), max_steps=1, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=32, learning_rate=1e-3, rewards=["accuracy"], save_strategy="no", max_logp_gap=1e-3,
        vllm_max_model_length=256, benchmarks=[str(tiny_problems / "test.jsonl")], benchmark_max_tokens=32,
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(options))
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    ranks = [
        Forked(
            *("-m", "fura_rl.train_grpo", "--config", recipe),
            environment={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        first, second = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert first.returncode == 0, first.stderr[-3000:]
    assert second.returncode == 0, second.stderr[-3000:]
    assert [done.stdout.count("--- result") for done in (first, second)] == [1, 0]
    summary = json.loads((run / "summary.json").read_text())
    assert [e["step"] for e in summary["evaluations"]] == [0, 1]
    assert all(e["scores"]["test"]["problems"] == 16 for e in summary["evaluations"])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "reward" in line] == [1]
