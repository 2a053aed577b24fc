"""Layers that read the same tensor share one pass over it: `q`, `k` and `v` of an attention, `gate` and `up` of an MLP.

The first layer of a group that is called multiplies its input for all of them; the others take their part, if they are
called with that very tensor and nothing has changed in between. Whether they are is seen at each call, not assumed from
the model's architecture: a group whose layers turn out to read different tensors (cross attention) is given up.

In a graph that `torch.compile` traces, versions of tensors cannot be seen, and what is left on a module outlives the
call. There the parent of the layers hands its input on as an alias made for this one call, and the first layer leaves
on the alias what it computed for the others. The graph has one operator for the group.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import transform
from .multiplied_weight import Multiplied, is_bare, multiplies_weights, multiply_weights

if TYPE_CHECKING:
    from .blocks import FuraBlocks
    from .layer import FuraLayer

GATED = ("gate_proj", "up_proj")  # what `down_proj` reads is made of their outputs
SIBLINGS = (("q_proj", "k_proj", "v_proj"), GATED, ("query", "key", "value"), ("q", "k", "v"))

MISSES = 3  # passes in a row of whose outputs some were never fetched, after which a group is given up


class _Stash(NamedTuple):
    """What one pass computed and nobody has fetched yet."""

    source: torch.Tensor
    state: tuple
    outputs: dict[int, tuple[Multiplied, tuple]]  # by the layer's id, with what else each depends on


class SharedInput:
    """Two or three layers that probably read the same input."""

    def __init__(self, layers: list[FuraLayer]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]  # a cycle would keep a deleted model in memory
        self._misses = 0  # in a row
        self._stash: _Stash | None = None  # one object: threads that run one model exchange it as a whole

    @property
    def layers(self) -> list[FuraLayer]:
        """Those that still exist; none once the group is given up."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def multiply(self, layer: FuraLayer, x: torch.Tensor, source: torch.Tensor) -> Multiplied | None:
        """`M x` of the layer's one active adapter, or what the layer returns for it; None if this call is not one to
        be shared.

        Args:
            layer: one of the group's.
            x: (*, in) in the dtype that the base layer computes in.
            source: what the layer was called with: `x`, or a tensor of another dtype of which `x` is a copy.
        """
        if torch.compiler.is_compiling():
            traced = getattr(source, TRACED, None)
            y = None if traced is None else traced.multiply(layer, x, source)
            return None if y is None else Multiplied(y)
        if not transform.have_kernels(x):
            return None
        if torch.is_inference_mode_enabled() or source.is_inference():  # no version to see changes by
            return None
        # Activation checkpointing repeats the calls inside each of its regions, where they must save as many tensors
        # again: what one region computed is not handed to another, and no group is given up between the two.
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        # what all outputs depend on, besides the values of x
        state = source._version, source.requires_grad, x.dtype, torch.is_grad_enabled(), hooks, _stream(x)
        stash, self._stash = self._stash, None
        same_source = stash is not None and stash.source is source
        if stash is not None and same_source and stash.state == state and id(layer) in stash.outputs:
            multiplied, sources = stash.outputs.pop(id(layer))
            blocks = only_blocks(layer)
            current = blocks is not None and sources == _sources(layer, blocks, multiplied)
            if current and not getattr(multiplied.tensor.grad_fn, "spent", False):
                if stash.outputs:
                    self._stash = stash
                else:
                    self._misses = 0
                return multiplied
        layers = self.layers
        if layer not in layers:  # given up, or a replica of `DataParallel`, whose siblings are replicas too
            return None
        all_blocks = [blocks for one in layers if (blocks := only_blocks(one)) is not None]
        if len(all_blocks) < len(self._layers) or not _can_share(all_blocks, x):
            return None
        if stash is not None and not same_source and hooks is None:
            self._misses += 1  # computed for nothing: do these layers read different tensors?
            if self._misses >= MISSES:
                self._layers = []
                return None
        bases = [one.base_layer for one in layers]
        if multiplies_weights(bases, x, all_blocks):
            results = multiply_weights(bases, x, all_blocks)
        else:
            results = [Multiplied(y) for y in transform.shared_multiply(x, all_blocks)]
        outputs = {
            id(one): (result, _sources(one, blocks, result))
            for one, blocks, result in zip(layers, all_blocks, results, strict=True)
        }
        multiplied, _ = outputs.pop(id(layer))
        self._stash = _Stash(source, state, outputs)
        return multiplied

    def __getstate__(self) -> dict:
        return {"layers": self.layers}  # copies and pickles of a model start without a half-used pass

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["layers"])  # type: ignore[misc]


