"""Layers that multiply their weight instead of their input: `(W M) x` for `W (M x)`.

`M x` reads and writes tensors as long as a batch, `W M` two of the weight's size: of 16,384 tokens and a weight of 2048
rows, an eighth of the bytes. A 4-bit weight is dequantised in each pass anyway, so that there `W M` costs no traffic of
its own (`four_bit_kernels`). The backward pass stays what it is: `g = dy W` with the base weight, then `dx = g + g D`
and `dD = g^T x` in one pass.

Either product is rounded to the layer's dtype once, and loses what is below half a spacing: of `W`, as the weights of
the engine that answers are sampled from do, or of `x` (docs/performance.md has both measured).

The environment variable FURA_MULTIPLY, "inputs", keeps all layers from it; "auto" is the default.

In the forward pass a layer's input therefore goes through unchanged, as a `Deferred` with the `D` that the base layer
has yet to apply. Only where that pays: few rows, as in decoding, are less work than a weight.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from torch import nn
from torch.autograd.function import once_differentiable

from . import transform
from .errors import AdapterError
from .product_input import gate_and_up, product_factors

if TYPE_CHECKING:
    from .blocks import FuraBlocks
Linear4bit: Any = None
if transform.HAVE_KERNELS:
    if is_bnb_4bit_available():
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
    from .delta_kernels import run_deltas
    from .four_bit_kernels import LARGEST_BLOCK, run_merged
    from .gated_operator import GatedMultiply
    from .gradient_kernels import run_gradient_shares
    from .kernels import run_transform
    from .shared_kernels import run_shared_gradient_shares
    from .shared_operator import adapters_of, gradients_of

CHOICES = ("auto", "inputs")
choice = os.environ.get("FURA_MULTIPLY", "auto")
if choice not in CHOICES:
    raise AdapterError(f"FURA_MULTIPLY is {choice!r}; it must be one of {', '.join(CHOICES)}.")
FEWEST_ROWS = 2048  # of 4-bit layers


class Deferred(NamedTuple):
    """A layer's input (*, in) and the `D` (n, b, b) that it still has to be multiplied by, if there is one."""

    x: torch.Tensor
    delta: torch.Tensor | None = None


