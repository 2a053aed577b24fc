"""Kernels from an adapter's trained tensors to `D`, and from the gradient of `D` to theirs.

With `t = ds / sigma` (scaling rows) and `E = diag(1 + t) dR + diag(t) V^T`, `D = V E`. Written out in torch, `D` takes
about eight small launches forward and fifteen backward for each layer; here it is one each, and no intermediate is
kept: both read the trained tensors and the frozen basis alone. Sums are in float32, products too.

On the output side `M = R diag(s) P` is the transpose of the input side's `P diag(s) R`: `transposed` kernels read `dR`
and write `D` transposed.

Shapes: n blocks, b block size. `V` and `D` have rows `o`, `dR` and `E` rows `i`; `D`, `dR` and `E` have columns `k`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .launches import padded
from .triton_launch import Kernel

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
def _pick(first, second, third, COUNT: tl.constexpr):
    """The pointer of the adapter that this program works for."""
    pointer = first
    if COUNT > 1:  # noqa: SIM102 (decided while compiling)
        if tl.program_id(2) == 1:
            pointer = second
    if COUNT > 2:  # noqa: SIM102
        if tl.program_id(2) == 2:
            pointer = third
    return pointer


@triton.jit(do_not_specialize=["num_blocks"])
def _delta_kernel(
    delta_ptr,
    basis_ptr,
    sigma_ptr,
    core_ptr,
    scale_ptr,
    basis1_ptr,
    sigma1_ptr,
    core1_ptr,
    scale1_ptr,
    basis2_ptr,
    sigma2_ptr,
    core2_ptr,
    scale2_ptr,
    num_blocks,
    b: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    MERGED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A tile of columns of `D = V E`."""
    row: tl.constexpr = 1 if TRANSPOSED else b
    column: tl.constexpr = b if TRANSPOSED else 1
    block = tl.program_id(0)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    o = tl.arange(0, PADDED)
    basis_ptr = _pick(basis_ptr, basis1_ptr, basis2_ptr, COUNT) + block * b * b
    core_ptr = _pick(core_ptr, core1_ptr, core2_ptr, COUNT) + block * b * b
    if HAS_SIGMA:
        sigma_ptr = _pick(sigma_ptr, sigma1_ptr, sigma2_ptr, COUNT)
    if HAS_SCALE:
        scale_ptr = _pick(scale_ptr, scale1_ptr, scale2_ptr, COUNT)
    sum_ok = tl.zeros((PADDED, TILE), tl.float32)
    for start in range(0, b, TILE):
        i = start + tl.arange(0, TILE)
        mask = (i < b)[:, None] & (k < b)[None, :]
        core_factor_i, t_i, _ = _factors(scale_ptr, sigma_ptr, block, i, b, HAS_SCALE, HAS_SIGMA, MERGED)
        e_ik = tl.load(core_ptr + i[:, None] * row + k[None, :] * column, mask, 0.0) * core_factor_i[:, None]
        if HAS_SCALE:
            e_ik += t_i[:, None] * tl.load(basis_ptr + k[None, :] * b + i[:, None], mask, 0.0)
        basis_oi = tl.load(basis_ptr + o[:, None] * b + i[None, :], (o < b)[:, None] & (i < b)[None, :], 0.0)
        sum_ok += tl.dot(basis_oi, e_ik, input_precision="ieee")
    delta_ptr += (tl.program_id(2) * num_blocks + block) * b * b + o[:, None] * row + k[None, :] * column
    tl.store(delta_ptr, sum_ok.to(delta_ptr.dtype.element_ty), (o < b)[:, None] & (k < b)[None, :])


