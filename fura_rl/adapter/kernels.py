"""`x + x blockdiag(D)^T` as Triton kernels, with gradients written by hand.

Forward reads `x` once and writes `y` once. Backward reads `x` and the incoming gradient `g` once and writes
`dx = g + g D` once; in the same pass each program sums its share of the rows of `dD = g^T x`, and a second kernel
adds the shares in a fixed order: no atomics, so that two runs give the same bits. Nothing is saved for the
backward pass but `x` and `D`.

Products accumulate in float32 and are rounded once; float32 operands are multiplied as three products of their TF32
halves, which keeps float32's digits on matrix units. Block sizes need not be powers of two: tiles are masked. Only the
last dimension of `x` and `g` has to be contiguous and their rows evenly spaced; anything else is copied first.

The launch parameters are a fixed function of block size and dtype, measured on an H200 and not autotuned: the number of
shares sets the order of the sum, so a choice by timing would change the gradients from run to run.

Shapes: T rows, n blocks, b block size, K = n * b features; `o` and `i` index the rows and columns of a block.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=["num_rows"])
def _gradient_kernel(
    g_ptr,
    x_ptr,
    other_ptr,
    delta_ptr,
    dx_ptr,
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
    INTERPRETED: tl.constexpr,
):
    """One share of `dD = g^T x` for one tile of one block; with WITH_DX (one tile a block) also `dx = g + g D`.

    With PRODUCT the layer's input is `x * other`, which is multiplied and rounded here as it was in the forward pass.
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
    g_ptr += block * b
    x_ptr += block * b
    if PRODUCT:
        other_ptr += block * b
    sum_oi = tl.zeros((TILE, TILE), tl.float32)
    for first in tl.range(tl.program_id(1) * ROWS, num_rows, tl.num_programs(1) * ROWS, num_stages=STAGES):
        row = (first + r).to(tl.int64)[:, None]
        in_rows = (first + r < num_rows)[:, None]
        g_ro = tl.load(g_ptr + row * g_stride + o[None, :], in_rows & (o < b)[None, :], 0.0)
        x_ri = tl.load(x_ptr + row * x_stride + i[None, :], in_rows & (i < b)[None, :], 0.0)
        if PRODUCT:
            other_ri = tl.load(other_ptr + row * x_stride + i[None, :], in_rows & (i < b)[None, :], 0.0)
            x_ri = (x_ri.to(tl.float32) * other_ri.to(tl.float32)).to(x_ptr.dtype.element_ty)
        if WITH_DX:
            dx_ri = g_ro.to(tl.float32) + dot(g_ro, delta_oi, INTERPRETED)
            dx_rows = dx_ptr + row * dx_stride + i[None, :]
            tl.store(dx_rows, dx_ri.to(dx_ptr.dtype.element_ty), in_rows & (i < b)[None, :])
        sum_oi += dot(tl.trans(g_ro), x_ri, INTERPRETED)
    share_ptr += (tl.program_id(1) * num_blocks + block).to(tl.int64) * (b * b)  # (shares, n, b, b)
    tl.store(share_ptr + o[:, None] * b + i[None, :], sum_oi, mask=block_mask)


transform_kernel = Kernel(_transform_kernel)
gradient_kernel = Kernel(_gradient_kernel)


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
    launch = launch or gradient_launch(b, x.dtype)
    if with_dx and b > launch.tile:
        return run_transform(g, delta.mT), run_gradient_shares(g, x, delta, False, launch, other)[1]
    dx = torch.empty(x.shape if with_dx else (0, n * b), dtype=g.dtype, device=g.device)
    num_rows = x.numel() // (n * b)
    if num_rows == 0:
        return dx, torch.zeros(1, n, b, b, dtype=torch.float32, device=x.device)
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
        (g, x, other, delta, dx, shares_snbb),
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
        with_dx,
        other is not None,
        INTERPRETED,
        num_warps=launch.warps,
    )
    return dx, shares_snbb


def run_gradient(
    g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool, launch: Launch | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dx` (empty without `with_dx`) and `dD` (n, b, b) in float32."""
    dx, shares_snbb = run_gradient_shares(g, x, delta, with_dx, launch)
    return dx, shares_snbb[0] if len(shares_snbb) == 1 else shares_snbb.sum(0)


# PyTorch's view of it. The functions of `torch.library` that `custom_op` is made of: half its cost a call.
torch.library.define("fura::block_transform", "(Tensor x, Tensor delta) -> Tensor")
torch.library.define(
    "fura::block_transform_backward", "(Tensor g, Tensor x, Tensor delta, bool with_dx) -> (Tensor, Tensor)"
)
block_transform = torch.ops.fura.block_transform.default
block_transform_backward = torch.ops.fura.block_transform_backward.default


@torch.library.impl("fura::block_transform", ("cpu", "cuda"))
def _(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return run_transform(x, delta)


@torch.library.impl("fura::block_transform_backward", ("cpu", "cuda"))
def _(g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dx, d_delta = run_gradient(g, x, delta, with_dx)
    return dx, d_delta.to(delta.dtype)


@torch.library.register_fake("fura::block_transform")
def _(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("fura::block_transform_backward")
def _(g: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, with_dx: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return g.new_empty(x.shape if with_dx else (0, x.shape[-1])), delta.new_empty(delta.shape)


def _save(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    x, delta = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, delta)


def _backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x, delta = ctx.saved_tensors
    need_dx, need_d_delta = ctx.needs_input_grad
    if not need_d_delta:
        return block_transform(g, delta.mT), None
    dx, d_delta = block_transform_backward(g, x, delta, need_dx)
    return dx if need_dx else None, d_delta


torch.library.register_autograd("fura::block_transform", _backward, setup_context=_save)
