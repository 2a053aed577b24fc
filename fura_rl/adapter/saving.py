"""The forms in which an adapter is written: in full, as its multiplier alone, or without its basis.

- full: trained tensors, basis and singular values; what `model.save_pretrained` writes.
- delta: `D` alone. About half the size, for serving and merging, not for further training.
- compact: trained tensors, a hash of the base weight and a probe of the basis. About half the size; the basis is
  computed again on loading and must come out the same.

All three load with `PeftModel.from_pretrained` and need `import fura_rl` before.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .blocks import FuraBlocks
from .config import FuraConfig, SavedForm
from .errors import AdapterError
from .fingerprint import basis_probe, weight_fingerprint
from .layer import FuraLayer
from .loading import PEFT_PREFIX, Tensors, check_form, check_values, rebuild_basis


def save_adapter(model: PeftModel, path: str | Path, form: SavedForm = "full", adapter_name: str = "default") -> Path:
    """Writes one adapter of `model` and returns its folder (a subfolder of `path` unless it is "default", as in PEFT).

    Raises:
        AdapterError: if the form cannot hold this adapter, see `compact_tensors`.
    """
    folder = Path(path) if adapter_name == "default" else Path(path) / adapter_name
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FuraLayer)}
    if form == "compact":  # before anything is written
        compact = {
            name: compact_tensors(name, layer, adapter_name)
            for name, layer in layers.items()
            if adapter_name in layer.fura_blocks
        }
    model.save_pretrained(str(path), selected_adapters=[adapter_name])
    config = FuraConfig.from_pretrained(str(folder))
    if form == "delta" and config.saved_form == "full":
        to_delta(folder)
    elif form == "compact":
        _rewrite(folder, replace(config, saved_form="compact"), lambda name, _: compact[name])
    return folder


def to_delta(folder: str | Path) -> None:
    """Rewrites a saved adapter, in place, to hold only its multipliers' difference `D`. Needs no model.

    The result is an adapter whose core is `D` itself, on the identity as its basis.
    """
    config = FuraConfig.from_pretrained(str(folder))

    def reduce(name: str, tensors: Tensors) -> Tensors:
        kept = {"core": FuraBlocks.from_tensors(config, tensors)().detach().contiguous()}
        return kept | {key: tensors[key] for key in ("bias", "base_sample") if key in tensors}

    _rewrite(folder, replace(config, basis="identity", singular_values="merged", saved_form="delta"), reduce)


@torch.no_grad()
def compact_tensors(name: str, layer: FuraLayer, adapter_name: str) -> Tensors:
    """What the compact form keeps of one layer: all but the basis, and how to know the base and the basis again.

    Raises:
        AdapterError: if the basis is random, or this machine computes another basis than the adapter's.
    """
    (blocks,) = layer.named_blocks([adapter_name])
    if blocks.basis_kind == "random":
        raise AdapterError("a random basis cannot be computed again: save the adapter in full or as its delta.")
    kept = {key: value.cpu() for key, value in blocks.state_dict().items() if key not in ("basis", "sigma")}
    with layer.reading_weight() as weight:
        kept["fingerprint"] = weight_fingerprint(weight)
    if blocks.basis is not None:
        kept["probe"] = basis_probe(blocks.basis)
    rebuild_basis(name, layer, blocks, kept)  # raises rather than writing a file that nobody can load
    return kept


def read_adapter(path: str | Path, check: bool = True) -> tuple[FuraConfig, dict[str, Tensors], Tensors]:
    """The configuration of a saved adapter, its tensors by module name, and the tensors of `modules_to_save`.

    Args:
        path: the adapter's folder, or a file in it.
        check: False leaves `check_values` to the caller, but for `check_form`.

    Raises:
        AdapterError: if it is no FuRA adapter, or its file is missing, truncated, pickled or holds broken values.
    """
    if not Path(path).exists():
        raise AdapterError(f"{path} does not exist.")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        config = FuraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise (
            error if isinstance(error, AdapterError) else AdapterError(f"{folder} holds no adapter: {error}")
        ) from error
    if not isinstance(config, FuraConfig):
        raise AdapterError(f"{folder} holds a {config.peft_type} adapter, not one of FuRA.")
    if not weights.exists():
        raise AdapterError(f"{folder} holds no {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise AdapterError(f"{weights} is truncated or no safetensors file ({error}).") from error
    modules: dict[str, Tensors] = {}
    others: Tensors = {}
    for key, value in tensors.items():
        module, separator, tensor = key.rpartition(".fura_blocks.")
        if separator:
            modules.setdefault(module.removeprefix(PEFT_PREFIX), {})[tensor] = value
        else:
            others[key] = value
    for module, blocks in modules.items():
        (check_values if check else check_form)(module, blocks)
        if "core" not in blocks:
            raise AdapterError(f"{weights} lacks the core of {module}.")
    return config, modules, others


def load_deltas(path: str | Path) -> dict[str, torch.Tensor]:
    """`D` (n, b, b) by module name of an adapter saved in full or as its delta: all that serving it takes.

    Raises:
        AdapterError: as `read_adapter`, or for the compact form, whose `D` needs the base model.
    """
    config, modules, _ = read_adapter(path)
    if config.saved_form == "compact":
        raise AdapterError(f"{path} was saved without its basis: load it onto its base model.")
    return {name: FuraBlocks.from_tensors(config, tensors)().detach() for name, tensors in modules.items()}


def _rewrite(folder: str | Path, config: FuraConfig, change: Callable[[str, Tensors], Tensors]) -> None:
    _, modules, others = read_adapter(folder)
    tensors = dict(others)
    for name, blocks in modules.items():
        changed = change(PEFT_PREFIX + name, blocks)
        tensors |= {f"{PEFT_PREFIX}{name}.fura_blocks.{key}": value for key, value in changed.items()}
    weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    partial = weights.with_suffix(".partial")
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(weights)
    config.save_pretrained(str(folder))
