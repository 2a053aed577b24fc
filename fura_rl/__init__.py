"""fura-rl: FuRA (full-rank adaptation) for reinforcement learning on math with TRL and vLLM.

Importing this package registers `FuraConfig` with PEFT.
"""

import logging

# On some CPUs importing bitsandbytes (PEFT does) warns of a missing kernel for inference, in front of every command.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from .adapter import FuraConfig  # noqa: E402

__version__ = "0.1.0"

__all__ = ["FuraConfig", "__version__"]
