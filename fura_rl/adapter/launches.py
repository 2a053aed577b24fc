"""How the kernels of the transform and of its gradient are started, and for what they are there at all.

The launch parameters are a fixed function of shapes, dtype and device, measured on an H100 and an H200 and not
autotuned: the number of shares sets the order of the sum, so a choice by timing would change the gradients from run to
run.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from .triton_launch import INTERPRETED
from .wide_kernels import FIRST


@dataclass(frozen=True)
class Launch:
    """How one kernel is started: tile of the block, rows a step, programs a multiprocessor, warps, stages."""

    tile: int
    rows: int
    residents: int
    warps: int
    stages: int

    def shares(self, num_rows: int, programs: int, device: torch.device) -> int:
        """Programs that divide the rows of one tile between them."""
        processors = 4 if INTERPRETED else device_properties(device.index).multi_processor_count
        return max(1, min(-(-num_rows // self.rows), processors * self.residents // programs))


# A call costs microseconds each time.
device_properties = functools.cache(torch.cuda.get_device_properties)


def padded(b: int) -> int:
    """The next power of two, and what matrix units need at least."""
    return max(16, 1 << (b - 1).bit_length())


@functools.cache
def transform_launch(b: int, dtype: torch.dtype) -> Launch:
    tile = padded(b)
    if dtype == torch.float32:
        return Launch(tile, rows=32, residents=4, warps=4, stages=1)
    if tile <= 32:
        return Launch(tile, rows=256, residents=4, warps=4, stages=2)
    if tile <= FIRST:
        return Launch(tile, rows=64, residents=4, warps=8 if tile > 64 else 4, stages=3)
    return Launch(FIRST, rows=64, residents=2, warps=4, stages=2)


@functools.cache
def gradient_launch(b: int, dtype: torch.dtype) -> Launch:
    tile = padded(b)
    if dtype == torch.float32:
        return Launch(tile, rows=32, residents=2, warps=4, stages=1)
    if tile <= 32:
        return Launch(tile, rows=64, residents=4, warps=4, stages=2)
    if tile <= 128:
        return Launch(tile, rows=64, residents=2, warps=8, stages=3)
    return Launch(FIRST, rows=64, residents=2, warps=8, stages=2)  # a sum over all of the block would spill


def is_roomy(device: torch.device) -> bool:
    """Whether a program may have the 163 KB of shared memory that an A100 gives; below the data centre it is 99 KB."""
    if INTERPRETED:
        return True
    properties: Any = device_properties(device.index)
    return properties.shared_memory_per_block_optin >= 140_000


def product_launch(b: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """Of the gradient for an input that is given as two factors."""
    launch = gradient_launch(b, dtype)
    return launch if launch.tile <= 64 or is_roomy(device) else replace(launch, stages=2)


def gated_launch(n: int, b: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """Of the gradient of `n` blocks that goes on to `gate` and `up`: three tensors are read and two written."""
    tile = padded(b)
    if dtype == torch.float32 or tile <= 32:
        return gradient_launch(b, dtype)
    if tile <= 64:
        return Launch(tile, rows=32, residents=2, warps=4, stages=3)
    # A multiprocessor holds one such program: blocks that do not all start at once are cut into many shares.
    few = INTERPRETED or n <= device_properties(device.index).multi_processor_count
    return Launch(tile, rows=64, residents=1 if few else 8, warps=16, stages=3 if is_roomy(device) else 2)


def supports(b: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for blocks of `b`, tensors of `dtype`, and this device.

    Float32 blocks over 64 do not fit into shared memory; others over 128 do only on data centre GPUs since Hopper.
    """
    largest = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}.get(dtype, 0)
    if INTERPRETED or b > largest:
        return b <= largest
    capability = device_properties(device.index).major
    return capability >= 8 if b <= 128 else capability in (9, 10)


def evenly_spaced(x: torch.Tensor, num_features: int) -> tuple[torch.Tensor, int]:
    """`x` (*, K), copied if need be, and the distance of its rows, which are contiguous."""
    if x.is_contiguous():
        return x, num_features
    x_TK = x.reshape(-1, num_features)
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    return x_TK, x_TK.stride(0)
