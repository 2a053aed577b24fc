"""Whether vLLM can be used on this machine. Imports neither TRL nor, before it is asked, vLLM."""

from __future__ import annotations

import functools
import importlib
import os

import torch

# What a CPU engine needs to run inside the trainer's process. Values that the user has set win.
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


@functools.cache
def vllm_problem() -> str | None:
    """Why vLLM cannot be used on this machine, in words, or None if it can be imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not torch.cuda.is_available():
        for key, value in CPU_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    try:
        importlib.import_module("vllm")
    except (ImportError, OSError, RuntimeError) as error:  # a missing package, a missing .so, a platform mismatch
        return f"{type(error).__name__}: {error}"
    return None


def hide_broken_vllm() -> None:
    """Make TRL importable beside a vLLM that is installed but cannot be imported.

    TRL looks only for the package and imports it together with its GRPO trainer, even where no engine is asked for.
    To be called before that import. Whether vLLM can be imported is tried when TRL asks, not before.
    """
    from trl import import_utils

    installed = import_utils.is_vllm_available
    import_utils.is_vllm_available = lambda *args, **kwargs: vllm_problem() is None and installed(*args, **kwargs)
