"""A policy spread over processes: the losses and the merged stream of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_policy.py")


def ranks(rank: int, world: int) -> dict[str, str]:
    """What DeepSpeed reads from the environment."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def run(kind: str, world: int, architecture: str, side: str, folder: Path) -> list[dict]:
    """What each rank printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, str(rank), str(world), folder / "store", architecture, side],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **ranks(rank, world)},
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world", "architecture", "side"),
    [
        ("ddp", 2, "llama", "input"),
        ("zero2", 2, "qwen2", "input"),
        ("zero3", 2, "qwen2", "input"),
        ("fsdp2", 4, "qwen2", "input"),
        ("fsdp2", 2, "qwen2", "output"),
    ],
)
def test_losses_and_merged_stream_are_those_of_one_process(kind, world, architecture, side, tmp_path):
    if "zero" in kind:
        pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    for rank in run(kind, world, architecture, side, tmp_path):
        assert rank["losses"] == pytest.approx(rank["reference"], rel=1e-5)
        assert rank["difference"] < 1e-5 < 1e-3 < rank["moved"]
        share = world if kind in ("fsdp2", "zero3") else 1
        assert rank["held"] < 1.3 * rank["parameters"] / share
