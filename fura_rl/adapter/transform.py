"""The arithmetic of FuRA as pure functions of tensors.

Everything works on the difference `D = M - I` of the block multiplier `M` (n, b, b): near the start `M` is close to
`I`, where bf16 resolves only 2^-8, while `D` keeps its digits and is exactly zero at the start.

On a CUDA device the two that training calls, `block_delta` and `block_transform`, run as Triton kernels, elsewhere as
plain torch, which also serves float64 and large blocks. The environment variable FURA_KERNELS, "triton" or "torch",
forces one of the two; "auto" is the default.

Shapes: n blocks, b block size, K = n * b features of the adapted side, `*` any leading dimensions.
"""

import os
from importlib.util import find_spec

import torch

from .errors import AdapterError

CHOICES = ("auto", "triton", "torch")
kernel_choice = os.environ.get("FURA_KERNELS", "auto")
if kernel_choice not in CHOICES:
    raise AdapterError(f"FURA_KERNELS is {kernel_choice!r}; it must be one of {', '.join(CHOICES)}.")
# Importing Triton takes a second, so only where it can be of use. "triton" on a CPU is for Triton's interpreter.
HAVE_KERNELS = find_spec("triton") is not None and (torch.version.cuda is not None or kernel_choice == "triton")
if HAVE_KERNELS:
    from . import delta_kernels, kernels

# Products of larger blocks are bound by arithmetic rather than memory, which the library's matrix products do best.
LARGEST_KERNEL_BLOCK = 256


def use_kernels(tensor: torch.Tensor, block_size: int) -> bool:
    """Whether blocks of this size, applied to `tensor`, go through the kernels."""
    if not HAVE_KERNELS or kernel_choice == "torch" or block_size > LARGEST_KERNEL_BLOCK:
        return False
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    return kernel_choice == "triton" or (
        tensor.is_cuda and torch.cuda.get_device_properties(tensor.device).major >= 8  # bf16 on matrix units
    )


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
    if basis_nbb is not None and core_nbb.dtype == torch.float32 and use_kernels(core_nbb, core_nbb.shape[-1]):
        return delta_kernels.block_delta(basis_nbb, sigma_nb, core_nbb, scale_nb, merged)
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
        return kernels.block_transform(x, delta)
    x_nTb = x.reshape(-1, n, b).transpose(0, 1)
    y_nTb = torch.baddbmm(x_nTb, x_nTb, delta.to(x.dtype).mT)
    # contiguous as a layer's input usually is: a matrix product over other strides may round differently
    return y_nTb.transpose(0, 1).reshape(x.shape).contiguous()


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
