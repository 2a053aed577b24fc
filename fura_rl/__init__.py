"""fura-rl: FuRA (full-rank adaptation) for reinforcement learning on math with TRL and vLLM.

Importing this package registers `FuraConfig` with PEFT.
"""

from .adapter import FuraConfig

__version__ = "0.1.0"

__all__ = ["FuraConfig", "__version__"]
