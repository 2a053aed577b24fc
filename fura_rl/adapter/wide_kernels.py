"""The transform of blocks of 129 to 256: a tile of 128 and one for the rest.

Triton's tiles are powers of two. A block of 148 (Qwen2.5-7B's `down_proj`) in one tile of 256 wastes two thirds of the
arithmetic; cut into 128 + 32 it wastes a seventh. The four parts of `D` stay in shared memory while a program walks
down the rows. The same division of the gradient, with its four sums, spills registers and is slower than
dividing a block among programs.

Shapes as in `kernels.py`; `1` and `2` name the two parts of a block.
"""

import triton
import triton.language as tl

from .triton_dot import dot
from .triton_launch import Kernel

FIRST = 128


@triton.jit
def _part(delta_ptr, rows, columns, row_stride, column_stride, b: tl.constexpr):
    mask = (rows < b)[:, None] & (columns < b)[None, :]
    return tl.load(delta_ptr + rows[:, None] * row_stride + columns[None, :] * column_stride, mask, 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _wide_transform_kernel(
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
    TILE1: tl.constexpr,
    TILE2: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`y = x + x D^T` for one block, over every `num_programs(1)`-th group of rows."""
    block = tl.program_id(0)
    r = tl.arange(0, ROWS)
    k1 = tl.arange(0, TILE1)
    k2 = TILE1 + tl.arange(0, TILE2)
    delta_ptr += block * delta_stride_n
    dtype = x_ptr.dtype.element_ty
    d11 = _part(delta_ptr, k1, k1, delta_stride_i, delta_stride_o, b).to(dtype)  # (i, o)
    d12 = _part(delta_ptr, k1, k2, delta_stride_i, delta_stride_o, b).to(dtype)
    d21 = _part(delta_ptr, k2, k1, delta_stride_i, delta_stride_o, b).to(dtype)
    d22 = _part(delta_ptr, k2, k2, delta_stride_i, delta_stride_o, b).to(dtype)
    x_ptr += block * b
    y_ptr += block * b
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = (first + r).to(tl.int64)[:, None]
        mask1 = (first + r < num_rows)[:, None] & (k1 < b)[None, :]
        mask2 = (first + r < num_rows)[:, None] & (k2 < b)[None, :]
        x1 = tl.load(x_ptr + row * x_stride + k1[None, :], mask1, 0.0)
        x2 = tl.load(x_ptr + row * x_stride + k2[None, :], mask2, 0.0)
        y1 = x1.to(tl.float32) + dot(x1, d11, INTERPRETED) + dot(x2, d21, INTERPRETED)
        y2 = x2.to(tl.float32) + dot(x1, d12, INTERPRETED) + dot(x2, d22, INTERPRETED)
        tl.store(y_ptr + row * y_stride + k1[None, :], y1.to(dtype), mask1)
        tl.store(y_ptr + row * y_stride + k2[None, :], y2.to(dtype), mask2)


wide_transform_kernel = Kernel(_wide_transform_kernel)


def rest(b: int) -> int:
    """The tile for what a tile of 128 leaves of a block: a power of two, and what matrix units need at least."""
    return max(16, 1 << (b - FIRST - 1).bit_length())
