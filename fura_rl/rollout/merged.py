"""The policy as a stream of dense weights: `W M` for adapted layers, every other parameter as it is.

What the engine loads is computed one tensor at a time from the untouched base weight. Nothing in the trainer changes:
there is no merge in place to undo, so nothing can drift (design, section 1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from fura_rl.adapter import FuraLayer
from fura_rl.adapter.base_weight import is_transposed, reading_weight, whole
from fura_rl.errors import FuraError

Gather = AbstractContextManager  # of a ZeRO-3 partitioned parameter


class GatherFunction(Protocol):
    """Makes partitioned parameters whole for the length of a `with` block (a no-op without ZeRO-3)."""

    def __call__(self, parameters: list[nn.Parameter]) -> Gather: ...


def _no_gather(parameters: list[nn.Parameter]) -> Gather:
    return nullcontext()


def checkpoint_name(name: str) -> str:
    """The name that a parameter of the PEFT-wrapped model has in the base model's checkpoint."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace("_checkpoint_wrapped_module.", "").replace("modules_to_save.default.", "")


def cast(weight: torch.Tensor, dtype: torch.dtype, rounding: torch.Generator | None) -> torch.Tensor:
    """A float32 tensor (or DTensor) in another dtype: to the nearest, or stochastically for bfloat16.

    Stochastic rounding picks one of the two neighbours with a probability that makes the result right on average, so
    that an update smaller than half a spacing still reaches a share of the entries.
    """
    if rounding is None or dtype != torch.bfloat16:
        return weight.to(dtype)
    if isinstance(weight, DTensor):
        local = cast(weight.to_local(), dtype, rounding)
        return DTensor.from_local(
            local, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        )
    bits = weight.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=rounding, device=bits.device, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(dtype)  # bfloat16 is the upper half of float32


def merged_weights(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    only_adapted: bool = False,
    gather: GatherFunction = _no_gather,
    rounding: torch.Generator | None = None,
    skip: Collection[str] = (),
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(checkpoint name, tensor)` of the merged policy, one tensor at a time, in a constant order.

    Args:
        model: A PEFT-wrapped model, with FuRA or another adapter that can be merged, or a plain model.
        dtype: dtype of the yielded tensors; the parameter's own if None. Merged weights are computed in float32 and
            cast once.
        only_adapted: Leave out what training cannot have changed since the last full stream: parameters that no
            active adapter touches and that are frozen.
        gather: Makes ZeRO-3 partitioned parameters whole, one module at a time; every rank must iterate. Parameters
            that FSDP2 has sharded are gathered without it, adapted ones after each rank has merged its rows.
        rounding: Round merged weights to bfloat16 stochastically, with random bits from here (on the weights' device),
            instead of to the nearest; it does nothing for other dtypes.
        skip: Checkpoint names of adapted layers to leave out, weight and bias.

    Yields:
        The name as in the base checkpoint, and a detached tensor of the checkpoint's shape. Tied weights come once.
        Tensors of untouched parameters share the trainer's storage: copy before writing.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, FuraLayer) and checkpoint_name(module_name) in skip:
            seen.update(id(parameter) for parameter in module.parameters())
        elif isinstance(module, FuraLayer):
            yield from _merged_layer(f"{module_name}.", module, dtype, gather, rounding, seen)
        elif isinstance(module, BaseTunerLayer):
            yield from merged_by_peft(f"{module_name}.", module, dtype, gather, seen)
        elif id(getattr(module, "weight", None)) not in seen and (backend := resolve_quantization_backend(module)):
            seen.add(id(module.weight))
            if not only_adapted:
                with reading_weight(module, None, backend, module_name) as weight:
                    yield checkpoint_name(f"{module_name}.weight"), weight.to(dtype or weight.dtype)
    adapter = f".{getattr(getattr(model, 'base_model', None), 'prefix', 'fura_')}"
    for name, parameter in model.named_parameters():
        if id(parameter) in seen or "original_module" in name or adapter in name:
            continue
        if only_adapted and not parameter.requires_grad:
            continue
        with gather([parameter]):
            yield checkpoint_name(name), whole(parameter.detach()).to(dtype or parameter.dtype)


def _merged_layer(
    prefix: str,
    layer: FuraLayer,
    dtype: torch.dtype | None,
    gather: GatherFunction,
    rounding: torch.Generator | None,
    seen: set[int],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight (and bias) of one adapted layer; marks its base parameters as seen."""
    base: Any = layer.get_base_layer()
    parameters = list(layer.parameters())
    seen.update(id(parameter) for parameter in base.parameters())
    with gather(parameters), torch.no_grad():
        # Before the weight: calling the blocks for their D makes ZeRO-3 partition them again.
        merged_bias = layer.merged_bias()
        # A quantised weight has an integer dtype: the layer computes in, and the engine gets, the float one.
        own = base.weight.dtype if base.weight.dtype.is_floating_point else torch.get_default_dtype()
        shard = merged_shard(layer)  # cast before it is gathered: half the bytes in bf16
        weight = whole(cast(layer.merged_weight() if shard is None else shard, dtype or own, rounding))
        del shard
        yield checkpoint_name(f"{prefix}base_layer.weight"), weight
        del weight
        if merged_bias is not None:
            yield checkpoint_name(f"{prefix}base_layer.bias"), merged_bias.to(dtype or base.bias.dtype)


def merged_shard(layer: FuraLayer) -> DTensor | None:
    """The merged weight in float32, sharded as FSDP2 has sharded the base weight; None if it cannot be made so.

    `W M` acts row by row, so each rank merges the rows that it holds and only the small multiplier is gathered. Every
    rank must call it.
    """
    base: Any = layer.get_base_layer()
    blocks = layer.named_blocks(None)
    by_rows = isinstance(base.weight, DTensor) and base.weight.placements == (Shard(0),)
    if not by_rows or layer.merged or is_transposed(base) or any(block.side == "output" for block in blocks):
        return None
    rows = base.weight.to_local()
    merged = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for block in blocks:
        delta = block()
        merged = block.multiply(merged, delta) if len(merged) else merged
    return DTensor.from_local(
        merged, base.weight.device_mesh, base.weight.placements, shape=base.weight.shape, stride=base.weight.stride()
    )


def merged_by_peft(
    prefix: str, layer: Any, dtype: torch.dtype | None, gather: GatherFunction, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a layer with another adapter of PEFT's, which merges them in their own dtype.

    The merge runs on copies, which are dropped: PEFT's unmerge alone would leave a rounded base weight behind.

    Raises:
        FuraError: The base is quantised, so that merging would quantise the merged weight again.
    """
    base = layer.get_base_layer()
    seen.update(id(parameter) for parameter in layer.parameters())
    if any(not parameter.dtype.is_floating_point for parameter in base.parameters()):
        raise FuraError(f"{type(layer).__name__} cannot be merged on a quantised base for the engine; FuRA can.")
    with gather(list(layer.parameters())), torch.no_grad():
        untouched = {name: parameter.data for name, parameter in base.named_parameters()}
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()
        layer.merge()
        merged = {name: parameter.data.clone() for name, parameter in base.named_parameters()}
        layer.unmerge()
        for name, parameter in base.named_parameters():
            parameter.data = untouched[name]
        for name, tensor in merged.items():
            yield checkpoint_name(f"{prefix}base_layer.{name}"), tensor.to(dtype or tensor.dtype)
