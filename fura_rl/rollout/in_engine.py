"""Merging an adapter into the weights of a running engine, and back, without drift.

The engine's weights become `W M` (design, section 1). Each change starts from the pristine `W` of the checkpoint, never
from what the engine holds, so adapters may follow one another in any order: A, B, off, A gives the same bits as a fresh
engine with A. `D = M - I` is computed in float32, and the product is rounded once, to the engine's dtype: computed in
float32 too, or on a GPU by `merge_kernel`, which is within 2^-17 of the update.

A change has two halves. `prepare` reads and checks everything and touches nothing; `commit` writes layer by layer, and
puts the old weights back if a layer fails.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fura_rl.adapter.fingerprint import are_other_weights, sample_entries
from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.multiplier import Multiplier
from fura_rl.rollout.payload import Adapter
from fura_rl.rollout.pristine import PristineWeights


@dataclass(frozen=True)
class EngineLayer:
    """A linear layer of the engine and the checkpoint's layers whose rows it holds, in order."""

    path: str
    module: nn.Module
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Merge:
    """What an engine's weights are made of: multipliers by checkpoint layer, and the engine's layers they touch."""

    multipliers: dict[str, Multiplier]
    layers: dict[str, EngineLayer]


NOTHING = Merge({}, {})


class InEngineAdapter:
    """The adapter that is merged into an engine's model.

    Args:
        model: The engine's model, with all of its ranks' slices if it is one of several ranks.
        pristine: The checkpoint that the engine was started from.
    """

    def __init__(self, model: nn.Module, pristine: PristineWeights) -> None:
        self.model = model
        self.pristine = pristine
        self.current = NOTHING
        self._undo: Merge | None = None  # what the last commit replaced, if it succeeded
        self._lost = False
        self._packed = vllm_names.packed_modules(model)
        self._samples: dict[str, torch.Tensor] = {}  # of base weights
        self._layers: dict[str, EngineLayer] = {}  # by layer of the checkpoint
        self._rows: dict[str, list[torch.Tensor] | None] = {}  # by layer of the engine

    # -- prepare --------------------------------------------------------------------------------------------------

    def prepare(self, adapter: Adapter | None) -> Merge:
        """Checks an adapter against the engine and its base; None stands for the base itself.

        What a first commit needs to know of a layer is looked up here, where no request waits for it.

        Raises:
            FuraError: the adapter does not fit. The engine is as it was.
        """
        self._check_alive()
        if adapter is None:
            return NOTHING
        if not adapter.modules:
            raise FuraError("The adapter holds no layers.")
        multipliers = adapter.multipliers(self.pristine.device)
        layers = {layer.path: layer for layer in map(self._find_layer, multipliers)}
        for name, multiplier in multipliers.items():
            self._check_fit(name, multiplier)
        self._check_base(
            {name: tensors["base_sample"] for name, tensors in adapter.modules.items() if "base_sample" in tensors}
        )
        for layer in layers.values():
            if layer.path not in self._rows and (rows := self._find_rows(layer)):
                self._rows[layer.path] = rows
        return Merge(multipliers, layers)

    def _find_layer(self, name: str) -> EngineLayer:
        if name not in self._layers:
            self._layers[name] = self._look_up_layer(name)
        return self._layers[name]

    def _look_up_layer(self, name: str) -> EngineLayer:
        parent, _, leaf = name.rpartition(".")
        path = name
        parts: tuple[str, ...] = (name,)
        for fused, leaves in self._packed.items():
            if leaf in leaves:
                path, parts = f"{parent}.{fused}", tuple(f"{parent}.{part}" for part in leaves)
        try:
            module = self.model.get_submodule(path)
        except AttributeError as error:
            raise FuraError(f"The adapter was made for another model: this engine has no layer {path}.") from error
        if not vllm_names.is_plain_linear(module):
            raise FuraError(
                f"{path} is no linear layer with plain weights in this engine (it may be quantised): an adapter "
                "cannot be merged into it."
            )
        for part in parts:
            if f"{part}.weight" not in self.pristine:
                raise FuraError(
                    f"The base checkpoint has no tensor {part}.weight, which the engine's {path} is made of."
                )
        return EngineLayer(path, module, parts)

    def _check_fit(self, name: str, multiplier: Multiplier) -> None:
        shape = self.pristine.shape(f"{name}.weight")
        adapted = shape[1 if multiplier.side == "input" else 0]
        width = multiplier.width
        if adapted != width:
            raise FuraError(
                f"The adapter was made for another base model: its blocks of {name} cover {width} features, this "
                f"model has {adapted}."
            )
        if multiplier.bias is not None:
            bias = f"{name}.bias"
            if bias not in self.pristine or self.pristine.shape(bias) != tuple(multiplier.bias.shape):
                raise FuraError(f"The adapter was made for another base model: it trains a bias of {name}.")

    def _check_base(self, samples: dict[str, torch.Tensor]) -> None:
        if samples:
            found = torch.stack([self._base_sample(name) for name in samples])
            others = are_other_weights(torch.stack(list(samples.values())), found)  # each operation counts: see worker
            if others.any():
                name = list(samples)[int(others.nonzero()[0])]
                raise FuraError(
                    f"The adapter was made for another base model: the weight of {name} differs altogether."
                )

    def _base_sample(self, name: str) -> torch.Tensor:
        if name not in self._samples:  # reading a weight means copying it to the device
            self._samples[name] = sample_entries(self.pristine[f"{name}.weight"]).cpu()
        return self._samples[name]

    # -- commit ---------------------------------------------------------------------------------------------------

    def commit(self, merge: Merge) -> None:
        """Makes the engine's weights those of `merge`.

        Raises:
            FuraError: a layer could not be written; the engine has its old weights again.
        """
        self._check_alive()
        old, self._undo = self.current, None
        layers = old.layers | merge.layers
        written: list[EngineLayer] = []
        try:
            for layer in layers.values():
                written.append(layer)
                self._write(layer, merge.multipliers, with_bias=_trains_bias(layer, merge, old))
            if self.pristine.device.type == "cuda":
                torch.cuda.synchronize()  # what fails, fails here
        except Exception as error:
            self._lost = True  # until the old weights are back
            try:
                for layer in written:
                    self._write(layer, old.multipliers, with_bias=_trains_bias(layer, merge, old))
            except Exception as second:
                raise FuraError(
                    f"The adapter could not be merged ({reason(error)}), nor the old weights put back "
                    f"({reason(second)}): restart the engine."
                ) from second
            self._lost = False
            raise FuraError(f"The adapter could not be merged; the old weights are back: {reason(error)}") from error
        self._undo, self.current = old, merge

    def rollback(self) -> None:
        """Undoes the last commit where it succeeded: another rank's may not have.

        Raises:
            FuraError: the old weights could not be put back, now or by the commit itself.
        """
        self._check_alive()
        if self._undo is not None:
            self.commit(self._undo)

    @torch.no_grad()
    def _write(self, layer: EngineLayer, multipliers: dict[str, Multiplier], *, with_bias: bool) -> None:
        rows = self._rows_of(layer)
        if rows is None:
            dtype = vllm_names.attribute(layer.module, "weight").dtype  # one matrix in float32 at a time
            weights = [self._merged(part, multipliers.get(part)).to(dtype) for part in layer.parts]
            vllm_names.store_weight(layer.module, weights)
        else:
            for part, out in zip(layer.parts, rows, strict=True):
                self._merge_into(part, multipliers.get(part), out)
        if with_bias:
            biases = [self._merged_bias(part, multipliers.get(part)) for part in layer.parts]
            vllm_names.store_bias(layer.module, biases)

    def _rows_of(self, layer: EngineLayer) -> list[torch.Tensor] | None:
        """The parts of a layer's weight, if it holds them as they are, one below the other; None if only vLLM knows.

        Looked up before the layer is written for the first time: as it is, or else in what vLLM's loader makes of the
        base.
        """
        if layer.path not in self._rows:
            base = self._base_of(layer)
            if base is not None:
                vllm_names.store_weight(layer.module, base)
            self._rows[layer.path] = self._find_rows(layer)
        return self._rows[layer.path]

    def _find_rows(self, layer: EngineLayer) -> list[torch.Tensor] | None:
        """Where the base's parts lie in a layer that holds the base; None if they don't, or not as rows."""
        base = self._base_of(layer)
        if base is None:
            return None
        rows = list(vllm_names.attribute(layer.module, "weight").data.split([len(part) for part in base]))
        return rows if all(torch.equal(row, part) for row, part in zip(rows, base, strict=True)) else None

    def _base_of(self, layer: EngineLayer) -> list[torch.Tensor] | None:
        """The base's parts of a layer, in the engine's dtype; None if they cannot be rows of its weight."""
        weight = vllm_names.attribute(layer.module, "weight")
        rows = sum(self.pristine.shape(f"{part}.weight")[0] for part in layer.parts)
        if not weight.numel() or vllm_names.is_split(layer.module) or len(weight) != rows:
            return None
        return [self.pristine[f"{part}.weight"].to(weight.dtype) for part in layer.parts]

    def _merge_into(self, part: str, multiplier: Multiplier | None, out: torch.Tensor) -> None:
        weight = self.pristine[f"{part}.weight"]
        if multiplier is None:
            out.copy_(weight)
        else:
            multiplier.merge_into(weight, out)

    def _merged(self, part: str, multiplier: Multiplier | None) -> torch.Tensor:
        weight = self.pristine[f"{part}.weight"]
        return weight if multiplier is None else multiplier.merged(weight)

    def _merged_bias(self, part: str, multiplier: Multiplier | None) -> torch.Tensor:
        bias = self.pristine[f"{part}.bias"].float()
        return bias if multiplier is None or multiplier.bias is None else bias + multiplier.bias

    def _check_alive(self) -> None:
        if self._lost:
            raise FuraError("An earlier change failed and could not be undone: restart the engine.")


def reason(error: BaseException) -> str:
    """Why something failed, in few words: torch says more about memory than a sentence can hold."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"the engine ran out of memory ({'. '.join(str(error).split('. ')[:2])})"
    return str(error)


def _trains_bias(layer: EngineLayer, *merges: Merge) -> bool:
    found = (merge.multipliers.get(part) for part in layer.parts for merge in merges)
    return any(multiplier is not None and multiplier.bias is not None for multiplier in found)
