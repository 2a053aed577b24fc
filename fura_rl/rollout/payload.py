"""An adapter as data: read from a folder or from bytes, checked, and turned into blocks that multiply a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fura_rl.adapter.blocks import FuraBlocks
from fura_rl.adapter.config import FuraConfig
from fura_rl.adapter.loading import Tensors, check_values
from fura_rl.adapter.saving import read_adapter
from fura_rl.errors import FuraError

TRAINED = ("core", "scale", "bias")  # what a step of training changes; basis, sigma, fold and base_sample stay
FAMILY = ("side", "singular_values", "basis")  # the options that say how tensors make a multiplier


@dataclass(frozen=True)
class Adapter:
    """The tensors of one adapter by module and name, and the member of the FuRA family that they belong to."""

    family: dict[str, Any]
    modules: dict[str, Tensors]

    @property
    def checksum(self) -> str:
        """SHA-256 of everything that decides about the merged weights: equal at both ends of a transfer."""
        digest = hashlib.sha256(json.dumps(self.family, sort_keys=True).encode())
        for module in sorted(self.modules):
            for key, value in sorted(self.modules[module].items()):
                digest.update(f"{module} {key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def blocks(self, device: torch.device) -> dict[str, FuraBlocks]:
        """Module name -> blocks on `device`.

        Raises:
            FuraError: a tensor is missing or has another shape than the core asks for.
        """
        config = FuraConfig(**self.family)
        made = {}
        for module, tensors in self.modules.items():
            if "core" not in tensors or tensors["core"].ndim != 3:
                raise FuraError(f"The adapter lacks the core of {module}.")
            try:
                blocks = FuraBlocks.from_tensors(config, tensors)
            except RuntimeError as error:  # torch names the tensor and both shapes
                raise FuraError(f"The adapter's tensors of {module} do not fit together: {error}") from error
            missing = sorted(blocks.state_dict().keys() - tensors.keys() - {"base_sample"})
            if missing:
                raise FuraError(f"The adapter lacks {missing[0]} of {module}: its file is incomplete.")
            made[module] = blocks.to(device)
        return made


def read_folder(path: str | Path) -> Adapter:
    """The adapter saved in a folder, in full or as its delta.

    Raises:
        FuraError: no adapter there, or one that cannot be merged by itself (compact form, further trained modules).
    """
    config, modules, others = read_adapter(path)
    if config.saved_form == "compact":
        raise FuraError(f"{path} was saved without its basis: save it in full, or as its delta, to serve it.")
    if others:
        raise FuraError(
            f"{path} also holds {sorted(others)[0]}: an engine takes FuRA blocks only, so an adapter with "
            "modules_to_save has to be merged into a model of its own."
        )
    return Adapter({key: getattr(config, key) for key in FAMILY}, modules)


def pack(adapter: Adapter, *, only_trained: bool = False) -> bytes:
    """A safetensors file in memory: the whole adapter, or only what training changes."""
    tensors = {
        f"{module}:{key}": value.contiguous()
        for module, values in adapter.modules.items()
        for key, value in values.items()
        if not only_trained or key in TRAINED
    }
    kind = "trained" if only_trained else "full"
    return save(tensors, metadata={"kind": kind, "family": json.dumps(adapter.family)})


def unpack(data: bytes) -> tuple[str, Adapter]:
    """The kind ("full" or "trained") and the content of what `pack` made.

    Raises:
        FuraError: these are other bytes.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        kind, family = header["kind"], json.loads(header["family"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise FuraError(f"These bytes are no adapter that fura-rl has packed ({error}).") from error
    if set(family) != set(FAMILY) or kind not in ("full", "trained"):
        raise FuraError("These bytes are no adapter that this version of fura-rl has packed.")
    modules: dict[str, Tensors] = {}
    for name, value in tensors.items():
        module, _, key = name.rpartition(":")
        modules.setdefault(module, {})[key] = value
    for module, values in modules.items():
        check_values(module, values)
    return kind, Adapter(family, modules)


def update(adapter: Adapter, trained: Adapter) -> Adapter:
    """`adapter` with the tensors that training changes replaced.

    Raises:
        FuraError: `trained` has other modules, tensors or shapes.
    """
    modules: dict[str, Tensors] = {}
    if adapter.family != trained.family or adapter.modules.keys() != trained.modules.keys():
        raise FuraError("The update belongs to another adapter than the one sent before.")
    for module, tensors in adapter.modules.items():
        new = trained.modules[module]
        if _shapes({key: tensors[key] for key in tensors if key in TRAINED}) != _shapes(new):
            raise FuraError(f"The update of {module} has other tensors than the adapter sent before.")
        modules[module] = {**tensors, **new}
    return Adapter(adapter.family, modules)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}