def can_defer(bases: Sequence[nn.Module], x: torch.Tensor, all_blocks: Sequence[FuraBlocks]) -> bool:
    """Whether layers that read `x`, with an adapter each, can and should multiply their weights."""
    if choice == "inputs" or torch.compiler.is_compiling() or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not all(blocks.is_plain and transform.use_kernels(x, blocks.block_size) for blocks in all_blocks):
        return False
    if not all(
        _is_plain(base, x) or _is_four_bit(base, x, blocks.block_size)
        for base, blocks in zip(bases, all_blocks, strict=True)
    ):
        return False
    return pays(x.numel() // x.shape[-1], bases)


def pays(rows: int, bases: Sequence[Any]) -> bool:
    """Whether the products of the weights are less work than those of an input of so many rows."""
    if any(_is_packed(base) for base in bases):
        return rows >= FEWEST_ROWS
    # reading and writing each weight, against reading the input once and writing one for each layer
    return 2 * sum(base.out_features for base in bases) < rows * (1 + len(bases))


def _is_packed(base: nn.Module) -> bool:
    return Linear4bit is not None and isinstance(base, Linear4bit)


def _is_plain(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether `base` is a frozen `nn.Linear` with its weight here, which neither ZeRO-3 nor a hook fetches."""
    if type(base) is not nn.Linear or not _is_bare(base, nn.Linear):
        return False
    weight, bias = base.weight, base.bias
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and not hasattr(weight, "ds_id")
        and not weight.requires_grad
        and weight.dtype == x.dtype
        and weight.device == x.device
        and weight.shape[1] == x.shape[-1]
        and (bias is None or not bias.requires_grad)
    )


def _is_four_bit(base: Any, x: torch.Tensor, block_size: int) -> bool:
    """Whether `base` is a 4-bit layer of bitsandbytes as it is stored for training."""
    if not _is_packed(base):
        return False
    if base.quant_state is not None:
        fix_4bit_weight_quant_state_from_module(base)  # as its own forward does: FSDP exchanges the parameter
    weight = base._parameters["weight"]
    state = getattr(weight, "quant_state", None)
    return (
        base.compute_dtype in (None, x.dtype)
        and state is not None
        and weight.dtype == torch.uint8
        and weight.device == x.device
        and not getattr(state, "packing_format_for_cpu", False)
        and (base.bias is None or not base.bias.requires_grad)
        and _is_bare(base, Linear4bit)
        and block_size <= LARGEST_BLOCK
    )


def _is_bare(base: Any, kind: Any) -> bool:
    """Whether the layer's forward is that of its kind, and nothing hooks on to its call (offloading, profiling)."""
    return (
        type(base).forward is kind.forward
        and "forward" not in base.__dict__
        and not hasattr(base, "_hf_hook")
        and not (base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks)
    )


def defer(x: torch.Tensor, all_blocks: Sequence[FuraBlocks]) -> list[Deferred]:
    """`x` for each of one to three adapters (`FuraBlocks` of one geometry, input side), with their `D`."""
    merged, flat = transform.flattened(all_blocks)
    with torch.no_grad():
        delta_cnbb = run_deltas(adapters_of(flat), merged, False, x.dtype)
    if len(all_blocks) == 1 and transform.can_gate(all_blocks[0].block_size) and (pair := gate_and_up(x)):
        return [Deferred(GatedMultiply.apply(x.detach(), *pair, delta_cnbb[0], merged, *flat), delta_cnbb[0])]
    factors = product_factors(x) if len(all_blocks) == 1 else None
    outputs = DeferredMultiply.apply(x, factors, delta_cnbb, merged, *flat)
    return [Deferred(y, delta) for y, delta in zip(outputs, delta_cnbb, strict=True)]


def multiplied_linear(base: Any, deferred: Deferred) -> torch.Tensor:
    """`x (W M)^T + bias` of a base layer that `can_defer`."""
    state = getattr(base.weight, "quant_state", None)
    return MultipliedLinear.apply(deferred.x, deferred.delta, base.weight, state, base.bias)


class DeferredMultiply(torch.autograd.Function):
    """The gradient of `M x` for each of one to three adapters, all of them trained; in the forward pass `x` itself."""

    @staticmethod
    def forward(ctx: Any, x, factors, delta_cnbb, merged, *flat) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x: (*, n * b).
            factors: two tensors whose product is `x` and that are kept anyway, to be saved in its place; or None.
            merged: the cores carry the singular values.
            flat: basis, sigma, core and scale of each adapter, one adapter after the other.
        """
        ctx.merged = merged
        ctx.save_for_backward(*(factors or (x, None)), delta_cnbb, *flat)
        return tuple(x.view_as(x) for _ in delta_cnbb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        x, other, delta_cnbb, *flat = ctx.saved_tensors
        ctx.spent = True  # as in `SharedMultiply`
        with_dx = ctx.needs_input_grad[0]
        dx: torch.Tensor | None
        if len(gradients) == 1:
            dx, shares = run_gradient_shares(gradients[0], x, delta_cnbb[0], with_dx, other=other)
            shares = shares.unsqueeze(1)
        else:
            dx, shares = run_shared_gradient_shares(list(gradients), x, delta_cnbb, with_dx)
        return dx if with_dx else None, None, None, None, *gradients_of(shares, flat, ctx.merged)


class MultipliedLinear(torch.autograd.Function):
    """`x (W M)^T + bias`, whose gradient is that of a layer whose input was multiplied: `dy W`."""

    @staticmethod
    def forward(ctx: Any, x, delta, weight, state, bias) -> torch.Tensor:
        """`state`: of a 4-bit weight, else None."""
        ctx.state = state
        if state is None:
            ctx.save_for_backward(weight)
            merged = run_transform(weight, delta.mT)
        else:
            ctx.packed = weight
            merged = run_merged(weight, state, delta)
        return nn.functional.linear(x, merged, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple:
        if ctx.state is None:
            (weight,) = ctx.saved_tensors
        else:
            weight = dequantize_4bit(ctx.packed.view(-1, 1), ctx.state)  # of one row of codes it would be transposed
        return dy @ weight.to(dy.dtype), None, None, None, None
