"""The gradient of `x + x blockdiag(D)^T` as a Triton kernel.

It reads `x` and the incoming gradient `g` once and writes `dx = g + g D` once; in the same pass each program sums its
share of the rows of `dD = g^T x`. Whoever needs `dD` adds the shares in a fixed order: no atomics, so that two runs
give the same bits. Nothing is saved for the backward pass but `x` and `D`.

`x` may also be given as two factors that are kept anyway, `x = left * right`, or as `gate` and `up` of
`x = silu(gate) * up`. Of the latter the gradients are computed in the same pass, as SwiGLU's are:

    d_up = dx silu(gate),    d_gate = dx up s (1 + gate (1 - s))    with s = sigmoid(gate).

Precision, block sizes, strides and shapes as in `kernels.py`.
"""

import torch
import triton
import triton.language as tl

from .kernels import run_transform
from .launches import Launch, evenly_spaced, gated_launch, gradient_launch, product_launch
from .triton_dot import dot
from .triton_launch import INTERPRETED, Kernel


@triton.jit(do_not_specialize=["num_rows"])
def _gradient_kernel(
    g_ptr,
    x_ptr,
    other_ptr,
    delta_ptr,
    dx_ptr,
    d_other_ptr,
    share_ptr,
    num_rows,
    g_stride,
    x_stride,
    dx_stride,
    delta_stride_n,
    delta_stride_o,
    delta_stride_i,
    num_blocks,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_DX: tl.constexpr,
    PRODUCT: tl.constexpr,
    GATED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One share of `dD = g^T x` for one tile of one block; with WITH_DX (one tile a block) also `dx = g + g D`.

    With PRODUCT the layer's input is `x * other`, with GATED `silu(x) * other`, computed again and rounded at the
    same places as in the forward pass; with GATED the gradients written are those of `x` and `other`.
    """
    block = tl.program_id(0) % num_blocks
    tile = tl.program_id(0) // num_blocks
    tiles: tl.constexpr = (b + TILE - 1) // TILE
    o = tile // tiles * TILE + tl.arange(0, TILE)
    i = tile % tiles * TILE + tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    block_mask = (o < b)[:, None] & (i < b)[None, :]
    if WITH_DX:
        delta_oi = tl.load(
            delta_ptr + block * delta_stride_n + o[:, None] * delta_stride_o + i[None, :] * delta_stride_i,
            mask=block_mask,
            other=0.0,
        ).to(g_ptr.dtype.element_ty)
        dx_ptr += block * b
    if GATED:
        d_other_ptr += block * b
    g_ptr += block * b
    x_ptr += block * b
    if PRODUCT or GATED:
        other_ptr += block * b
    sum_oi = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = (first + r).to(tl.int64)[:, None]
        in_rows = (first + r < num_rows)[:, None]
        g_ro = tl.load(g_ptr + row * g_stride + o[None, :], in_rows & (o < b)[None, :], 0.0)
        x_ri = tl.load(x_ptr + row * x_stride + i[None, :], in_rows & (i < b)[None, :], 0.0)
        if PRODUCT or GATED:
            other_ri = tl.load(other_ptr + row * x_stride + i[None, :], in_rows & (i < b)[None, :], 0.0)
        if WITH_DX:
            dx_ri = g_ro.to(tl.float32) + dot(g_ro, delta_oi, INTERPRETED)
            out_ri = row * dx_stride + i[None, :]
            out_mask = in_rows & (i < b)[None, :]
            if GATED:
                gate_ri = x_ri.to(tl.float32)
                sigmoid_ri = 1.0 / (1.0 + tl.exp(-gate_ri))
                x_ri = (gate_ri * sigmoid_ri).to(x_ptr.dtype.element_ty)
                d_other_ri = dx_ri * x_ri.to(tl.float32)
                tl.store(d_other_ptr + out_ri, d_other_ri.to(d_other_ptr.dtype.element_ty), out_mask)
                dx_ri *= other_ri.to(tl.float32) * sigmoid_ri * (1.0 + gate_ri * (1.0 - sigmoid_ri))
            tl.store(dx_ptr + out_ri, dx_ri.to(dx_ptr.dtype.element_ty), out_mask)
        if PRODUCT or GATED:
            x_ri = (x_ri.to(tl.float32) * other_ri.to(tl.float32)).to(x_ptr.dtype.element_ty)
        sum_oi += dot(tl.trans(g_ro), x_ri, INTERPRETED)
    share_ptr += (tl.program_id(1) * num_blocks + block).to(tl.int64) * (b * b)  # (shares, n, b, b)
    tl.store(share_ptr + o[:, None] * b + i[None, :], sum_oi, mask=block_mask)


gradient_kernel = Kernel(_gradient_kernel)


def run_gradient_shares(
    g: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    with_dx: bool,
    launch: Launch | None = None,
    other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dx` (empty without `with_dx`) and shares of `dD` (shares, n, b, b) in float32, to be added up in their order.

    With `other` the layer's input was `x * other`.
    """
    n, b, _ = delta.shape
    if launch is None:
        launch = gradient_launch(b, x.dtype) if other is None else product_launch(b, x.dtype, x.device)
    if with_dx and b > launch.tile:
        return run_transform(g, delta.mT), _run(g, x, other, delta, None, None, launch)
    dx = torch.empty(x.shape if with_dx else (0, n * b), dtype=g.dtype, device=g.device)
    return dx, _run(g, x, other, delta, dx if with_dx else None, None, launch)


def run_gated_gradient_shares(
    g: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, delta: torch.Tensor, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `gate` and `up` (*, n * b), and shares of `dD`, where the layer's input was `silu(gate) * up`.

    Blocks have one tile: see `can_gate`.
    """
    d_gate, d_up = (torch.empty(gate.shape, dtype=g.dtype, device=g.device) for _ in range(2))
    n, b, _ = delta.shape
    launch = launch or gated_launch(n, b, gate.dtype, gate.device)
    return d_gate, d_up, _run(g, gate, up, delta, d_gate, d_up, launch)


def _run(
    g: torch.Tensor,
    x: torch.Tensor,
    other: torch.Tensor | None,
    delta: torch.Tensor,
    dx: torch.Tensor | None,
    d_other: torch.Tensor | None,
    launch: Launch,
) -> torch.Tensor:
    """Fills `dx` and `d_other`, which are contiguous, where they are wanted; returns the shares of `dD`."""
    n, b, _ = delta.shape
    num_rows = x.numel() // (n * b)
    if num_rows == 0:
        return torch.zeros(1, n, b, b, dtype=torch.float32, device=x.device)
    g, g_stride = evenly_spaced(g, n * b)
    x, x_stride = evenly_spaced(x, n * b)
    if other is not None:
        other, other_stride = evenly_spaced(other, n * b)
        if other_stride != x_stride:
            x, other, x_stride = x.contiguous(), other.contiguous(), n * b
    programs = n * (-(-b // launch.tile)) ** 2
    shares = launch.shares(num_rows, programs, x.device)
    shares_snbb = torch.empty(shares, n, b, b, dtype=torch.float32, device=x.device)
    gradient_kernel(
        (programs, shares, 1),
        (g, x, other, delta, dx, d_other, shares_snbb),
        num_rows,
        g_stride,
        x_stride,
        n * b,
        *delta.stride(),
        n,
        b,
        launch.tile,
        launch.rows,
        launch.stages,
        dx is not None,
        other is not None and d_other is None,
        d_other is not None,
        INTERPRETED,
        num_warps=launch.warps,
    )
    return shares_snbb


def run_gradient(
    g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dx` (empty without `with_dx`) and `dD` (n, b, b) in float32."""
    dx, shares_snbb = run_gradient_shares(g, x, delta, with_dx, launch)
    return dx, shares_snbb[0] if len(shares_snbb) == 1 else shares_snbb.sum(0)
