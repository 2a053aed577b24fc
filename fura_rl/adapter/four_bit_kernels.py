"""`W M` of a weight that bitsandbytes stores in 4 bits, as a Triton kernel that reads the codes.

A layer on such a base dequantises its weight in each pass anyway. Multiplying it by `M` while it is in registers moves
no further byte, where multiplying the input moves each of its numbers twice.

With double quantisation hardly any code's value is a number of the result's dtype, so that rounding the product does
not drop small `D`: over many weights the roundings average out. (Those of a weight in bf16 do not: there a `D` below
half the distance of its neighbours would have no effect at all. Nor do all of codes whose scales are bf16 numbers.)

Shapes: W (out, in) with in = n * b, n blocks, b block size; `r` indexes rows, `o` and `k` the features of a block.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launches import Launch, padded
from .triton_dot import dot
from .triton_launch import INTERPRETED, Kernel

LARGEST_BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def _merged_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    delta_ptr,
    merged_ptr,
    num_rows,
    num_features,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`W + W D` for one block of columns, over every `num_programs(1)`-th group of rows.

    With ALIGNED a block is one tile, and each of its rows is a whole number of groups or lies in one.
    """
    block = tl.program_id(0)
    r = tl.arange(0, ROWS)
    o = tl.arange(0, TILE)
    delta_ok = tl.load(
        delta_ptr + block * b * b + o[:, None] * b + o[None, :], (o < b)[:, None] & (o < b)[None, :], 0.0
    )
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=1):
        in_rows = (first + r < num_rows)[:, None]
        mask = in_rows & (o < b)[None, :]
        start = (first + r).to(tl.int64)[:, None] * num_features + block * b
        entry = start + o[None, :]
        if ALIGNED:  # of two codes the first is in the upper half of their byte
            byte = tl.load(packed_ptr + start // 2 + tl.arange(0, TILE // 2)[None, :], in_rows, 0).to(tl.int32)
            value = tl.interleave(tl.load(code_ptr + (byte >> 4)), tl.load(code_ptr + (byte & 15)))
            groups: tl.constexpr = (TILE + GROUP - 1) // GROUP
            absmax = tl.load(absmax_ptr + start // GROUP + tl.arange(0, groups)[None, :], in_rows, 0.0)
            w_ro = tl.reshape(tl.reshape(value, (ROWS, groups, TILE // groups)) * absmax[:, :, None], (ROWS, TILE))
        else:
            byte = tl.load(packed_ptr + entry // 2, mask, 0).to(tl.int32)
            code = (byte >> ((1 - entry % 2) * 4).to(tl.int32)) & 15
            w_ro = tl.load(code_ptr + code) * tl.load(absmax_ptr + entry // GROUP, mask, 0.0)
        merged_rk = w_ro + dot(w_ro.to(delta_ptr.dtype.element_ty), delta_ok, INTERPRETED)
        tl.store(merged_ptr + entry, merged_rk.to(merged_ptr.dtype.element_ty), mask)


merged_kernel = Kernel(_merged_kernel)


def launch_of(b: int) -> Launch:
    return Launch(padded(b), rows=64, residents=8 if b > 64 else 4, warps=4, stages=1)


def absmax_of(state: Any) -> torch.Tensor:
    """The scale of each group of codes in float32, from a `QuantState` whose scales may be quantised themselves."""
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float() if state.nested else state.absmax


def run_merged(packed: torch.Tensor, state: Any, delta: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    """`W (I + D)` of 4-bit codes.

    Args:
        packed: two codes a byte, of `W` row by row.
        state: bitsandbytes' `QuantState` of `W`.
        delta: (n, b, b), contiguous, in the dtype of the result.

    Returns:
        (out, in), computed in float32 and rounded once.
    """
    n, b, _ = delta.shape
    num_rows, num_features = state.shape
    launch = launch or launch_of(b)
    aligned = b == launch.tile and num_features % max(b, state.blocksize) == 0  # both are powers of two then
    merged = torch.empty(num_rows, num_features, dtype=delta.dtype, device=delta.device)
    merged_kernel(
        (n, launch.shares(num_rows, n, delta.device), 1),
        (packed, absmax_of(state), state.code, delta, merged),
        num_rows,
        num_features,
        b,
        launch.tile,
        launch.rows,
        state.blocksize,
        aligned,
        INTERPRETED,
        num_warps=launch.warps,
    )
    return merged
