"""Compiling a swap's kernels before the first one."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fura_rl.adapter.basis import closest_block_size
from fura_rl.rollout.payload import Adapter


def warm_up(widths: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
    """Runs what a swap runs, on zeros as wide as an engine's layers: Triton compiles a kernel when it is first called.

    For adapters of the default options, in full or as their delta. Others compile theirs while they are swapped in.

    Args:
        widths: Input features of the layers.
        dtype: The engine's, and its checkpoint's.
        device: The engine's.
    """
    from fura_rl.rollout.merge_kernel import LARGEST_BLOCK  # needs Triton, as what is warmed up does

    modules = {}
    for width, b in {width: closest_block_size(width) for width in widths}.items():
        if b > LARGEST_BLOCK:  # goes through torch
            continue
        core, ones = torch.zeros(width // b, b, b), torch.ones(width // b, b)
        basis = torch.eye(b).expand_as(core)
        modules[str(width)] = {"core": core, "scale": ones, "basis": basis, "sigma": ones}
    adapter = Adapter({"side": "input", "singular_values": "trainable", "basis": "svd"}, modules)
    there = adapter.to(device)
    adapter.check_values(there)
    for multiplier in there.multipliers(device).values():
        weight = torch.zeros(1, multiplier.width, dtype=dtype, device=device)
        multiplier.merge_into(weight, torch.empty_like(weight))
