"""A policy spread over processes: the losses and the merged stream of one process."""

import json
import os
from pathlib import Path

import pytest
from forked import Forked

WORKER = Path(__file__).with_name("sharded_policy.py")


def ranks(rank: int, world: int) -> dict[str, str]:
    """What DeepSpeed reads from the environment."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def run(kind: str, world: int, architecture: str, side: str, folder: Path) -> list[dict]:
    """What each rank printed."""
    processes = [
        Forked(
            *(WORKER, kind, rank, world, folder / "store", architecture, side),
            environment={**os.environ, "DS_ACCELERATOR": "cpu", **ranks(rank, world)},
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        assert output.returncode == 0, output.stderr[-3000:]
    return [json.loads(output.stdout.strip().splitlines()[-1]) for output in outputs]


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
