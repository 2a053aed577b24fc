"""The engine of a training job, one rank in each of the job's processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from swapping import max_gap
from tensor_parallel import CUDA, ENVIRONMENT, TOLERANCE, TWO_RANKS

pytestmark = TWO_RANKS


@pytest.mark.parametrize(
    "sleep_level",
    [0, 1, 2] if CUDA else [0],
)
def test_a_training_run_whose_engine_is_spread_over_its_ranks(tmp_path, tiny_model, tiny_problems, sleep_level):
    """Two steps at a high learning rate; `max_logp_gap` would stop the run on either rank."""
    recipe = tmp_path / "recipe.yaml"
    engine = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "disable_custom_all_reduce": True} if CUDA else {}
    options = dict(
        model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=32, learning_rate=1e-2, save_strategy="no", max_logp_gap=1e-3, dtype="float32",
        bf16=False, vllm_max_model_length=256, vllm_tensor_parallel_size=2, vllm_gpu_memory_utilization=0.2,
        vllm_engine_kwargs=engine, vllm_enable_sleep_mode=sleep_level > 0, vllm_sleep_level=sleep_level or 2,
        benchmarks=[str(tiny_problems / "test.jsonl")], benchmark_max_tokens=32,
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(options))
    job = [str(Path(__file__).parent / "tensor_parallel_job.py"), str(recipe), str(tmp_path)]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *job],
        capture_output=True, text=True, timeout=1500,
        env={**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"} | ({} if CUDA else {"ACCELERATE_USE_CPU": "true"}),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    ranks = [list(map(json.loads, (tmp_path / f"rank{i}.jsonl").read_text().splitlines())) for i in range(2)]
    for number, (first, second) in enumerate(zip(*ranks, strict=True), start=1):
        assert first["version"] == second["version"] == number
        assert (first["ranks"], first["rank"], second["ranks"], second["rank"]) == (2, 0, 2, 1)
        assert first["scores"] == second["scores"]
    scores = [line["scores"] for line in ranks[0]]
    assert len(scores) == 3 and max_gap([scores[0]], [scores[-1]]) > 1e-2  # before each step and at the end
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = {key: [row[key] for row in logged if key in row] for key in ("sync/probe_gap_max", "sync/logp_gap_max")}
    print(f"training, sleep level {sleep_level}: {gaps}")
    assert len(gaps["sync/logp_gap_max"]) == 2 and max(map(max, gaps.values())) < TOLERANCE
    assert [row["step"] for row in json.loads((tmp_path / "run" / "summary.json").read_text())["evaluations"]] == [0, 2]
