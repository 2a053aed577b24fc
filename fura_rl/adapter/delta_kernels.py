"""`D = M - I` from an adapter's trained tensors in one launch, its gradients in another.

With `t = ds / sigma` (scaling rows) and `E = diag(1 + t) dR + diag(t) V^T`, `D = V E`. Written out in torch this is
about eight small launches forward and fifteen backward for each layer; here it is one each, and no intermediate is
kept: both read the trained tensors and the frozen basis alone. Products and sums are in float32.

Shapes: n blocks, b block size. `V` and `D` have rows `o`, `dR` and `E` rows `i`; `D`, `dR` and `E` have columns `k`.
"""

import torch
import triton
import triton.language as tl

from .kernels import on_device

TILE = 32


@triton.jit
def _factors(
    scale_ptr,
    sigma_ptr,
    block,
    i,
    b: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    MERGED: tl.constexpr,
):
    """For rows `i` of a block: the factor of `dR`, the factor `t` of `V^T`, and `1 / sigma`."""
    inverse_i = tl.full(i.shape, 1.0, tl.float32)
    if HAS_SIGMA:
        inverse_i = 1.0 / tl.load(sigma_ptr + block * b + i, i < b, 1.0)
    t_i = tl.zeros(i.shape, tl.float32)
    core_factor_i = 1.0 + t_i
    if HAS_SCALE:
        t_i = tl.load(scale_ptr + block * b + i, i < b, 0.0) * inverse_i
        core_factor_i = 1.0 + t_i
    if MERGED:
        core_factor_i = inverse_i
    return core_factor_i, t_i, inverse_i


@triton.jit
def _delta_kernel(
    basis_ptr,
    sigma_ptr,
    core_ptr,
    scale_ptr,
    delta_ptr,
    core_stride_i,
    core_stride_k,
    b: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    MERGED: tl.constexpr,
):
    """A tile of columns of `D = V E`."""
    block = tl.program_id(0)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o = tl.arange(0, PADDED)
    basis_ptr += block * b * b
    core_ptr += block * b * b
    sum_ok = tl.zeros((PADDED, TILE), tl.float32)
    for start in range(0, b, TILE):
        i = start + tl.arange(0, TILE)
        mask = (i < b)[:, None] & (k < b)[None, :]
        core_factor_i, t_i, _ = _factors(scale_ptr, sigma_ptr, block, i, b, HAS_SCALE, HAS_SIGMA, MERGED)
        e_ik = tl.load(core_ptr + i[:, None] * core_stride_i + k[None, :] * core_stride_k, mask, 0.0)
        e_ik *= core_factor_i[:, None]
        if HAS_SCALE:
            e_ik += t_i[:, None] * tl.load(basis_ptr + k[None, :] * b + i[:, None], mask, 0.0)
        basis_oi = tl.load(basis_ptr + o[:, None] * b + i[None, :], (o < b)[:, None] & (i < b)[None, :], 0.0)
        sum_ok += tl.dot(basis_oi, e_ik, input_precision="ieee")
    mask = (o < b)[:, None] & (k < b)[None, :]
    tl.store(delta_ptr + block * b * b + o[:, None] * b + k[None, :], sum_ok, mask)


@triton.jit
def _delta_gradient_kernel(
    basis_ptr,
    sigma_ptr,
    core_ptr,
    scale_ptr,
    d_delta_ptr,
    d_core_ptr,
    d_scale_ptr,
    core_stride_i,
    core_stride_k,
    d_delta_stride_n,
    d_delta_stride_o,
    d_delta_stride_k,
    b: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    MERGED: tl.constexpr,
):
    """A tile of rows of the gradient of `dR`, and of that of `ds`, by way of `dE = V^T dD`."""
    block = tl.program_id(0)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, PADDED)
    basis_ptr += block * b * b
    core_offset_ik = block * b * b + i[:, None] * core_stride_i + k[None, :] * core_stride_k
    de_ik = tl.zeros((TILE, PADDED), tl.float32)
    for start in range(0, b, TILE):
        o = start + tl.arange(0, TILE)
        basis_io = tl.load(basis_ptr + o[None, :] * b + i[:, None], (i < b)[:, None] & (o < b)[None, :], 0.0)
        d_delta_ok = tl.load(
            d_delta_ptr + block * d_delta_stride_n + o[:, None] * d_delta_stride_o + k[None, :] * d_delta_stride_k,
            (o < b)[:, None] & (k < b)[None, :],
            0.0,
        )
        de_ik += tl.dot(basis_io, d_delta_ok, input_precision="ieee")
    mask = (i < b)[:, None] & (k < b)[None, :]
    core_factor_i, _, inverse_i = _factors(scale_ptr, sigma_ptr, block, i, b, HAS_SCALE, HAS_SIGMA, MERGED)
    tl.store(d_core_ptr + core_offset_ik, de_ik * core_factor_i[:, None], mask)
    if HAS_SCALE:
        core_ik = tl.load(core_ptr + core_offset_ik, mask, 0.0)
        basis_ki = tl.load(basis_ptr + k[None, :] * b + i[:, None], mask, 0.0)
        dt_i = tl.sum(de_ik * (core_ik + basis_ki), axis=1)
        tl.store(d_scale_ptr + block * b + i, dt_i * inverse_i, i < b)


