"""Parameters that are spread over ranks (ZeRO-3, FSDP2): their size as a whole, and the part that this rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def whole_numel(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers parameters have as a whole; ZeRO-3 leaves an empty tensor in the place of each."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def own_part(parameter: Any) -> torch.Tensor:
    """The numbers of a parameter that this rank holds: a view, perhaps empty; all of them if nothing is spread.

    ZeRO-3 pads the flat parameter to a multiple of the number of ranks, and nobody sets the padding: it is left out.
    """
    if hasattr(parameter, "ds_tensor"):
        flat: torch.Tensor = parameter.ds_tensor.data
        before = flat.numel() * torch.distributed.get_rank(parameter.ds_process_group)
        return flat[: max(parameter.ds_numel - before, 0)]
    tensor: torch.Tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def largest_magnitude(parameters: Iterable[nn.Parameter], device: torch.device) -> torch.Tensor:
    """Of the numbers that this rank holds, on `device`; 0 if it holds none, NaN if one of them is."""
    parts = [part for parameter in parameters if (part := own_part(parameter)).numel()]
    norms = torch._foreach_norm(parts, ord=float("inf")) if parts else []
    return torch.stack([torch.zeros((), device=device), *(norm.to(device).float() for norm in norms)]).max()
