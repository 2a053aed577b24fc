"""A checkpoint that FSDP2 wrote, taken up by a run without FSDP.

FSDP2 writes the optimiser whole and by parameter names (FULL_STATE_DICT, as in the shipped configuration), so any
number of ranks can read it, with FSDP2 or without. transformers refuses the latter, and asks for another file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from fura_rl.errors import FuraError

MODEL, OPTIMIZER = f"{FSDP_MODEL_NAME}.bin", "optimizer.bin"


def is_whole(checkpoint: Path) -> bool:
    """Whether FSDP2 wrote it, in one piece."""
    return (checkpoint / MODEL).exists() and (checkpoint / OPTIMIZER).exists()


def check(trainer: Any, checkpoint: Path) -> None:
    """Refuse what transformers would begin and not end.

    Raises:
        FuraError: The run is spread by FSDP, and the checkpoint was not written so; or FSDP wrote it, and the run is
            spread by DeepSpeed, or by nothing and the checkpoint is in pieces.
    """
    written = (checkpoint / MODEL).exists() or any(checkpoint.glob(f"{FSDP_MODEL_NAME}_*"))
    if trainer.is_fsdp_enabled and not written:
        raise FuraError(f"{checkpoint} was not written under FSDP: go on with the configuration that wrote it.")
    if written and trainer.is_deepspeed_enabled:
        raise FuraError(f"{checkpoint} was written under FSDP: go on with FSDP, or with DDP, not with DeepSpeed.")
    if written and not trainer.is_fsdp_enabled and not is_whole(checkpoint):
        raise FuraError(
            f"{checkpoint} was written in pieces (fsdp_state_dict_type: SHARDED_STATE_DICT): go on with FSDP."
        )


def load_model(model: Any, checkpoint: Path) -> None:
    """Adapter, or all weights of a model without one, into a model that nothing spreads."""
    if hasattr(model, "load_adapter") and hasattr(model, "peft_config"):
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
    else:
        model.load_state_dict(torch.load(checkpoint / MODEL, map_location="cpu", weights_only=True))


def load_optimizer(model: torch.nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Moments, steps and learning rates, by parameter names, into an optimiser or accelerate's wrapper of one."""
    state = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # the wrapper may skip the step that makes its state
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
