"""An adapter as data: read from a folder or from bytes, checked, and turned into blocks that multiply a weight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fura_rl.adapter.blocks import FuraBlocks
from fura_rl.adapter.config import FuraConfig
from fura_rl.adapter.loading import Tensors, are_sound, check_values
from fura_rl.adapter.saving import read_adapter
from fura_rl.errors import FuraError
from fura_rl.rollout.change import GROUP, decode, encode, is_close
from fura_rl.rollout.multiplier import Multiplier, empty_blocks, multiplier

TRAINED = ("core", "scale", "bias")  # what a step of training changes; basis, sigma, fold and base_sample stay
FAMILY = ("side", "singular_values", "basis")  # the options that say how tensors make a multiplier
THREADS = min(8, os.cpu_count() or 1)  # SHA-256 runs beside other Python code


class StaleUpdateError(FuraError):
    """An update of other tensors than those that are here: the whole adapter has to be sent."""


@dataclass(frozen=True)
class Adapter:
    """The tensors of one adapter by module and name, and the member of the FuRA family that they belong to.

    Not to be written to: what is computed from them is kept.
    """

    family: dict[str, Any]
    modules: dict[str, Tensors]
    _frozen_digests: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # by module
    # what `to` has made: all tensors of one name and shape at once
    _stacks: tuple[tuple[str, torch.Tensor], ...] = field(default=(), repr=False, compare=False)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of everything that decides about the merged weights: equal at both ends of a transfer.

        Made of one digest for each module's frozen and trained tensors. Those of frozen ones are shared by all updates.
        """
        whole = hashlib.sha256(json.dumps(self.family, sort_keys=True).encode())
        with ThreadPoolExecutor(THREADS) as pool:
            for digest in pool.map(self._digest, sorted(self.modules)):
                whole.update(digest)
        return whole.hexdigest()

    def _digest(self, module: str) -> bytes:
        tensors = self.modules[module]
        if module not in self._frozen_digests:
            frozen = {key: value for key, value in tensors.items() if key not in TRAINED}
            self._frozen_digests[module] = _digest(module, frozen)
        trained = {key: value for key, value in tensors.items() if key in TRAINED}
        return self._frozen_digests[module] + _digest(module, trained)

    @cached_property
    def trained(self) -> torch.Tensor:
        """Everything that is trained, (N,), in the order of `with_trained`."""
        return torch.cat([tensor.reshape(-1) for _, _, tensor in self._trained()])

    def _trained(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for module in sorted(self.modules):
            for key in TRAINED:
                if key in self.modules[module]:
                    yield module, key, self.modules[module][key]

    def with_trained(self, trained: torch.Tensor) -> Adapter:
        """This adapter with other numbers where it is trained; the frozen tensors are the same objects.

        Raises:
            FuraError: these are not as many.
        """
        parts = list(self._trained())
        sizes = [tensor.numel() for _, _, tensor in parts]
        if trained.shape != (sum(sizes),):
            raise FuraError("The update belongs to another adapter than the one sent before.")
        modules = {module: dict(self.modules[module]) for module in sorted(self.modules)}
        for (module, key, old), new in zip(parts, trained.split(sizes), strict=True):
            modules[module][key] = new.view(old.shape)
        made = Adapter(self.family, modules, self._frozen_digests)
        vars(made)["trained"] = trained  # needs no collecting
        return made

    def shares_frozen(self, other: Adapter) -> bool:
        """Whether only trained tensors differ, in value but not in shape: the frozen ones are the same objects."""
        return (
            self.family == other.family
            and self.modules.keys() == other.modules.keys()
            and all(_same_but_trained(tensors, other.modules[name]) for name, tensors in self.modules.items())
        )

    def to(self, device: torch.device) -> Adapter:
        """On `device`, in float32 or more, through one copy. Samples of the base stay: they are compared on the CPU."""
        groups: dict[tuple[str, torch.Size], list[tuple[str, torch.Tensor]]] = {}
        dtype, is_there = torch.float32, True
        modules: dict[str, Tensors] = {module: {} for module in self.modules}
        for module, tensors in self.modules.items():
            for key, value in tensors.items():
                if key == "base_sample":
                    modules[module][key] = value
                else:
                    groups.setdefault((key, value.shape), []).append((module, value))
                    dtype = torch.promote_types(dtype, value.dtype)
                    is_there = is_there and value.device == device
        if is_there:
            return self
        values = [value.reshape(-1) for members in groups.values() for _, value in members]
        flat = torch.empty(sum(map(len, values)), dtype=dtype, pin_memory=device.type == "cuda")
        with one_thread():
            torch.cat(values, out=flat)
        flat = flat.to(device, non_blocking=True)
        sizes = [len(members) * shape.numel() for (_, shape), members in groups.items()]
        stacks = []
        for ((key, shape), members), part in zip(groups.items(), flat.split(sizes), strict=True):
            stack = part.view(len(members), *shape)
            stacks.append((key, stack))
            for (module, _), value in zip(members, stack.unbind(), strict=True):
                modules[module][key] = value
        return Adapter(self.family, modules, _stacks=tuple(stacks))

    def check_values(self, there: Adapter | None = None) -> None:
        """Raises AdapterError unless all values are finite, the bases orthogonal and the singular values positive.

        Args:
            there: What `to` made of this adapter, to be looked at in its place: on a GPU that takes a hundredth.
        """
        if there is not None and there._stacks:
            samples = [tensors["base_sample"] for tensors in self.modules.values() if "base_sample" in tensors]
            stay = [("base_sample", torch.cat([value.reshape(-1) for value in samples]))] if samples else []
            if are_sound(there._stacks) and are_sound(stay):
                return
        for module, tensors in self.modules.items():  # says where
            check_values(module, tensors)

    @torch.no_grad()
    def multipliers(self, device: torch.device) -> dict[str, Multiplier]:
        """Module name -> what multiplies its weight, on `device`.

        Raises:
            FuraError: a tensor is missing or has another shape than the core asks for.
        """
        for module, tensors in self.modules.items():
            if "core" not in tensors or tensors["core"].ndim != 3:
                raise FuraError(f"The adapter lacks the core of {module}.")
        config = FuraConfig(**self.family)
        known: dict[Any, FuraBlocks] = {}  # by shapes: most modules share them, and making takes longer than using
        made = {}
        for module, tensors in self.to(device).modules.items():
            shapes = tuple((key, value.shape) for key, value in sorted(tensors.items()))
            if shapes not in known:
                known[shapes] = empty_blocks(module, config, tensors)
            made[module] = multiplier(known[shapes], tensors)
        return made


@contextmanager
def one_thread() -> Iterator[None]:
    """Without torch's other threads: for hundreds of small operations, on a busy host they are waited for each time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digest(module: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    digest = hashlib.sha256(module.encode())
    for key, value in sorted(tensors.items()):
        digest.update(f" {key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _same_but_trained(tensors: Tensors, others: Tensors) -> bool:
    return tensors.keys() == others.keys() and all(
        value.shape == others[key].shape if key in TRAINED else value is others[key] for key, value in tensors.items()
    )


def read_folder(path: str | Path, check: bool = True) -> Adapter:
    """The adapter saved in a folder, in full or as its delta.

    Args:
        path: The folder.
        check: False leaves `Adapter.check_values` to the caller.

    Raises:
        FuraError: no adapter there, or one that cannot be merged by itself (compact form, further trained modules).
    """
    config, modules, others = read_adapter(path, check)
    if config.saved_form == "compact":
        raise FuraError(f"{path} was saved without its basis: save it in full, or as its delta, to serve it.")
    if others:
        raise FuraError(
            f"{path} also holds {sorted(others)[0]}: an engine takes FuRA blocks only, so an adapter with "
            "modules_to_save has to be merged into a model of its own."
        )
    return Adapter({key: getattr(config, key) for key in FAMILY}, modules)


def pack(adapter: Adapter) -> bytes:
    """The whole adapter as a safetensors file in memory."""
    tensors = {
        f"{module}:{key}": value.contiguous()
        for module, values in adapter.modules.items()
        for key, value in values.items()
    }
    return save(tensors, metadata={"kind": "full", "family": json.dumps(adapter.family)})


def pack_update(adapter: Adapter, held: Adapter, largest_error: float) -> tuple[Adapter, bytes]:
    """What is trained, for a server that holds `held`, of which only trained tensors differ.

    Args:
        largest_error: By how much a number may be off for the change to travel as int8 (see `change`). Where it could
            be off by more, or is not finite, all numbers travel exactly.

    Returns:
        The adapter that the server has then, and the bytes.
    """
    new, old = adapter.trained, held.trained
    header = {"base": held.checksum}
    if largest_error and new.dtype == torch.float32:
        numbers, factors, after = encode(new, old)
        if is_close(factors, largest_error):
            data = save({"numbers": numbers, "factors": factors}, metadata={"kind": "int8", **header})
            return held.with_trained(after), data
    return held.with_trained(new), save({"trained": new}, metadata={"kind": "exact", **header})


def unpack(data: bytes, held: Adapter | None = None) -> Adapter:
    """The adapter that `pack` made, or `held` after what `pack_update` made.

    Raises:
        StaleUpdateError: this updates another adapter than `held`.
        FuraError: these are other bytes.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        family = json.loads(header["family"]) if header["kind"] == "full" else None
        base = None if family is not None else header["base"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise FuraError(f"These bytes are no adapter that fura-rl has packed ({error}).") from error
    if base is None:
        return _unpack_full(tensors, family)
    if held is None or held.checksum != base:
        raise StaleUpdateError("The update was made for another adapter than the one that was sent last.")
    adapter = held.with_trained(_trained(held.trained, tensors))
    if not all(torch.isfinite(extreme) for extreme in adapter.trained.aminmax()):
        for module, values in adapter.modules.items():  # raises, and says where
            check_values(module, {key: value for key, value in values.items() if key in TRAINED})
    return adapter


def _trained(held: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    groups = (-(-len(held) // GROUP),)
    found = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
    if found == {"trained": (held.dtype, tuple(held.shape))}:
        return tensors["trained"]
    if found != {"numbers": (torch.int8, tuple(held.shape)), "factors": (torch.float32, groups)}:
        raise FuraError("The update belongs to another adapter than the one sent before.")
    return decode(held, tensors["numbers"], tensors["factors"])


def _unpack_full(tensors: Tensors, family: Any) -> Adapter:
    if not isinstance(family, dict) or set(family) != set(FAMILY):
        raise FuraError("These bytes are no adapter that this version of fura-rl has packed.")
    modules: dict[str, Tensors] = {}
    for name, value in tensors.items():
        module, _, key = name.rpartition(":")
        modules.setdefault(module, {})[key] = value
    adapter = Adapter(family, modules)
    adapter.check_values()
    return adapter