def _constants(core: torch.Tensor, sigma: torch.Tensor | None, scale: torch.Tensor | None, merged: bool) -> dict:
    b = core.shape[-1]
    return dict(
        b=b,
        PADDED=max(16, triton.next_power_of_2(b)),
        TILE=TILE,
        HAS_SCALE=scale is not None and not merged,
        HAS_SIGMA=sigma is not None,
        MERGED=merged,
        num_warps=8,
    )


def _grid(core: torch.Tensor) -> tuple[int, int]:
    n, b, _ = core.shape
    return n, triton.cdiv(b, TILE)


def _dense(core: torch.Tensor) -> torch.Tensor:
    """Blocks in memory one after the other, each stored by rows or by columns."""
    return core if core.is_contiguous() or core.mT.is_contiguous() else core.contiguous()


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@torch.library.custom_op("fura::block_delta", mutates_args=())
def block_delta(
    basis: torch.Tensor, sigma: torch.Tensor | None, core: torch.Tensor, scale: torch.Tensor | None, merged: bool
) -> torch.Tensor:
    """`D` (n, b, b) in float32 of float32 tensors, as `transform.block_delta`; `core` may be a transposed view."""
    core = _dense(core)
    basis = basis.contiguous()
    sigma, scale = _contiguous(sigma, scale)
    delta = torch.empty(core.shape, dtype=torch.float32, device=core.device)
    with on_device(core.device):
        _delta_kernel[_grid(core)](
            basis,
            sigma,
            core,
            scale,
            delta,
            *core.stride()[1:],
            **_constants(core, sigma, scale, merged),
        )
    return delta


@torch.library.custom_op("fura::block_delta_backward", mutates_args=())
def block_delta_backward(
    d_delta: torch.Tensor,
    basis: torch.Tensor,
    sigma: torch.Tensor | None,
    core: torch.Tensor,
    scale: torch.Tensor | None,
    merged: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `core` and of `scale` (empty if there is none)."""
    core = _dense(core)
    basis = basis.contiguous()
    sigma, scale = _contiguous(sigma, scale)
    d_core = torch.empty_like(core)
    d_scale = core.new_empty(0 if scale is None else scale.shape)
    with on_device(core.device):
        _delta_gradient_kernel[_grid(core)](
            basis,
            sigma,
            core,
            scale,
            d_delta,
            d_core,
            d_scale,
            *core.stride()[1:],
            *d_delta.stride(),
            **_constants(core, sigma, scale, merged),
        )
    return d_core, d_scale


@block_delta.register_fake
def _(basis, sigma, core, scale, merged):
    return core.new_empty(core.shape)


@block_delta_backward.register_fake
def _(d_delta, basis, sigma, core, scale, merged):
    return torch.empty_like(_dense(core)), core.new_empty(0 if scale is None else scale.shape)


def _save(ctx, inputs: tuple, output: torch.Tensor) -> None:
    basis, sigma, core, scale, ctx.merged = inputs
    ctx.save_for_backward(basis, sigma, core, scale)


def _backward(ctx, d_delta: torch.Tensor) -> tuple:
    basis, sigma, core, scale = ctx.saved_tensors
    d_core, d_scale = block_delta_backward(d_delta, basis, sigma, core, scale, ctx.merged)
    return None, None, d_core, None if scale is None else d_scale, None


block_delta.register_autograd(_backward, setup_context=_save)
