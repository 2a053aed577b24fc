"""Several adapters on one input: `y_k = x + x blockdiag(D_k)^T` for two or three `D_k`, as Triton kernels.

`q`, `k` and `v`, and `gate` and `up`, read the same `x`. One pass reads it once for all of them; one backward pass
reads `x` once and each incoming gradient once, and writes the one `dx` that autograd would otherwise add up from two or
three tensors. With three outputs that is 4 units of bytes forward instead of 6, and 5 backward instead of 15. `dx` is
summed in float32 and rounded once.

Shapes: T rows, n blocks, b block size, K = n * b features, c = 2 or 3 adapters; `o` and `i` index rows and columns of a
block.
"""

import torch
import triton
import triton.language as tl

from .launches import Launch, evenly_spaced, is_roomy, padded
from .triton_dot import dot
from .triton_launch import INTERPRETED, Kernel

LARGEST_BLOCK = 64  # wider ones: sums of three gradients do not fit into registers


@triton.jit
def _delta_tile(
    delta_ptr, index, block, num_blocks, rows, columns, b: tl.constexpr, ROW: tl.constexpr, COL: tl.constexpr
):
    """Block `block` of adapter `index` of (c, n, b, b), transposed where ROW is 1 and COL is b."""
    return tl.load(
        delta_ptr + (index * num_blocks + block) * (b * b) + rows[:, None] * ROW + columns[None, :] * COL,
        mask=(rows < b)[:, None] & (columns < b)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _shared_transform_kernel(
    x_ptr,
    delta_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    num_rows,
    x_stride,
    y_stride,
    num_blocks,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    COUNT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """All outputs of one block, over every `num_programs(1)`-th group of rows."""
    block = tl.program_id(0)
    r = tl.arange(0, ROWS)
    i = tl.arange(0, TILE)
    delta0_io = _delta_tile(delta_ptr, 0, block, num_blocks, i, i, b, 1, b)
    delta1_io = _delta_tile(delta_ptr, 1, block, num_blocks, i, i, b, 1, b)
    if COUNT == 3:
        delta2_io = _delta_tile(delta_ptr, 2, block, num_blocks, i, i, b, 1, b)
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = (first + r).to(tl.int64)[:, None]
        mask = (first + r < num_rows)[:, None] & (i < b)[None, :]
        columns = block * b + i[None, :]
        x_ri = tl.load(x_ptr + row * x_stride + columns, mask, 0.0)
        wide_ri = x_ri.to(tl.float32)
        out = row * y_stride + columns
        dtype = y0_ptr.dtype.element_ty
        tl.store(y0_ptr + out, (wide_ri + dot(x_ri, delta0_io, INTERPRETED)).to(dtype), mask)
        tl.store(y1_ptr + out, (wide_ri + dot(x_ri, delta1_io, INTERPRETED)).to(dtype), mask)
        if COUNT == 3:
            tl.store(y2_ptr + out, (wide_ri + dot(x_ri, delta2_io, INTERPRETED)).to(dtype), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _shared_gradient_kernel(
    x_ptr,
    g0_ptr,
    g1_ptr,
    g2_ptr,
    delta_ptr,
    dx_ptr,
    share_ptr,
    num_rows,
    x_stride,
    g_stride,
    num_blocks,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    COUNT: tl.constexpr,
    WITH_DX: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One share of every `dD_k = g_k^T x` of one block, and `dx = sum_k g_k + g_k D_k` of its rows."""
    block = tl.program_id(0)
    r = tl.arange(0, ROWS)
    i = tl.arange(0, TILE)
    if WITH_DX:
        delta0_oi = _delta_tile(delta_ptr, 0, block, num_blocks, i, i, b, b, 1)
        delta1_oi = _delta_tile(delta_ptr, 1, block, num_blocks, i, i, b, b, 1)
        if COUNT == 3:
            delta2_oi = _delta_tile(delta_ptr, 2, block, num_blocks, i, i, b, b, 1)
    sum0_oi = tl.zeros((TILE, TILE), tl.float32)
    sum1_oi = tl.zeros((TILE, TILE), tl.float32)
    sum2_oi = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = (first + r).to(tl.int64)[:, None]
        mask = (first + r < num_rows)[:, None] & (i < b)[None, :]
        columns = block * b + i[None, :]
        x_ri = tl.load(x_ptr + row * x_stride + columns, mask, 0.0)
        g0_ro = tl.load(g0_ptr + row * g_stride + columns, mask, 0.0)
        g1_ro = tl.load(g1_ptr + row * g_stride + columns, mask, 0.0)
        sum0_oi += dot(tl.trans(g0_ro), x_ri, INTERPRETED)
        sum1_oi += dot(tl.trans(g1_ro), x_ri, INTERPRETED)
        if COUNT == 3:
            g2_ro = tl.load(g2_ptr + row * g_stride + columns, mask, 0.0)
            sum2_oi += dot(tl.trans(g2_ro), x_ri, INTERPRETED)
        if WITH_DX:
            dx_ri = g0_ro.to(tl.float32) + g1_ro.to(tl.float32)
            dx_ri += dot(g0_ro, delta0_oi, INTERPRETED) + dot(g1_ro, delta1_oi, INTERPRETED)
            if COUNT == 3:
                dx_ri += g2_ro.to(tl.float32) + dot(g2_ro, delta2_oi, INTERPRETED)
            tl.store(dx_ptr + row * (num_blocks * b) + columns, dx_ri.to(dx_ptr.dtype.element_ty), mask)
    # (shares, c, n, b, b)
    share_ptr += ((tl.program_id(1) * COUNT).to(tl.int64) * num_blocks + block) * (b * b)
    share_oi = share_ptr + i[:, None] * b + i[None, :]
    mask = (i < b)[:, None] & (i < b)[None, :]
    tl.store(share_oi, sum0_oi, mask)
    tl.store(share_oi + num_blocks * (b * b), sum1_oi, mask)
    if COUNT == 3:
        tl.store(share_oi + 2 * num_blocks * (b * b), sum2_oi, mask)


shared_transform_kernel = Kernel(_shared_transform_kernel)
shared_gradient_kernel = Kernel(_shared_gradient_kernel)


def supports(b: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for several adapters of such blocks. Those for float32 ask for much shared memory."""
    return b <= (LARGEST_BLOCK if dtype != torch.float32 or is_roomy(device) else LARGEST_BLOCK // 2)


def transform_launch(b: int) -> Launch:
    tile = padded(b)
    return Launch(tile, rows=128, residents=4, warps=8 if tile == 64 else 4, stages=3)


def gradient_launch(b: int, count: int) -> Launch:
    tile = padded(b)
    return Launch(tile, rows=64, residents=2 if count == 2 else 1, warps=4, stages=3)


def run_shared_transform(x: torch.Tensor, delta_cnbb: torch.Tensor, launch: Launch | None = None) -> list[torch.Tensor]:
    """`x + x D_k^T` for each `D_k` of (c, n, b, b), contiguous and of the dtype of `x`."""
    count, n, b, _ = delta_cnbb.shape
    outputs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(count)]
    num_rows = x.numel() // (n * b)
    if num_rows == 0:
        return outputs
    launch = launch or transform_launch(b)
    x, x_stride = evenly_spaced(x, n * b)
    shared_transform_kernel(
        (n, launch.shares(num_rows, n, x.device), 1),
        (x, delta_cnbb, *outputs, *[None] * (3 - count)),
        num_rows,
        x_stride,
        n * b,
        n,
        b,
        launch.tile,
        launch.rows,
        launch.stages,
        count,
        INTERPRETED,
        num_warps=launch.warps,
    )
    return outputs


def run_shared_gradient_shares(
    gradients: list[torch.Tensor],
    x: torch.Tensor,
    delta_cnbb: torch.Tensor,
    with_dx: bool,
    launch: Launch | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """`dx` (None without `with_dx`) and shares of every `dD` (shares, c, n, b, b) in float32, to be added in order."""
    count, n, b, _ = delta_cnbb.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if with_dx else None
    num_rows = x.numel() // (n * b)
    if num_rows == 0:
        return dx, torch.zeros(1, *delta_cnbb.shape, dtype=torch.float32, device=x.device)
    launch = launch or gradient_launch(b, count)
    x, x_stride = evenly_spaced(x, n * b)
    gradients = [g.contiguous() for g in gradients]
    shares = launch.shares(num_rows, n, x.device)
    shares_scnbb = torch.empty(shares, *delta_cnbb.shape, dtype=torch.float32, device=x.device)
    shared_gradient_kernel(
        (n, shares, 1),
        (x, *gradients, *[None] * (3 - count), delta_cnbb, dx, shares_scnbb),
        num_rows,
        x_stride,
        n * b,
        n,
        b,
        launch.tile,
        launch.rows,
        launch.stages,
        count,
        with_dx,
        INTERPRETED,
        num_warps=launch.warps,
    )
    return dx, shares_scnbb
