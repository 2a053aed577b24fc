"""`x + x D_i^T` with another `D_i` for each row, as one Triton kernel: rows of many adapters in one batch.

Each program computes a tile of rows and of one block's columns, for one part of a fused layer. It walks through the
slots that occur among its rows, in ascending order, and adds for each the product of that slot's rows; other rows count
as zero, so a row's result does not depend on its neighbours. Taking rows in the order of their slots leaves a tile few
slots to walk through: of 128 rows with 16 adapters in turn, a tile of 16 meets 2 or 3 instead of 16. Which slots occur
is read on the device, and the grid depends on shapes alone: the launch can be captured in a CUDA graph.

Shapes: T rows, S parts, n blocks, b block size, K = n * b features; `o` and `i` index the rows and columns of a block.
"""

import torch
import triton
import triton.language as tl

from .kernels import evenly_spaced, padded
from .triton_dot import dot
from .triton_launch import INTERPRETED, Kernel


@triton.jit(do_not_specialize=["num_rows"])
def _gathered_kernel(
    x_ptr,
    delta_ptr,
    active_ptr,
    ids_ptr,
    order_ptr,
    y_ptr,
    num_rows,
    x_stride,
    slots: tl.constexpr,
    parts: tl.constexpr,
    n: tl.constexpr,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    SORTED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tiles: tl.constexpr = (b + TILE - 1) // TILE
    block = tl.program_id(0) // tiles
    o = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    in_rows = r < num_rows
    if SORTED:
        r = tl.load(order_ptr + r, in_rows, 0)
    row = r.to(tl.int64)[:, None]
    # what stands beyond the batch in a captured graph's padding, or -1: no slot
    id_r = tl.load(ids_ptr + r, in_rows, -1)
    id_r = tl.where((id_r >= 0) & (id_r < slots), id_r, slots)
    x_ptr += block * b
    mask_ro = in_rows[:, None] & (o < b)[None, :]
    sum_ro = tl.load(x_ptr + row * x_stride + o[None, :], mask_ro, 0.0).to(tl.float32)
    slot = tl.min(id_r, 0)
    while slot < slots:
        if tl.load(active_ptr + slot * parts + part) != 0:
            own_r = id_r == slot
            slot_ptr = delta_ptr + ((slot * parts + part).to(tl.int64) * n + block) * (b * b)
            for first in range(0, b, TILE):
                i = first + tl.arange(0, TILE)
                x_ri = tl.load(x_ptr + row * x_stride + i[None, :], own_r[:, None] & (i < b)[None, :], 0.0)
                mask_io = (i < b)[:, None] & (o < b)[None, :]
                delta_io = tl.load(slot_ptr + o[None, :] * b + i[:, None], mask_io, 0.0)
                sum_ro += dot(x_ri, delta_io.to(x_ptr.dtype.element_ty), INTERPRETED)
        slot = tl.min(tl.where(id_r > slot, id_r, slots), 0)
    y_ptr += part.to(tl.int64) * num_rows * (n * b) + block * b
    tl.store(y_ptr + row * (n * b) + o[None, :], sum_ro.to(y_ptr.dtype.element_ty), mask_ro)


gathered_kernel = Kernel(_gathered_kernel)


def run_gathered(
    x: torch.Tensor, delta: torch.Tensor, active: torch.Tensor, ids: torch.Tensor, order: torch.Tensor | None
) -> torch.Tensor:
    """As `gathered.gathered_transform`, whose arguments it takes: (S, T, K)."""
    slots, parts, n, b, _ = delta.shape
    num_rows = x.shape[0]
    y = torch.empty(parts, num_rows, n * b, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    x, x_stride = evenly_spaced(x, n * b)
    tile = min(64, padded(b))
    rows = 16 if num_rows <= 256 else 64
    gathered_kernel(
        (n * -(-b // tile), -(-num_rows // rows), parts),
        (x, delta, active, ids, order, y),
        num_rows,
        x_stride,
        slots,
        parts,
        n,
        b,
        tile,
        rows,
        order is not None,
        INTERPRETED,
        num_warps=4,
    )
    return y
