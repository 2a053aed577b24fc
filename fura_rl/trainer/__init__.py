"""GRPO with FuRA: the trainer and its configuration, which are loaded when asked for: reading a run needs neither."""

from typing import TYPE_CHECKING, Any

from fura_rl.availability import hide_broken_vllm

if TYPE_CHECKING:
    from fura_rl.trainer.config import FuraGRPOConfig
    from fura_rl.trainer.grpo import FuraGRPOTrainer

__all__ = ["FuraGRPOConfig", "FuraGRPOTrainer"]

hide_broken_vllm()  # before anything imports TRL's trainer


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fura_rl.trainer import config, grpo

    return getattr(config if name == "FuraGRPOConfig" else grpo, name)