class _Traced:
    """A group of layers within one call of their parent, while it is traced. Goes with the alias that it hangs on."""

    def __init__(self, layers: list[FuraLayer]) -> None:
        self.layers = layers
        self.all_blocks: list[FuraBlocks] = []
        self.outputs: tuple[torch.Tensor, ...] = ()  # none before the first layer is called

    def multiply(self, layer: FuraLayer, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
        """`M x`, as that of `SharedInput`."""
        # Saved for a gradient, the input cannot change between two layers without an error. What is not saved could,
        # and go unseen: any input without gradients, and one that autocast has made a copy of.
        if not torch.is_grad_enabled() or x.dtype != source.dtype:
            return None
        if not self.outputs:
            found = [only_blocks(one) for one in self.layers]
            all_blocks = [blocks for blocks in found if blocks is not None]
            if len(all_blocks) < len(found) or not _can_share(all_blocks, x):
                return None
            self.all_blocks, self.outputs = all_blocks, transform.shared_multiply(x, all_blocks)
        for one, blocks, y in zip(self.layers, self.all_blocks, self.outputs, strict=True):
            if one is layer and blocks is only_blocks(layer) and y.dtype == x.dtype:
                return y
        return None


TRACED = "_fura_traced"  # the attribute of an alias


def _alias_input(
    parent: nn.Module, args: tuple, kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple, dict[str, Any]] | None:
    """A hook before the forward of `parent`, while it is traced: its one input that the layers `names` can read, if
    it is the only one, becomes an alias on which they leave what they share."""
    if not torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    children: Any = [parent._modules.get(name) for name in names]
    layers = [child for child in children if hasattr(child, "fura_blocks")]
    if len(layers) < 2:
        return None
    found = None
    for value in (*args, *kwargs.values()):
        if type(value) is not torch.Tensor or not value.is_floating_point() or not 2 <= value.ndim <= 3:
            continue  # a mask of attention has 4 dimensions
        if value.shape[-1] == layers[0].in_features and value is not found:
            if found is not None:
                return None
            found = value
    if found is None or not transform.have_kernels(found):
        return None
    alias = found.view_as(found)
    setattr(alias, TRACED, _Traced(layers))
    given = {name: alias if value is found else value for name, value in kwargs.items()}
    return tuple(alias if value is found else value for value in args), given


def _stream(x: torch.Tensor) -> torch.cuda.Stream | None:
    """Where work on `x` is queued now: another stream would not wait for what this one computes."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def only_blocks(layer: FuraLayer) -> FuraBlocks | None:
    """The blocks of the layer's active adapter if one and only one acts on it, on the input side."""
    if layer.disable_adapters or layer.merged:
        return None
    found = layer.named_blocks(None)
    return found[0] if len(found) == 1 and found[0].side == "input" else None


def _sources(layer: FuraLayer, blocks: FuraBlocks, multiplied: Multiplied) -> tuple:
    """What changes where that does from which `multiplied` was computed, besides the input."""
    core, scale = blocks.core, blocks.scale
    trained = blocks, id(core), core._version, core.requires_grad, None if scale is None else scale._version
    if not multiplied.is_output:
        return trained
    base: Any = layer.base_layer
    return *trained, is_bare(base), *((id(t), t._version) for t in (base.weight, base.bias) if t is not None)


def _can_share(all_blocks: list[FuraBlocks], x: torch.Tensor) -> bool:
    first = all_blocks[0]
    shape = first.core.shape
    return transform.can_share(x, shape[1]) and all(
        blocks.is_plain
        and blocks.core.shape == shape
        and blocks.singular_values == first.singular_values
        and (blocks.sigma is None) == (first.sigma is None)
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
                    layer.is_gate_or_up = names == GATED and isinstance(parent._modules.get("down_proj"), layer_class)
                hook = parent.register_forward_pre_hook(partial(_alias_input, names=names), with_kwargs=True)
                weakref.finalize(shared, hook.remove)  # with the layers: an unloaded model has no hooks
