"""`x + x D_i^T` with another `D_i` for each row, as one Triton kernel: rows of many adapters in one batch.

Each program computes a tile of rows and of one block's columns, for one part of a fused layer. Rows are taken in the
order of their slots, and a tile holds rows of one slot alone: so a program reads one block and has nothing to wait for
in between. Which slot a program has is read on the device, and the grid depends on shapes alone, with programs to spare
for tiles that are not full: the launch can be captured in a CUDA graph.

Shapes: T rows, S parts, A slots, n blocks, b block size, K = n * b features; `o` and `i` index the rows and columns of
a block, `g` groups of rows: those without a slot, those of each slot, and what stands beyond the batch.
"""

import torch
import triton
import triton.language as tl

from .launches import evenly_spaced, padded
from .triton_dot import dot
from .triton_launch import INTERPRETED, Kernel


@triton.jit(do_not_specialize=["num_rows"])
def _gathered_kernel(
    x_ptr,
    delta_ptr,
    active_ptr,
    order_ptr,
    starts_ptr,
    y_ptr,
    num_rows,
    x_stride,
    slots: tl.constexpr,
    parts: tl.constexpr,
    n: tl.constexpr,
    b: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tiles: tl.constexpr = (b + TILE - 1) // TILE
    block = tl.program_id(0) // tiles
    o = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    part = tl.program_id(2)

    # the tiles of each group, one group after another: which one is this program's
    g = tl.arange(0, GROUPS)
    start_g = tl.load(starts_ptr + g - 1, (g >= 1) & (g <= slots + 1), 0)
    end_g = tl.load(starts_ptr + g, g <= slots, num_rows)
    tiles_g = tl.where(g <= slots + 1, (tl.maximum(end_g - start_g, 0) + ROWS - 1) // ROWS, 0)
    first_g = tl.cumsum(tiles_g, 0) - tiles_g
    tile = tl.program_id(1)
    own_g = (tile >= first_g) & (tile < first_g + tiles_g)
    slot = tl.sum(tl.where(own_g, g, 0), 0) - 1
    start = tl.sum(tl.where(own_g, start_g + (tile - first_g) * ROWS, 0), 0)
    end = tl.sum(tl.where(own_g, end_g, 0), 0)
    if start >= end:  # a program to spare
        return

    at = start + tl.arange(0, ROWS)
    r = tl.load(order_ptr + at, at < end, 0)
    in_rows = (at < end) & (r < num_rows)
    row = r.to(tl.int64)[:, None]
    x_ptr += block * b
    mask_ro = in_rows[:, None] & (o < b)[None, :]
    sum_ro = tl.load(x_ptr + row * x_stride + o[None, :], mask_ro, 0.0).to(tl.float32)
    if tl.load(active_ptr + slot * parts + part, (slot >= 0) & (slot < slots), 0) != 0:
        delta_ptr += ((slot * parts + part).to(tl.int64) * n + block) * (b * b)
        for first in range(0, b, TILE):
            i = first + tl.arange(0, TILE)
            x_ri = tl.load(x_ptr + row * x_stride + i[None, :], in_rows[:, None] & (i < b)[None, :], 0.0)
            mask_io = (i < b)[:, None] & (o < b)[None, :]
            delta_io = tl.load(delta_ptr + o[None, :] * b + i[:, None], mask_io, 0.0)
            sum_ro += dot(x_ri, delta_io.to(x_ptr.dtype.element_ty), INTERPRETED)
    y_ptr += part.to(tl.int64) * num_rows * (n * b) + block * b
    tl.store(y_ptr + row * (n * b) + o[None, :], sum_ro.to(y_ptr.dtype.element_ty), mask_ro)


gathered_kernel = Kernel(_gathered_kernel)


def launch_parameters(num_rows: int, b: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps of a program: the quickest on an H100 at b = 32 and 76."""
    tile = min(128, padded(b))
    if num_rows <= 256:
        return 16, tile, 4
    return (128, tile, 4) if b <= 64 else (32, tile, 2)


def run_gathered(
    x: torch.Tensor, delta: torch.Tensor, active: torch.Tensor, order: torch.Tensor, starts: torch.Tensor
) -> torch.Tensor:
    """As `gathered.gathered_transform`, whose arguments it takes: (S, T, K)."""
    slots, parts, n, b, _ = delta.shape
    num_rows = x.shape[0]
    y = torch.empty(parts, num_rows, n * b, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    x, x_stride = evenly_spaced(x, n * b)
    rows, tile, num_warps = launch_parameters(num_rows, b)
    spare = min(slots + 1, num_rows)  # a tile of each group may be less than full
    gathered_kernel(
        (n * -(-b // tile), -(-num_rows // rows) + spare, parts),
        (x, delta, active, order, starts, y),
        num_rows,
        x_stride,
        slots,
        parts,
        n,
        b,
        triton.next_power_of_2(slots + 2),
        tile,
        rows,
        INTERPRETED,
        num_warps=num_warps,
    )
    return y
