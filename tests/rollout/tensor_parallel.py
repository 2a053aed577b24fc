"""Engines of two ranks, real ones, and how far they may be from the merged transformers model.

On a machine with two GPUs the tests run there, in float32 too; else on two cores, with vLLM's CPU build. Each file has
one engine, so files may run beside each other.
"""

import os
from pathlib import Path

import pytest
import torch
from servers import ForkedServer
from swapping import max_gap

CUDA = torch.cuda.is_available()
CORES = sorted(os.sched_getaffinity(0))
DEVICES = torch.cuda.device_count() if CUDA else len(CORES)
# On a GPU vLLM's attention kernel multiplies float32 as TF32, unless Triton is told otherwise as below.
TOLERANCE = 1e-3 if CUDA else 1e-4

TWO_RANKS = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICES < 2, reason=f"two ranks need two {'GPUs' if CUDA else 'cores'}: there is one"),
]

if CUDA:
    OPTIONS = ["--enforce-eager", "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30)]
    OPTIONS += ["--disable-custom-all-reduce"]
    ENVIRONMENT = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "TRITON_F32_DEFAULT": "ieee",
    }
else:
    OPTIONS, ENVIRONMENT = [], {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES[:2]))}


def start(model, log, *options, spread="--tensor-parallel-size", **environment) -> ForkedServer:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**ENVIRONMENT, "PYTHONPATH": path, **environment}
    return ForkedServer(model, log, spread, "2", *OPTIONS, *options, **environment)


def check(what, found, expected) -> None:
    worst = max_gap(found, expected)
    print(f"{what}: {worst:.1e}")
    assert worst < TOLERANCE, what
