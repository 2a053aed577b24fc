"""`file_transfer`'s worker, but the memory of the second rank, or of the second data parallel engine, ends in the midst
of a merge, once a file says so."""

import os
from pathlib import Path

import torch
from file_transfer import Extension as FileExtension
from vllm.distributed import get_tensor_model_parallel_rank

from fura_rl.rollout import vllm_names

VARIABLE = "FURA_TEST_SHORT_OF_MEMORY"

store_weight = vllm_names.store_weight
calls = engine = 0


def store(module, parts):
    global calls
    file = Path(os.environ[VARIABLE])
    if max(engine, get_tensor_model_parallel_rank()) == 1 and file.exists():
        calls += 1
        if calls == 5:
            file.unlink()
            raise torch.OutOfMemoryError("CUDA out of memory.")
    store_weight(module, parts)


class Extension(FileExtension):
    """What `fura-rl serve` adds to a worker, from this module."""

    def fura_commit(self):
        global engine
        engine = self.vllm_config.parallel_config.data_parallel_index
        return super().fura_commit()


vllm_names.store_weight = store