@triton.jit(do_not_specialize=["num_shares"])
def _delta_gradient_kernel(
    d_delta_ptr,
    d_core_ptr,
    d_scale_ptr,
    basis_ptr,
    sigma_ptr,
    core_ptr,
    scale_ptr,
    basis1_ptr,
    sigma1_ptr,
    core1_ptr,
    scale1_ptr,
    basis2_ptr,
    sigma2_ptr,
    core2_ptr,
    scale2_ptr,
    num_shares,
    num_blocks,
    b: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    MERGED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A tile of rows of the gradient of `dR`, and of that of `ds`, by way of `dE = V^T dD`.

    `dD` comes in shares (shares, adapters, n, b, b), which are added here, in their order.
    """
    row: tl.constexpr = 1 if TRANSPOSED else b
    column: tl.constexpr = b if TRANSPOSED else 1
    block = tl.program_id(2) * num_blocks + tl.program_id(0)  # of all adapters'
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, PADDED)
    basis_ptr = _pick(basis_ptr, basis1_ptr, basis2_ptr, COUNT) + tl.program_id(0) * b * b
    core_ptr = _pick(core_ptr, core1_ptr, core2_ptr, COUNT) + tl.program_id(0) * b * b
    if HAS_SIGMA:
        sigma_ptr = _pick(sigma_ptr, sigma1_ptr, sigma2_ptr, COUNT)
    if HAS_SCALE:
        scale_ptr = _pick(scale_ptr, scale1_ptr, scale2_ptr, COUNT)
    entry_ik = i[:, None] * row + k[None, :] * column
    de_ik = tl.zeros((TILE, PADDED), tl.float32)
    for start in range(0, b, TILE):
        o = start + tl.arange(0, TILE)
        basis_io = tl.load(basis_ptr + o[None, :] * b + i[:, None], (i < b)[:, None] & (o < b)[None, :], 0.0)
        entry_ok = d_delta_ptr + block * b * b + o[:, None] * row + k[None, :] * column
        d_delta_ok = tl.zeros((TILE, PADDED), tl.float32)
        for _ in range(num_shares):
            d_delta_ok += tl.load(entry_ok, (o < b)[:, None] & (k < b)[None, :], 0.0)
            entry_ok += COUNT * num_blocks * b * b
        de_ik += tl.dot(basis_io, d_delta_ok, input_precision="ieee")
    mask = (i < b)[:, None] & (k < b)[None, :]
    core_factor_i, _, inverse_i = _factors(scale_ptr, sigma_ptr, tl.program_id(0), i, b, HAS_SCALE, HAS_SIGMA, MERGED)
    tl.store(d_core_ptr + block * b * b + entry_ik, de_ik * core_factor_i[:, None], mask)
    if HAS_SCALE:
        core_ik = tl.load(core_ptr + entry_ik, mask, 0.0)
        basis_ki = tl.load(basis_ptr + k[None, :] * b + i[:, None], mask, 0.0)
        dt_i = tl.sum(de_ik * (core_ik + basis_ki), axis=1)
        tl.store(d_scale_ptr + block * b + i, dt_i * inverse_i, i < b)


delta_kernel = Kernel(_delta_kernel)
delta_gradient_kernel = Kernel(_delta_gradient_kernel)

Tensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]  # basis, sigma, core, scale
MOST = 3  # adapters in one launch


def _arguments(adapters: Sequence[Tensors], merged: bool, transposed: bool) -> tuple[list, tuple[int, int, int], tuple]:
    """The pointers of the adapters, the grid, and the constants from `num_blocks` on."""
    _, sigma, core, scale = adapters[0]
    pointers = [None if tensor is None else tensor.contiguous() for tensors in adapters for tensor in tensors]
    pointers += [None] * (4 * (MOST - len(adapters)))
    n, b, _ = core.shape
    has_scale = scale is not None and not merged
    constants = (n, b, padded(b), TILE, len(adapters), has_scale, sigma is not None, merged, transposed)
    return pointers, (n, -(-b // TILE), len(adapters)), constants


def run_deltas(adapters: Sequence[Tensors], merged: bool, transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    """`D` (adapters, n, b, b) of up to three adapters of one geometry, computed in float32."""
    pointers, grid, constants = _arguments(adapters, merged, transposed)
    core = adapters[0][2]
    delta_cnbb = torch.empty(len(adapters), *core.shape, dtype=dtype, device=core.device)
    delta_kernel(grid, (delta_cnbb, *pointers), *constants, num_warps=8)
    return delta_cnbb


def run_delta_gradients(
    shares_scnbb: torch.Tensor, adapters: Sequence[Tensors], merged: bool, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """From shares of `dD` (shares, adapters, n, b, b) in float32, which are summed in their order.

    Returns:
        The gradients of the cores (adapters, n, b, b) and of the scales (adapters, n, b; empty if there are none).
    """
    pointers, grid, constants = _arguments(adapters, merged, transposed)
    core, scale = adapters[0][2:]
    d_core = torch.empty(len(adapters), *core.shape, dtype=core.dtype, device=core.device)
    d_scale = torch.empty(0 if scale is None else (len(adapters), *scale.shape), dtype=core.dtype, device=core.device)
    tensors = (shares_scnbb.contiguous(), d_core, d_scale, *pointers)
    delta_gradient_kernel(grid, tensors, len(shares_scnbb), *constants, num_warps=8)
    return d_core, d_scale


def run_delta(tensors: Tensors, merged: bool, transposed: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`D` (n, b, b) of one adapter, computed in float32."""
    return run_deltas([tensors], merged, transposed, dtype)[0]


def run_delta_gradient(
    shares_snbb: torch.Tensor, tensors: Tensors, merged: bool, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `core` (n, b, b) and of `scale` (n, b; empty if there is none), from shares of `dD`."""
    d_core, d_scale = run_delta_gradients(shares_snbb.unsqueeze(1), [tensors], merged, transposed)
    return d_core[0], d_scale if tensors[3] is None else d_scale[0]
