"""`W (I + D)` written straight into an engine's storage: one pass over `W`, as a Triton kernel.

A product in float32 would read and write each weight several times over. Here `W` is read once and the result written
once. bfloat16's matrix units do it without losing float32's digits: `D`, and `W` where it is not bfloat16 itself, are
split into a bfloat16 value and the bfloat16 value of what it leaves over, 16 bits of mantissa together; products are
exact and sums are in float32. What remains, 2^-17 of the update, is far below the rounding to the engine's dtype.

Shapes: rows of `W`, n blocks, b block size, in = n * b; `i` and `o` index the rows and columns of a block of `D`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fura_rl.adapter.launches import device_properties, padded
from fura_rl.adapter.triton_dot import dot
from fura_rl.adapter.triton_launch import INTERPRETED, Kernel

LARGEST_BLOCK = 128  # two tiles of D have to fit into shared memory
OUT_DTYPES = (torch.bfloat16, torch.float16)
IN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    weight_ptr,
    delta_ptr,
    out_ptr,
    num_rows,
    weight_stride,
    out_stride,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The columns of one block, over every `num_programs(1)`-th group of rows."""
    block = tl.program_id(0)  # neighbouring programs read neighbouring columns of the same rows
    i = tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    mask_io = (i < b)[:, None] & (i < b)[None, :]
    delta_io = tl.load(delta_ptr + block * b * b + i[:, None] * b + i[None, :], mask_io, 0.0)
    high_io = delta_io.to(tl.bfloat16)
    low_io = (delta_io - high_io.to(tl.float32)).to(tl.bfloat16)
    weight_ptr += block * b
    out_ptr += block * b
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=2):
        row = (first + r).to(tl.int64)[:, None]
        mask = (first + r < num_rows)[:, None] & (i < b)[None, :]
        weight_ri = tl.load(weight_ptr + row * weight_stride + i[None, :], mask, 0.0)
        exact_ri = weight_ri.to(tl.float32)
        top_ri = weight_ri.to(tl.bfloat16)
        update_ro = dot(top_ri, low_io, INTERPRETED)
        if SPLIT_WEIGHT:
            rest_ri = (exact_ri - top_ri.to(tl.float32)).to(tl.bfloat16)
            update_ro += dot(rest_ri, high_io, INTERPRETED)
        update_ro += dot(top_ri, high_io, INTERPRETED)
        merged_ro = exact_ri + update_ro
        tl.store(out_ptr + row * out_stride + i[None, :], merged_ro.to(out_ptr.dtype.element_ty), mask)


merge_kernel = Kernel(_merge_kernel)


def supports(weight: torch.Tensor, block_size: int, out: torch.Tensor) -> bool:
    """Whether `merge_into` can take these tensors."""
    return (
        (INTERPRETED or (weight.is_cuda and device_properties(weight.device.index).major >= 8))
        and out.device == weight.device
        and weight.dtype in IN_DTYPES
        and out.dtype in OUT_DTYPES
        and block_size <= LARGEST_BLOCK
        and weight.stride(1) == out.stride(1) == 1
    )


def merge_into(weight: torch.Tensor, delta: torch.Tensor, out: torch.Tensor) -> None:
    """`out = W (I + D)`.

    Args:
        weight: (rows, in), bfloat16, float16 or float32, contiguous in its last dimension.
        delta: (n, b, b) in float32.
        out: (rows, in), bfloat16 or float16; may be a slice of a fused matrix.
    """
    n, b, _ = delta.shape
    num_rows = len(weight)
    tile = padded(b)
    rows = 128 if tile <= 64 else 64
    processors = 4 if INTERPRETED else device_properties(weight.device.index).multi_processor_count
    groups = max(1, min(-(-num_rows // rows), processors * 4 // n))
    merge_kernel(
        (n, groups, 1),
        (weight, delta.contiguous(), out),
        num_rows,
        weight.stride(0),
        out.stride(0),
        b,
        tile,
        rows,
        weight.dtype != torch.bfloat16,
        INTERPRETED,
        num_warps=8 if tile > 64 else 4,
    )
