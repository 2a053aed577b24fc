"""The policy as a stream of dense weights: `W M` for adapted layers, every other parameter as it is.

What the engine loads is computed one tensor at a time from the untouched base weight. Nothing in the trainer changes:
there is no merge in place to undo, so nothing can drift (design, section 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from fura_rl.adapter import FuraLayer

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


def merged_weights(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    only_adapted: bool = False,
    gather: GatherFunction = _no_gather,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield `(checkpoint name, tensor)` of the merged policy, one tensor at a time, in a constant order.

    Args:
        model: A PEFT-wrapped model with FuRA layers, or a plain model.
        dtype: dtype of the yielded tensors; the parameter's own if None. Merged weights are computed in float32 and
            cast once.
        only_adapted: Leave out what training cannot have changed since the last full stream: parameters that no
            active adapter touches and that are frozen.
        gather: Makes ZeRO-3 partitioned parameters whole, one module at a time; every rank must iterate.

    Yields:
        The name as in the base checkpoint, and a detached tensor of the checkpoint's shape. Tied weights come once.
        Tensors of untouched parameters share the trainer's storage: copy before writing.
    """
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, FuraLayer):
            yield from _merged_layer(f"{module_name}.", module, dtype, gather, seen)
    for name, parameter in model.named_parameters():
        if id(parameter) in seen or "original_module" in name or ".fura_" in name:
            continue
        if only_adapted and not parameter.requires_grad:
            continue
        with gather([parameter]):
            yield checkpoint_name(name), parameter.detach().to(dtype or parameter.dtype)


def _merged_layer(
    prefix: str, layer: FuraLayer, dtype: torch.dtype | None, gather: GatherFunction, seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight (and bias) of one adapted layer; marks its base parameters as seen."""
    base: Any = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    parameters = list(layer.parameters())
    seen.update(id(parameter) for parameter in base.parameters())
    with gather(parameters), torch.no_grad():
        weight = layer.merged_weight()
        # A quantised weight has an integer dtype: the layer computes in, and the engine gets, the float one.
        own = base.weight.dtype if base.weight.dtype.is_floating_point else torch.get_default_dtype()
        yield checkpoint_name(f"{prefix}base_layer.weight"), weight.to(dtype or own)
        del weight
        if bias is not None:
            merged_bias = layer.merged_bias()
            assert merged_bias is not None
            yield checkpoint_name(f"{prefix}base_layer.bias"), merged_bias.to(dtype or bias.dtype)
