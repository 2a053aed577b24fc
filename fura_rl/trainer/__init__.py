"""GRPO with FuRA: the trainer and its configuration."""

from fura_rl.trainer.config import FuraGRPOConfig
from fura_rl.trainer.grpo import FuraGRPOTrainer

__all__ = ["FuraGRPOConfig", "FuraGRPOTrainer"]
