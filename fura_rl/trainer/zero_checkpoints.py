"""A DeepSpeed optimiser by parameter names, for checkpoints that another number of processes takes up.

DeepSpeed writes each rank's flat share of the optimiser and reads it back with as many ranks only. So every checkpoint
also gets `optimizer_by_name.safetensors`: of each trained parameter its float32 value and its moments, whole, written
by rank 0. With an adapter that is 12 bytes for each of 1 to 2% of the model's parameters. ZeRO-1, 2 and 3; torch's
AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fura_rl.errors import FuraError

FILE = "optimizer_by_name.safetensors"
ADAPTER = "adapter_model.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(engine: Any, folder: Path) -> None:
    """Write the file; every rank must call it, rank 0 writes. Nothing is written for other optimisers.

    Args:
        engine: The `DeepSpeedEngine` after at least one step.
        folder: The checkpoint's.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not _is_torch_adam(engine):
        return
    tensors = {}
    for name, parameter in _trained(engine):
        tensors[f"{name}.value"] = safe_get_full_fp32_param(parameter)
        for moment in MOMENTS:
            tensors[f"{name}.{moment}"] = safe_get_full_optimizer_state(parameter, moment)
    if engine.global_rank == 0:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        (step,) = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
        rates = [group["lr"] for group in engine.optimizer.optimizer.param_groups]
        save_file(whole, folder / FILE, metadata={"step": str(step), "rates": json.dumps(rates)})


def load(engine: Any, checkpoint: str, load_module_strict: bool = True) -> None:
    """Take up adapter and optimiser of a checkpoint, whatever the number of ranks that wrote it.

    Stands in for transformers' `deepspeed_load_checkpoint`, whose signature it has; every rank must call it.

    Raises:
        FuraError: The checkpoint holds no such file, or the optimiser is another one.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    file = Path(checkpoint) / FILE
    if not file.exists() or not _is_torch_adam(engine):
        raise FuraError(
            f"{checkpoint} cannot be taken up by another number of processes: that needs DeepSpeed (ZeRO-1, 2 or 3) "
            "with torch's AdamW before and after. Go on with as many processes as wrote it."
        )
    with safe_open(file, "pt") as opened:
        step, rates = float(opened.metadata()["step"]), json.loads(opened.metadata()["rates"])
    tensors = load_file(file)
    _create_state(engine, step)
    for group, rate in zip(engine.optimizer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # the schedule sets it after the next step only
    for name, parameter in _trained(engine):
        value = tensors[f"{name}.value"].to(engine.device)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value)
        for moment in MOMENTS:
            safe_set_full_optimizer_state(parameter, tensors[f"{name}.{moment}"].to(engine.device), moment)
    saved = load_file(Path(checkpoint) / ADAPTER) if (Path(checkpoint) / ADAPTER).exists() else {}
    for name, buffer in engine.module.named_buffers():  # bases; never partitioned
        if (tensor := saved.get(name.replace(".default.", "."))) is not None:
            buffer.copy_(tensor)


def _trained(engine: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _is_torch_adam(engine: Any) -> bool:
    return isinstance(getattr(engine.optimizer, "optimizer", None), torch.optim.Adam)  # of which AdamW is a kind


def _create_state(engine: Any, step: float) -> None:
    """The state that torch's AdamW would create in its first step, for each of this rank's flat shares."""
    zero = engine.optimizer
    stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
    shares = zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups
    on_device = any(group.get("fused") or group.get("capturable") for group in zero.optimizer.param_groups)
    for share in shares:
        zero.optimizer.state[share] = {
            "step": torch.tensor(step, dtype=torch.float32, device=share.device if on_device else "cpu"),
            **{moment: torch.zeros_like(share.data) for moment in MOMENTS},
        }
    if not stage3:
        zero._lazy_init_hp_params_optimizer_state()  # links parameters with their part of the state
