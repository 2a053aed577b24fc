"""`x + x blockdiag(D)^T` as Triton kernels, with gradients written by hand.

Forward reads `x` once and writes `y` once. Backward reads `x` and the incoming gradient `g` once and writes
`dx = g + g D` once; in the same pass each program sums its share of the rows of `dD = g^T x`, and a second, small
reduction adds the shares in a fixed order: no atomics, so that two runs give the same bits. Nothing is saved for the
backward pass but `x` and `D`.

Products accumulate in float32 and are rounded once; float32 operands are multiplied as three products of their TF32
halves, which keeps float32's digits on matrix units. Block sizes need not be powers of two: tiles are masked, and
blocks too large for one tile are split into several. Only the last dimension of `x` and `g` has to be contiguous and
their rows evenly spaced; anything else is copied first.

The launch parameters are a fixed function of block size, dtype and device, not autotuned: the number of shares sets the
order of the sum, so a choice by timing would change the gradients from run to run.

Shapes: T rows, n blocks, b block size, K = n * b features; `o` and `i` index the rows and columns of a block.
"""

import contextlib
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _dot(a, c, INTERPRETED: tl.constexpr):
    """`a @ c` summed in float32. The interpreter multiplies the bit patterns of bf16, so it gets float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), c.to(tl.float32))
    return tl.dot(a, c, input_precision="tf32x3")


@triton.jit
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
    num_blocks,
    b: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """`y = x + x D^T` for one tile of output columns of one block, over every `num_programs(1)`-th group of rows."""
    pid = tl.program_id(0)
    block = pid % num_blocks  # neighbouring programs read neighbouring columns of the same rows
    o = pid // num_blocks * TILE + tl.arange(0, TILE)
    i = tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    delta_ptr += block * delta_stride_n
    x_ptr += block * b
    y_ptr += block * b
    if b <= TILE:  # the whole block is one tile: D is read once
        delta_io = tl.load(
            delta_ptr + i[:, None] * delta_stride_i + o[None, :] * delta_stride_o,
            mask=(i < b)[:, None] & (o < b)[None, :],
            other=0.0,
        ).to(x_ptr.dtype.element_ty)
        for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
            mask = (r < num_rows - first)[:, None] & (i < b)[None, :]
            x_ri = tl.load(x_ptr + (first + r).to(tl.int64)[:, None] * x_stride + i[None, :], mask, 0.0)
            y_ro = x_ri.to(tl.float32) + _dot(x_ri, delta_io, INTERPRETED)
            y_rows = y_ptr + (first + r).to(tl.int64)[:, None] * y_stride + o[None, :]
            tl.store(y_rows, y_ro.to(y_ptr.dtype.element_ty), mask)
    else:
        for first in range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS):
            x_rows = x_ptr + (first + r).to(tl.int64)[:, None] * x_stride
            in_rows = (r < num_rows - first)[:, None]
            mask = in_rows & (o < b)[None, :]
            y_ro = tl.load(x_rows + o[None, :], mask, 0.0).to(tl.float32)
            for start in range(0, b, TILE):
                k = start + i
                x_rk = tl.load(x_rows + k[None, :], in_rows & (k < b)[None, :], 0.0)
                delta_ko = tl.load(
                    delta_ptr + k[:, None] * delta_stride_i + o[None, :] * delta_stride_o,
                    mask=(k < b)[:, None] & (o < b)[None, :],
                    other=0.0,
                ).to(x_ptr.dtype.element_ty)
                y_ro += _dot(x_rk, delta_ko, INTERPRETED)
            y_rows = y_ptr + (first + r).to(tl.int64)[:, None] * y_stride + o[None, :]
            tl.store(y_rows, y_ro.to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _gradient_kernel(
    g_ptr,
    x_ptr,
    delta_ptr,
    dx_ptr,
    partial_ptr,
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
    INTERPRETED: tl.constexpr,
    WITH_DX: tl.constexpr,
):
    """One share of `dD = g^T x` for one tile of one block; with WITH_DX (one tile a block) also `dx = g + g D`."""
    pid = tl.program_id(0)
    block = pid % num_blocks
    tiles: tl.constexpr = (b + TILE - 1) // TILE
    o = pid // num_blocks // tiles * TILE + tl.arange(0, TILE)
    i = pid // num_blocks % tiles * TILE + tl.arange(0, TILE)
    r = tl.arange(0, ROWS)
    g_ptr += block * b
    x_ptr += block * b
    dx_ptr += block * b
    block_mask = (o < b)[:, None] & (i < b)[None, :]
    if WITH_DX:
        delta_oi = tl.load(
            delta_ptr + block * delta_stride_n + o[:, None] * delta_stride_o + i[None, :] * delta_stride_i,
            mask=block_mask,
            other=0.0,
        ).to(g_ptr.dtype.element_ty)
    sum_oi = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        in_rows = (r < num_rows - first)[:, None]
        g_ro = tl.load(
            g_ptr + (first + r).to(tl.int64)[:, None] * g_stride + o[None, :], in_rows & (o < b)[None, :], 0.0
        )
        x_ri = tl.load(
            x_ptr + (first + r).to(tl.int64)[:, None] * x_stride + i[None, :], in_rows & (i < b)[None, :], 0.0
        )
        if WITH_DX:
            dx_ri = g_ro.to(tl.float32) + _dot(g_ro, delta_oi, INTERPRETED)
            dx_rows = dx_ptr + (first + r).to(tl.int64)[:, None] * dx_stride + i[None, :]
            tl.store(dx_rows, dx_ri.to(dx_ptr.dtype.element_ty), in_rows & (i < b)[None, :])
        sum_oi += _dot(tl.trans(g_ro), x_ri, INTERPRETED)
    # partial: (shares, n, b, b)
    share_ptr = partial_ptr + (tl.program_id(1) * num_blocks + block).to(tl.int64) * (b * b)
    tl.store(share_ptr + o[:, None] * b + i[None, :], sum_oi, mask=block_mask)


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
        processors = 4 if INTERPRETED else _processors(device.index)
        return max(1, min(triton.cdiv(num_rows, self.rows), processors * self.residents // programs))


_PROCESSORS: dict[int, int] = {}


def _processors(index: int) -> int:
    if index not in _PROCESSORS:
        _PROCESSORS[index] = torch.cuda.get_device_properties(index).multi_processor_count
    return _PROCESSORS[index]


def transform_launch(b: int, dtype: torch.dtype) -> Launch:
    tile = max(16, triton.next_power_of_2(b))
    if dtype == torch.float32:
        return Launch(min(tile, 64), rows=32, residents=4, warps=4, stages=1)
    if tile > 128:
        return Launch(32, rows=64, residents=8, warps=4, stages=1)
    return Launch(tile, rows=64, residents=4, warps=8 if tile > 64 else 4, stages=3)


def gradient_launch(b: int, dtype: torch.dtype) -> Launch:
    tile = max(16, triton.next_power_of_2(b))
    if dtype == torch.float32:
        return Launch(min(tile, 64), rows=32, residents=2, warps=4, stages=1)
    if tile > 128:
        return Launch(64, rows=64, residents=4, warps=4, stages=3)
    return Launch(tile, rows=64, residents=2, warps=8 if tile > 64 else 4, stages=3)


def _rows(x: torch.Tensor, num_features: int) -> torch.Tensor:
    """`x` (*, K) as (T, K) with contiguous rows: a view if its rows are evenly spaced, else a copy."""
    x_TK = x.reshape(-1, num_features)
    return x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def run_transform(x: torch.Tensor, delta: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    n, b, _ = delta.shape
    x_TK = _rows(x, n * b)
    y_TK = torch.empty_like(x_TK, memory_format=torch.contiguous_format)
    num_rows = len(x_TK)
    if num_rows:
        launch = launch or transform_launch(b, x.dtype)
        programs = n * triton.cdiv(b, launch.tile)
        with on_device(x.device):
            _transform_kernel[(programs, launch.shares(num_rows, programs, x.device))](
                x_TK,
                delta,
                y_TK,
                num_rows,
                x_TK.stride(0),
                y_TK.stride(0),
                *delta.stride(),
                n,
                b=b,
                TILE=launch.tile,
                ROWS=launch.rows,
                STAGES=launch.stages,
                INTERPRETED=INTERPRETED,
                num_warps=launch.warps,
            )
    return y_TK.view(x.shape)


def run_gradient(
    g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    n, b, _ = delta.shape
    launch = launch or gradient_launch(b, x.dtype)
    if with_dx and b > launch.tile:
        return run_transform(g, delta.mT), run_gradient(g, x, delta, False, launch)[1]
    g_TK, x_TK = _rows(g, n * b), _rows(x, n * b)
    num_rows = len(x_TK)
    dx_TK = torch.empty_like(g_TK, memory_format=torch.contiguous_format) if with_dx else g_TK.new_empty(0, n * b)
    if not num_rows:
        return dx_TK.view(x.shape) if with_dx else dx_TK, torch.zeros_like(delta)
    programs = n * triton.cdiv(b, launch.tile) ** 2
    shares = launch.shares(num_rows, programs, x.device)
    partial_snbb = torch.empty(shares, n, b, b, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        _gradient_kernel[(programs, shares)](
            g_TK,
            x_TK,
            delta,
            dx_TK,
            partial_snbb,
            num_rows,
            g_TK.stride(0),
            x_TK.stride(0),
            n * b,
            *delta.stride(),
            n,
            b=b,
            TILE=launch.tile,
            ROWS=launch.rows,
            STAGES=launch.stages,
            INTERPRETED=INTERPRETED,
            WITH_DX=with_dx,
            num_warps=launch.warps,
        )
    d_delta = partial_snbb[0] if shares == 1 else partial_snbb.sum(0)
    return dx_TK.view(x.shape) if with_dx else dx_TK, d_delta.to(delta.dtype)


@torch.library.custom_op("fura::block_transform", mutates_args=())
def block_transform(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`x + x blockdiag(delta)^T` for `x` (*, n * b) in bf16, fp16 or fp32 and `delta` (n, b, b) of any float dtype."""
    return run_transform(x, delta)


@torch.library.custom_op("fura::block_transform_backward", mutates_args=())
def block_transform_backward(
    g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dx` (empty unless `with_dx`) and `dD` for the gradient `g` of `block_transform(x, delta)`."""
    return run_gradient(g, x, delta, with_dx)


@block_transform.register_fake
def _(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@block_transform_backward.register_fake
def _(g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return g.new_empty(x.shape if with_dx else (0, x.shape[-1])), delta.new_empty(delta.shape)


def _save(ctx, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    x, delta = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, delta)


def _backward(ctx, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x, delta = ctx.saved_tensors
    need_dx, need_d_delta = ctx.needs_input_grad
    if not need_d_delta:
        return block_transform(g, delta.mT), None
    dx, d_delta = block_transform_backward(g, x, delta, need_dx)
    return dx if need_dx else None, d_delta


block_transform.register_autograd(_backward, setup_context=_save)
