"""The arithmetic of FuRA as pure functions of tensors.

Everything works on the difference `D = M - I` of the block multiplier `M` (n, b, b): near the start `M` is close to
`I`, where bf16 resolves only 2^-8, while `D` keeps its digits and is exactly zero at the start.

What training calls, `block_multiply` and `block_transform`, runs as Triton kernels on a CUDA device and as plain torch
elsewhere; torch also serves float64 and large blocks. The environment variable FURA_KERNELS, "triton" or "torch",
forces one of the two; "auto" is the default.

Shapes: n blocks, b block size, K = n * b features of the adapted side, `*` any leading dimensions.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from .errors import AdapterError
from .product_input import can_gate, gate_and_up, product_factors

CHOICES = ("auto", "triton", "torch")
kernel_choice = os.environ.get("FURA_KERNELS", "auto")
if kernel_choice not in CHOICES:
    raise AdapterError(f"FURA_KERNELS is {kernel_choice!r}; it must be one of {', '.join(CHOICES)}.")
# Importing Triton takes a second, so only where it can be of use. "triton" on a CPU is for Triton's interpreter.
HAVE_KERNELS = find_spec("triton") is not None and (torch.version.cuda is not None or kernel_choice == "triton")
if HAVE_KERNELS:
    from . import delta_operator, gated_operator, launches, shared_kernels, shared_operator
    from .block_operator import block_transform as transform_operator


def have_kernels(x: torch.Tensor) -> bool:
    """Whether there are kernels at all where `x` lies."""
    return HAVE_KERNELS and kernel_choice != "torch" and (x.is_cuda or kernel_choice == "triton")


def use_kernels(x: torch.Tensor, block_size: int) -> bool:
    """Whether `x` is multiplied by blocks of this size through the kernels."""
    return have_kernels(x) and launches.supports(block_size, x.dtype, x.device)


def block_delta(
    basis_nbb: torch.Tensor | None,
    sigma_nb: torch.Tensor | None,
    core_nbb: torch.Tensor,
    scale_nb: torch.Tensor | None = None,
    *,
    merged: bool = False,
) -> torch.Tensor:
    """The difference `D` (n, b, b) of the input-side multiplier, without cancellation.

    With `R = V^T + dR` and `s = sigma + ds`, `M = V diag(s / sigma) R`, hence with `t = ds / sigma`

        D = V (dR + diag(t) (V^T + dR)),

    and with the singular values folded into the core (`merged`), `D = V diag(1 / sigma) dR`.

    Args:
        basis_nbb: V, orthogonal, one singular vector a column; None stands for the identity.
        sigma_nb: the singular values; None stands for ones.
        core_nbb: dR, the trained difference of the core.
        scale_nb: ds, the trained difference of the singular values; None if they are frozen.
        merged: the core carries the singular values.
    """
    if merged:
        inner_nbb = core_nbb if sigma_nb is None else core_nbb / sigma_nb.unsqueeze(-1)
    elif scale_nb is None:
        inner_nbb = core_nbb
    else:
        t_nb = scale_nb if sigma_nb is None else scale_nb / sigma_nb
        if basis_nbb is None:
            return core_nbb + t_nb.unsqueeze(-1) * core_nbb + torch.diag_embed(t_nb)
        inner_nbb = core_nbb + t_nb.unsqueeze(-1) * (basis_nbb.mT + core_nbb)
    return inner_nbb if basis_nbb is None else basis_nbb @ inner_nbb


def compose_deltas(first_nbb: torch.Tensor, second_nbb: torch.Tensor) -> torch.Tensor:
    """The difference of the product: `(I + A)(I + B) - I = A + B + A B`."""
    return first_nbb + second_nbb + first_nbb @ second_nbb


def block_transform(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`x + x @ blockdiag(delta)^T`: each row of `x` multiplied by `M = I + delta`.

    Args:
        x: (*, K).
        delta: (n, b, b) with `n * b = K`; cast to the dtype of `x`. Products accumulate in float32 and are rounded
            once, after `x` has been added.

    Returns:
        (*, K) in the dtype of `x`; exactly `x` where `delta` is zero.
    """
    n, b, _ = delta.shape
    if use_kernels(x, b):
        return transform_operator(x, delta)
    x_nTb = x.reshape(-1, n, b).transpose(0, 1)
    y_nTb = torch.baddbmm(x_nTb, x_nTb, delta.to(x.dtype).mT)
    # contiguous as a layer's input usually is: a matrix product over other strides may round differently
    return y_nTb.transpose(0, 1).reshape(x.shape).contiguous()


def block_multiply(
    x: torch.Tensor,
    basis_nbb: torch.Tensor,
    sigma_nb: torch.Tensor | None,
    core_nbb: torch.Tensor,
    scale_nb: torch.Tensor | None = None,
    *,
    merged: bool = False,
    transposed: bool = False,
) -> torch.Tensor:
    """`block_transform` of `x` by the `block_delta` of the other arguments, as one operator; needs `use_kernels`.

    Args:
        x: (*, n * b).
        core_nbb: in float32, as the other trained tensors and the basis.
        transposed: of the output side, whose core and multiplier are the transposes of the input side's.
    """
    scale_nb = None if merged else scale_nb
    adapter = basis_nbb, sigma_nb, core_nbb, scale_nb
    if not transposed and core_nbb.requires_grad and can_gate(core_nbb.shape[1]) and (pair := gate_and_up(x)):
        return gated_operator.GatedMultiply.apply(x.detach(), *pair, merged, *adapter)
    factors = product_factors(x)
    return delta_operator.BlockMultiply.apply(x, factors, basis_nbb, sigma_nb, core_nbb, scale_nb, merged, transposed)


def can_share(x: torch.Tensor, block_size: int) -> bool:
    """Whether `shared_multiply` takes `x` and blocks of this size."""
    return use_kernels(x, block_size) and shared_kernels.supports(block_size, x.dtype, x.device)


def shared_multiply(x: torch.Tensor, adapters: Sequence[Any]) -> tuple[torch.Tensor, ...]:
    """`block_multiply` of one `x` by two or three adapters (`FuraBlocks` of one geometry), in one pass over `x`."""
    merged, flat = flattened(adapters)
    if torch.compiler.is_compiling():
        return shared_operator.shared_multiply(x, merged, *flat)
    return shared_operator.SharedMultiply.apply(x, merged, *flat)


def flattened(adapters: Sequence[Any]) -> tuple[bool, list[torch.Tensor | None]]:
    """Whether the cores carry the singular values; basis, sigma, core and scale of each adapter, one after another."""
    merged = adapters[0].singular_values == "merged"
    return merged, [t for a in adapters for t in (a.basis, a.sigma, a.core, None if merged else a.scale)]


def merge_input_side(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`W blockdiag(M)` for `weight` (rows, K), as a new tensor of the same dtype."""
    n, b, _ = delta.shape
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    weight_nrb = weight.reshape(-1, n, b).transpose(0, 1)
    torch.baddbmm(weight_nrb, weight_nrb, delta.to(weight.dtype), out=merged.view(-1, n, b).transpose(0, 1))
    return merged


def merge_output_side(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`blockdiag(M) W` for `weight` (K, columns), as a new tensor of the same dtype."""
    n, b, _ = delta.shape
    weight_nbi = weight.reshape(n, b, -1)
    return torch.baddbmm(weight_nbi, delta.to(weight.dtype), weight_nbi).reshape(weight.shape)
