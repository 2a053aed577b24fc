"""Layers that read the same tensor share one pass over it: `q`, `k` and `v` of an attention, `gate` and `up` of an MLP.

The first layer of a group that is called multiplies its input for all of them; the others take their part, if they are
called with that very tensor and nothing has changed in between. Whether they are is seen at each call, not assumed from
the model's architecture: a group whose layers turn out to read different tensors (cross attention) is given up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from . import transform

if TYPE_CHECKING:
    from .blocks import FuraBlocks
    from .layer import FuraLayer

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("q", "k", "v"))

MISSES = 3  # passes in a row whose other outputs nobody fetched, after which a group is given up


class SharedInput:
    """Two or three layers that probably read the same input."""

    def __init__(self, layers: list[FuraLayer]) -> None:
        self.layers = layers
        self._misses = 0  # in a row
        self._clear()

    def _clear(self) -> None:
        self._source: torch.Tensor | None = None
        self._state: tuple = ()
        self._outputs: dict[FuraLayer, torch.Tensor] = {}

    def multiply(self, layer: FuraLayer, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
        """`M x` of the layer's one active adapter; None if this call is not one to be shared.

        Args:
            layer: one of the group's.
            x: (*, in) in the dtype that the base layer computes in.
            source: what the layer was called with: `x`, or a tensor of another dtype of which `x` is a copy.
        """
        if torch.compiler.is_compiling() or x.is_inference() or not transform.have_kernels(x):
            return None
        all_blocks = [blocks for one in self.layers if (blocks := _only_blocks(one)) is not None]
        if not self.layers or len(all_blocks) < len(self.layers) or not _can_share(all_blocks, x):
            self._clear()
            return None
        # what the outputs depend on, besides the values of x
        state = (
            source._version,
            x.dtype,
            torch.is_grad_enabled(),
            *((blocks, blocks.core._version) for blocks in all_blocks),
        )
        if layer in self._outputs:
            if source is not self._source:  # computed for nothing: do these layers read different tensors?
                self._misses += 1
            elif state == self._state:
                y = self._outputs.pop(layer)
                self._misses = 0
                if not self._outputs:
                    self._clear()
                return y
            self._clear()
            if self._misses == MISSES:
                self.layers = []
                return None
        outputs = transform.shared_multiply(x, all_blocks)
        self._source, self._state = source, state
        self._outputs = dict(zip(self.layers, outputs, strict=True))
        return self._outputs.pop(layer)

    def __getstate__(self) -> dict:
        return {"layers": self.layers}  # copies and pickles of a model start without a half-used pass

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["layers"])  # type: ignore[misc]


def _only_blocks(layer: FuraLayer) -> FuraBlocks | None:
    """The blocks of the layer's active adapter if one and only one acts on it, on the input side."""
    if layer.disable_adapters or layer.merged:
        return None
    found = layer.named_blocks(None)
    return found[0] if len(found) == 1 and found[0].side == "input" else None


def _can_share(all_blocks: list[FuraBlocks], x: torch.Tensor) -> bool:
    first = all_blocks[0]
    return transform.can_share(x, first.block_size) and all(
        blocks.core.shape == first.core.shape
        and blocks.singular_values == first.singular_values
        and (blocks.sigma is None) == (first.sigma is None)
        and blocks.basis is not None
        and blocks.fold is None
        and blocks.core.requires_grad
        # sharded (FSDP) or fetched by hooks of its own module (ZeRO-3, offloading): only its forward may read it
        and type(blocks.core) is nn.Parameter
        and not hasattr(blocks.core, "ds_id")
        and not hasattr(blocks, "_hf_hook")
        for blocks in all_blocks
    )


def link_shared_inputs(model: nn.Module, layer_class: type[FuraLayer]) -> None:
    """Groups the adapted layers of each module of `model` that by their names read the same input."""
    for parent in model.modules():
        for names in SIBLINGS:
            children = [parent._modules.get(name) for name in names]
            layers = [child for child in children if isinstance(child, layer_class)]
            if len(layers) >= 2 and len({layer.in_features for layer in layers}) == 1:
                shared = SharedInput(layers)
                for layer in layers:
                    layer.shared_input = shared
