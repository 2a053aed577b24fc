"""GRPO with FuRA: the trainer and its configuration."""

from fura_rl.rollout.availability import hide_broken_vllm

hide_broken_vllm()  # before anything imports TRL's trainer

from fura_rl.trainer.config import FuraGRPOConfig  # noqa: E402
from fura_rl.trainer.grpo import FuraGRPOTrainer  # noqa: E402

__all__ = ["FuraGRPOConfig", "FuraGRPOTrainer"]
