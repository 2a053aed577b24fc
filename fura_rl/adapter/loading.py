"""Checks an adapter's tensors against the model they are loaded into, and completes what a compact file leaves out.

PEFT itself only warns about missing tensors and would load an adapter onto another base of the same shape.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .basis import block_basis
from .blocks import FuraBlocks
from .errors import AdapterError
from .fingerprint import basis_probe, is_other_weight, same_probe, weight_fingerprint
from .layer import FuraLayer

Tensors = dict[str, torch.Tensor]

PEFT_PREFIX = "base_model.model."
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
ORTHOGONALITY = 0.02  # rounding to float32 leaves 1e-6, to bf16 less than this


def prepare_tensors(model: nn.Module, adapter_name: str, state_dict: Tensors) -> Tensors:
    """Checks the tensors of one adapter, keyed as in its file, and returns what the layers expect.

    Args:
        model: holds `FuraLayer`s that have the adapter already.
        state_dict: "<module>.fura_blocks.<tensor>" -> tensor, besides keys of other modules, which pass through.

    Raises:
        AdapterError: if tensors are missing, surplus, of the wrong shape or broken, or made for another base weight.
    """
    state_dict = dict(state_dict)
    found = {key.rsplit(".fura_blocks.", 1)[0] for key in state_dict if ".fura_blocks." in key}
    expected = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, FuraLayer) or adapter_name not in layer.fura_blocks:
            continue
        key = PEFT_PREFIX + name if PEFT_PREFIX + name in found else name
        expected.add(key)
        start = f"{key}.fura_blocks."
        tensors = {k.removeprefix(start): state_dict.pop(k) for k in list(state_dict) if k.startswith(start)}
        complete = _checked(key, layer, adapter_name, tensors)
        state_dict.update({start + tensor: value for tensor, value in complete.items()})
    surplus = sorted(found - expected)
    if surplus:
        raise AdapterError(
            f"the adapter holds blocks for {len(surplus)} modules that this model does not adapt, {surplus[0]} among "
            "them: it was made for another model or other target_modules."
        )
    return state_dict


def _checked(
    key: str, layer: FuraLayer, adapter_name: str, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    (blocks,) = layer.named_blocks([adapter_name])
    blocks.fold = torch.empty_like(blocks.core.data) if "fold" in tensors else None
    if "fingerprint" in tensors:
        tensors = rebuild_basis(key, layer, blocks, tensors)
    expected = dict(blocks.state_dict())
    optional = {"base_sample"}
    missing = sorted(expected.keys() - tensors.keys() - optional)
    if missing:
        raise AdapterError(
            f"the adapter lacks {missing[0]} of {key}: its file is incomplete, or it was made for another model."
        )
    for tensor, value in tensors.items():
        if tensor not in expected and tensor not in optional:
            raise AdapterError(f"the adapter holds an unknown tensor, {tensor} of {key}: its configuration differs.")
        if tensor in expected and value.shape != expected[tensor].shape:
            raise AdapterError(
                f"{tensor} of {key} has shape {tuple(value.shape)} in the adapter, {tuple(expected[tensor].shape)} in "
                "this model: it was made for another base model or block size."
            )
    check_values(key, tensors)
    sample = layer.sample_base()
    if sample is not None and "base_sample" in tensors and is_other_weight(tensors["base_sample"], sample):
        raise AdapterError(f"the adapter was made for another base model: the weight of {key} differs altogether.")
    dtype = blocks.core.dtype
    return {tensor: value.to(dtype) for tensor, value in tensors.items() if tensor in expected}


def check_values(key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError unless all values are finite, the basis orthogonal and the singular values positive."""
    check_form(key, tensors)
    for tensor, value in tensors.items():
        if value.numel() and not all(map(math.isfinite, value.aminmax())):  # one pass, no copy
            raise AdapterError(f"{tensor} of {key} holds NaN or infinite values: the adapter is corrupted.")
    if "sigma" in tensors and not (tensors["sigma"] > 0).all():
        raise AdapterError(f"sigma of {key} is not positive: the adapter is corrupted.")
    if "basis" in tensors and not _orthogonality_error(tensors["basis"].float()) <= ORTHOGONALITY:
        raise AdapterError(f"the basis of {key} is not orthogonal: the adapter is corrupted.")


def check_form(key: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises AdapterError for a tensor whose values cannot even be looked at, by its dtype or number of dimensions."""
    for tensor, value in tensors.items():
        if value.dtype not in STORED or value.ndim == 0 or (tensor == "basis" and (value.ndim != 3 or len(value) == 0)):
            raise AdapterError(
                f"{tensor} of {key} is of {value.dtype} and shape {tuple(value.shape)}: the adapter is corrupted."
            )


def are_sound(stacks: Iterable[tuple[str, torch.Tensor]]) -> bool:
    """Whether `check_values` would accept all of these tensors; False also for a basis that is nearly not orthogonal.

    Takes a few operations for each stack, and one wait for a GPU, whatever the number of modules.

    Args:
        stacks: name of a tensor, and the tensors of that name and one shape of all modules (modules, *shape), in
            float32 or more and on one device.
    """
    verdicts = []
    for tensor, stack in stacks:
        if stack.numel():
            smallest, largest = stack.aminmax()
            verdicts += [smallest.isfinite(), largest.isfinite()]
            if tensor == "sigma":
                verdicts.append(smallest > 0)
            if tensor == "basis":  # half, because a GPU's matrix units may round to 11 bits
                verdicts.append(_orthogonality_error(stack.float()) <= ORTHOGONALITY / 2)
    return not verdicts or bool(torch.stack(verdicts).all())


def _orthogonality_error(basis: torch.Tensor) -> torch.Tensor:
    """The largest entry of `|V^T V - I|`, over all blocks of `basis` (*, b, b)."""
    gram = basis.mT @ basis
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    smallest, largest = gram.aminmax()
    return torch.maximum(-smallest, largest)


def rebuild_basis(key: str, layer: FuraLayer, blocks: FuraBlocks, tensors: Tensors) -> Tensors:
    """Adds to the tensors of a compact file the basis, computed from the base weight.

    Raises:
        AdapterError: if the base weight, or the basis that this machine computes from it, is not the recorded one.
    """
    tensors = dict(tensors)
    fingerprint, probe = tensors.pop("fingerprint"), tensors.pop("probe", None)
    with layer.reading_weight() as weight:
        if not torch.equal(weight_fingerprint(weight), fingerprint.cpu()):
            raise AdapterError(
                f"the adapter was saved without its basis, and the base weight of {key} is not the one it was trained "
                "on: load it onto the same checkpoint in the same dtype, or save it in full."
            )
        if blocks.sigma is None or probe is None:
            return tensors
        if "fold" in tensors:
            weight = blocks.multiply(weight.float(), tensors["fold"].to(weight.device))
        basis, sigma, _ = block_basis(weight if blocks.side == "input" else weight.T, blocks.block_size)
    if not same_probe(probe, basis_probe(basis)):
        raise AdapterError(
            f"the adapter was saved without its basis, and this machine computes another one for {key} (its singular "
            "vectors are not unique): save it in full where it was trained."
        )
    return tensors | {"basis": basis, "sigma": sigma}
