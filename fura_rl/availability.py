"""Whether vLLM can be used on this machine. Imports neither TRL nor, before it is asked, torch or vLLM."""

from __future__ import annotations

import functools
import importlib
import os

# What a CPU engine needs to run inside this process. The second, in GiB, keeps vLLM from reserving 90% of the machine.
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def set_engine_environment() -> None:
    """What an engine of this process reads from the environment when it starts. Values that the user has set win."""
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        for key, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(key, value)


@functools.cache
def vllm_problem() -> str | None:
    """Why vLLM cannot be used on this machine, in words, or None if it can be imported."""
    set_engine_environment()  # vLLM reads some of it when it is imported
    try:
        importlib.import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:  # a missing package, a missing .so, a platform mismatch
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def hide_broken_vllm() -> None:
    """Make TRL importable beside a vLLM that is installed but cannot be imported.

    TRL looks only for the package and imports it together with its GRPO trainer, even where no engine is asked for.
    To be called before that import. Whether vLLM can be imported is tried when TRL asks, not before.
    """
    from trl import import_utils

    installed = import_utils.is_vllm_available
    import_utils.is_vllm_available = lambda *args, **kwargs: vllm_problem() is None and installed(*args, **kwargs)
