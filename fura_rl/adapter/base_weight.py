"""Reading a base layer's weight, wherever and however it is stored, and putting it back after a merge."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.utils.integrations import gather_params_ctx
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .errors import AdapterError


class BaseSnapshot:
    """What a base layer was before a merge, so that unmerging is exact.

    Nothing is copied: a merge puts new parameters into the layer and leaves the old ones alone. What PEFT's
    quantisation backends do change in place (bitsandbytes' `state` and the attributes of its parameters) is kept
    beside; HQQ exchanges the whole layer.
    """

    def __init__(self, layer: Any) -> None:
        self.base_layer = layer.base_layer
        base = layer.get_base_layer()
        self.parameters = dict(base._parameters)
        self.attributes = {name: dict(p.__dict__) for name, p in self.parameters.items() if p is not None}
        self.state = copy.copy(getattr(base, "state", None))

    @property
    def view(self) -> SimpleNamespace:
        """The unmerged layer as PEFT's quantisation backends read it: `.weight`, `.bias`, `.state`, `.dequantize`."""
        dequantize = getattr(self.base_layer, "dequantize", None)
        return SimpleNamespace(**self.parameters, state=self.state, dequantize=dequantize)

    def restore(self, layer: Any) -> None:
        """Puts the unmerged parameters back into `layer`'s base layer."""
        layer.base_layer = self.base_layer
        base = layer.get_base_layer()
        for name, parameter in self.parameters.items():
            base.__dict__.pop(name, None)  # torchao's backend leaves a plain attribute
            base._parameters[name] = parameter
            if parameter is not None:
                parameter.__dict__.clear()
                parameter.__dict__.update(self.attributes[name])
        if self.state is not None:
            base.state = self.state


def offload_hook(base_layer: nn.Module) -> Any:
    """The hook of accelerate that brings an offloaded layer's weights for its forward, or None."""
    hook = getattr(base_layer, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None


def adapter_device(base_layer: nn.Module) -> torch.device | None:
    """Where an adapter of this layer belongs: on the device that the layer computes on."""
    hook = offload_hook(base_layer)
    if hook is not None:
        return torch.device(hook.execution_device)
    for name in ("weight", "qweight", "W_q"):
        tensor = getattr(base_layer, name, None)
        if tensor is not None:
            return tensor.device
    return next((tensor.device for tensor in base_layer.parameters()), None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 has sharded, gathered (every rank must call it); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_transposed(base_layer: nn.Module) -> bool:
    """Whether the layer stores its weight as (in, out), as GPT-2's `Conv1D` does."""
    return isinstance(base_layer, Conv1D)


@contextmanager
def reading_weight(
    base_layer: Any, snapshot: BaseSnapshot | None, backend: QuantizationBackend | None, name: str
) -> Iterator[torch.Tensor]:
    """Yields the unmerged weight of `base_layer` as (out, in): dequantised, gathered under ZeRO-3 and FSDP2, loaded if
    offloaded.

    The yielded tensor may be the weight itself: it must not be written to.

    Raises:
        AdapterError: if the weight is quantised in a format that cannot be dequantised.
    """
    hook = offload_hook(base_layer)
    fetch = hook is not None and any(p.is_meta for p in base_layer.parameters())  # else something else fetched it
    if fetch:
        hook.pre_forward(base_layer)
    source = base_layer if snapshot is None else snapshot.view
    try:
        if backend is not None:
            yield _dequantise(source, backend, name)
        else:
            # DeepSpeed refuses to gather what a caller has gathered already
            partitioned = hasattr(source.weight, "ds_id") and source.weight.numel() == 0
            with gather_params_ctx(source.weight, modifier_rank=None) if partitioned else nullcontext():
                weight = whole(source.weight.data)
                yield weight.T if is_transposed(base_layer) else weight
    finally:
        if fetch:
            hook.post_forward(base_layer, torch.tensor([]))


def _dequantise(source: Any, backend: QuantizationBackend, name: str) -> torch.Tensor:
    if getattr(getattr(source.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise AdapterError(
            f"{name}: bitsandbytes has repacked this 4-bit weight for inference on a CPU, and cannot dequantise it any "
            "more; add or merge adapters before the model's first forward pass in eval mode."
        )
    try:
        return backend.get_base_weight(source)
    except (TypeError, NotImplementedError) as error:
        raise AdapterError(
            f"{name}: a {backend.backend_name} layer cannot be dequantised, so it has no singular vectors and cannot "
            'be merged; use basis="identity" or "random", or an unquantised base.'
        ) from error
