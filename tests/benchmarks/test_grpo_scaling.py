"""The benchmark of a step on several processes, on the tiny model: a launch that fails leaves the others their rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "grpo_scaling.py"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="merged weights travel over NCCL there")
def test_two_processes_beside_a_launch_that_fails():
    process = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--steps", "4", "--launches", "server_merged", "ddp", "--single", "2.0",
         "--limit", "600"],
        capture_output=True, text=True, timeout=1500, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    failed, ddp = json.loads(process.stdout.strip().splitlines()[-1])["rows"]
    shown = [json.loads(line) for line in process.stderr.splitlines() if line.startswith('{"launch"')]
    assert shown == [failed, ddp]
    assert failed["launch"] == "server_merged" and "NotImplementedError" in failed["failed"]
    assert "failed" not in ddp and len(ddp["steps"]) == 2
    assert ddp["efficiency"] == pytest.approx(2.0 / (2 * ddp["total"]))
    for step in ddp["steps"]:
        phases = sum(step[name] for name in ("generate", "train", "logprobs", "reward", "sync", "probe", "other"))
        assert phases == pytest.approx(step["total"])
        assert step["sync"] > 0
    # 32 rollouts, four micro-batches of 8 on two processes; what a plan says of one of them
    assert ddp["gib"]["batch"] == 8 and ddp["gib"]["completion"] <= 16
    assert ddp["plan"]["base weights"] > 0 and 0 < ddp["plan_gib"] < 1
