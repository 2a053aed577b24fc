"""Kernels are compiled for GPUs with little shared memory, which are not here to run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "shared_memory.py"
CONSUMER = (
    101_376  # bytes that a program may have on an RTX 3090, 4090 or L4 (CUDA's guide, compute capability 8.6, 8.9)
)


@pytest.mark.slow
def test_programs_fit_into_the_shared_memory_of_consumer_gpus():
    environment = dict(os.environ, FURA_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, SCRIPT, str(CONSUMER)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    programs = json.loads(run.stdout.splitlines()[-1])
    assert len(programs) == 38
    assert not [program for program in programs if program[1] > CONSUMER]
