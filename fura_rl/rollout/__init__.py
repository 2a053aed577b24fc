"""What the engine sees: the merged policy as a stream, the vLLM engine that loads it, adapters in a running vLLM."""

from fura_rl.rollout.attach import WORKER_EXTENSION, attach
from fura_rl.rollout.client import FuraClient
from fura_rl.rollout.merged import checkpoint_name, merged_weights

__all__ = ["WORKER_EXTENSION", "FuraClient", "attach", "checkpoint_name", "merged_weights"]
