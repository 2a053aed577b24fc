"""What the engine sees: the merged policy as a stream, and the vLLM engine that loads it."""

from fura_rl.rollout.merged import checkpoint_name, merged_weights

__all__ = ["checkpoint_name", "merged_weights"]
