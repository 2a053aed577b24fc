"""`x + x blockdiag(D)^T` as a Triton kernel that reads `x` once and writes `y` once.

Products accumulate in float32 and are rounded once; float32 operands are multiplied as three products of their TF32
halves, which keeps float32's digits on matrix units. Block sizes need not be powers of two: tiles are masked. Only the
last dimension of `x` has to be contiguous and its rows evenly spaced; anything else is copied first.

Shapes: T rows, n blocks, b block size, K = n * b features; `o` and `i` index the rows and columns of a block.
"""

import torch
import triton
import triton.language as tl

from .launches import Launch, evenly_spaced, transform_launch
from .triton_dot import dot
from .triton_launch import INTERPRETED, Kernel
from .wide_kernels import FIRST, rest, wide_transform_kernel


@triton.jit(do_not_specialize=["num_rows"])
def _transform_kernel(
    x_ptr,
    delta_ptr,
    y_ptr,
    num_rows,
    x_stride,
    y_stride,
    delta_stride_n,
    delta_stride_o,
    delta_stride_i,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`y = x + x D^T` for one block, over every `num_programs(1)`-th group of rows."""
    block = tl.program_id(0)  # neighbouring programs read neighbouring columns of the same rows
    r = tl.arange(0, ROWS)
    i = tl.arange(0, TILE)
    delta_io = tl.load(
        delta_ptr + block * delta_stride_n + i[:, None] * delta_stride_i + i[None, :] * delta_stride_o,
        mask=(i < b)[:, None] & (i < b)[None, :],
        other=0.0,
    ).to(x_ptr.dtype.element_ty)
    x_ptr += block * b
    y_ptr += block * b
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = (first + r).to(tl.int64)[:, None]
        mask = (first + r < num_rows)[:, None] & (i < b)[None, :]
        x_ri = tl.load(x_ptr + row * x_stride + i[None, :], mask, 0.0)
        y_ro = x_ri.to(tl.float32) + dot(x_ri, delta_io, INTERPRETED)
        tl.store(y_ptr + row * y_stride + i[None, :], y_ro.to(y_ptr.dtype.element_ty), mask)


transform_kernel = Kernel(_transform_kernel)


def run_transform(x: torch.Tensor, delta: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    n, b, _ = delta.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_rows = x.numel() // (n * b)
    if num_rows == 0:
        return y
    launch = launch or transform_launch(b, x.dtype)
    x, x_stride = evenly_spaced(x, n * b)
    kernel, tiles = transform_kernel, [launch.tile]
    if b > FIRST:
        kernel, tiles = wide_transform_kernel, [FIRST, rest(b)]
    kernel(
        (n, launch.shares(num_rows, n, x.device), 1),
        (x, delta, y),
        num_rows,
        x_stride,
        n * b,
        *delta.stride(),
        b,
        *tiles,
        launch.rows,
        launch.stages,
        INTERPRETED,
        num_warps=launch.warps,
    )
    return y
