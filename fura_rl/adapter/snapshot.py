"""`BaseSnapshot`: what a base layer looked like before a merge, so that unmerging is exact."""

import copy
from types import SimpleNamespace
from typing import Any

from torch import nn


class BaseSnapshot:
    """References to the parameters of a base layer and to the bookkeeping that quantisation libraries hang on them.

    Nothing is copied: a merge puts new parameters into the layer and leaves the old ones alone. What the quantisation
    backends of PEFT do change in place (bitsandbytes' `state` and the attributes of its parameters) is kept beside;
    HQQ exchanges the whole layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.base_layer: Any = layer.base_layer
        base: Any = layer.get_base_layer()
        self.parameters = dict(base._parameters)
        self.attributes = {name: dict(p.__dict__) for name, p in self.parameters.items() if p is not None}
        self.state = copy.copy(getattr(base, "state", None))

    @property
    def view(self) -> SimpleNamespace:
        """The unmerged layer as PEFT's quantisation backends and we read it: `.weight`, `.bias`, `.state`."""
        dequantize = getattr(self.base_layer, "dequantize", None)
        return SimpleNamespace(**self.parameters, state=self.state, dequantize=dequantize)

    def restore(self, layer: nn.Module) -> None:
        """Puts the unmerged parameters back into `layer`'s base layer."""
        layer.base_layer = self.base_layer
        base: Any = layer.get_base_layer()
        for name, parameter in self.parameters.items():
            base.__dict__.pop(name, None)
            base._parameters[name] = parameter
            if parameter is not None:
                parameter.__dict__.clear()
                parameter.__dict__.update(self.attributes[name])
        if self.state is not None:
            base.state = self.state
