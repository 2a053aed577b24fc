"""A worker whose memory ends where a file says: "checks" or "merge", once or, with a "!", each time."""

import os
from pathlib import Path

import torch

from fura_rl.rollout import vllm_names
from fura_rl.rollout.in_engine import InEngineAdapter
from fura_rl.rollout.worker import FuraWorker

VARIABLE = "FURA_TEST_SHORT_OF_MEMORY"
TEXT = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 2.56 MiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF."
)

check_fit, store_weight = InEngineAdapter._check_fit, vllm_names.store_weight
calls = {"checks": 0, "merge": 0}


def short_of_memory(where):
    """Whether it is the fifth layer, in the phase that the file names."""
    file = Path(os.environ[VARIABLE])
    if not file.exists() or file.read_text().removesuffix("!") != where:
        calls[where] = 0
        return False
    calls[where] += 1
    if calls[where] < 5:
        return False
    if not file.read_text().endswith("!"):
        file.unlink()
    return True


def checks(self, *args):
    if short_of_memory("checks"):
        raise torch.OutOfMemoryError(TEXT)
    check_fit(self, *args)


def merge(module, parts):
    if short_of_memory("merge"):
        raise torch.OutOfMemoryError(TEXT)
    store_weight(module, parts)


class Extension(FuraWorker):
    """The real worker, in vLLM's process."""


InEngineAdapter._check_fit, vllm_names.store_weight = checks, merge
