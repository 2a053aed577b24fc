"""A policy spread over processes: the losses and the merged stream of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("sharded_policy.py")


def run(kind: str, world: int, architecture: str, side: str, folder: Path) -> list[dict]:
    """What each rank printed."""
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, kind, str(rank), str(world), folder / "store", architecture, side],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
        ("fsdp2", 2, "llama", "input"),
        ("fsdp2", 4, "qwen2", "input"),
        ("fsdp2", 2, "qwen2", "output"),
    ],
)
def test_losses_and_merged_stream_are_those_of_one_process(kind, world, architecture, side, tmp_path):
    for rank in run(kind, world, architecture, side, tmp_path):
        assert rank["losses"] == pytest.approx(rank["reference"], rel=1e-5)
        assert rank["difference"] < 1e-5 < 1e-3 < rank["moved"]
        share = world if kind == "fsdp2" else 1
        assert rank["held"] < 1.3 * rank["parameters"] / share
