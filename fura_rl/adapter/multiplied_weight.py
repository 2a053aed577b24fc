"""Layers that multiply their weight instead of their input: `(W M) x` for `W (M x)`.

`M x` reads and writes tensors as long as a batch, `W M` two of the weight's size: for 16,384 tokens and a weight of
2048 rows, an eighth of the bytes. A 4-bit weight is dequantised in each pass anyway, so that there `W M` costs no
traffic of its own (`four_bit_kernels`). The backward pass stays what it is: `g = dy W` with the base weight, then
`dx = g + g D` and `dD = g^T x` in one pass.

Either product is rounded to the layer's dtype once, and loses what is below half a spacing: of `W`, as the weights of
the engine that answers are sampled from do, or of `x` (docs/performance.md has both measured). FURA_MULTIPLY, an
environment variable, says which: "auto", the default, is what is less work, and "inputs" never a weight.
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
from .multipliers import kept
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
    from .gradient_kernels import run_gated_gradient_shares, run_gradient_shares
    from .kernels import run_transform
    from .shared_kernels import run_shared_gradient_shares
    from .shared_operator import adapters_of, gradients_of

CHOICES = ("auto", "inputs")
choice = os.environ.get("FURA_MULTIPLY", "auto")
if choice not in CHOICES:
    raise AdapterError(f"FURA_MULTIPLY is {choice!r}; it must be one of {', '.join(CHOICES)}.")
FEWEST_ROWS = 2048  # of 4-bit layers
LAUNCH_BYTES = 2**25  # that a GPU moves while the host starts a kernel: there is one more for each weight


class Multiplied(NamedTuple):
    """A layer's input (*, in), multiplied by `M`; or what it returns for it (*, out), multiplied by `W M`."""

    tensor: torch.Tensor
    is_output: bool = False


def multiplies_weights(bases: Sequence[nn.Module], x: torch.Tensor, all_blocks: Sequence[FuraBlocks]) -> bool:
    """Whether layers that read `x`, with an adapter each (`FuraBlocks` of one geometry, input side), can and should
    multiply their weights."""
    if choice == "inputs" or torch.compiler.is_compiling() or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not pays(x.numel() // x.shape[-1], bases):
        return False
    return all(
        blocks.is_plain
        and transform.use_kernels(x, blocks.block_size)
        and (_is_plain(base, x) or _is_four_bit(base, x, blocks.block_size))
        for base, blocks in zip(bases, all_blocks, strict=True)
    )


def pays(rows: int, bases: Sequence[Any]) -> bool:
    """Whether the products of the weights are less work than those of an input of so many rows."""
    if any(map(_is_packed, bases)):
        return rows >= FEWEST_ROWS
    # Half the bytes at most: to read and to write each weight, against reading the input once and writing one for each.
    inputs, weights = rows * (1 + len(bases)), 2 * sum(getattr(base, "out_features", rows) for base in bases)
    saved = 2 * (inputs - weights) * getattr(bases[0], "in_features", 0)
    return 2 * weights <= inputs and saved >= LAUNCH_BYTES * len(bases)


def _is_packed(base: nn.Module) -> bool:
    return Linear4bit is not None and isinstance(base, Linear4bit)


def _is_plain(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether `base` is a frozen `nn.Linear` with its weight here, which neither ZeRO-3 nor a hook fetches."""
    if type(base) is not nn.Linear or not is_bare(base):
        return False
    weight, bias = base.weight, base.bias
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and not hasattr(weight, "ds_id")
        and not (weight.requires_grad or weight.is_inference())  # of the latter no version tells a change
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
        and type(base).forward is Linear4bit.forward
        and is_bare(base)
        and block_size <= LARGEST_BLOCK
    )


def is_bare(base: Any) -> bool:
    """Whether the layer's forward is that of its class, and nothing hooks on to its call (offloading, profiling)."""
    return (
        "forward" not in base.__dict__
        and not hasattr(base, "_hf_hook")
        and not (base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks)
    )


def multiply_weights(bases: Sequence[Any], x: torch.Tensor, all_blocks: Sequence[FuraBlocks]) -> list[Multiplied]:
    """What each of one to three layers, for which `multiplies_weights`, returns for `x`."""
    merged, flat = transform.flattened(all_blocks)
    with torch.no_grad():
        delta_cnbb = kept(run_deltas, adapters_of(flat), merged, False, x.dtype)
    gate = up = None
    saved: tuple[torch.Tensor | None, ...] = x, None
    if len(bases) == 1:
        if transform.can_gate(all_blocks[0].block_size) and (pair := gate_and_up(x)):
            (gate, up), x = pair, x.detach()
            saved = pair
        else:
            saved = product_factors(x) or saved
    inputs = DeferredMultiply.apply(x, gate, up, saved, delta_cnbb, merged, *flat)
    return [Multiplied(y, is_output=True) for y in MultipliedLinears.apply(bases, delta_cnbb, *inputs)]


class DeferredMultiply(torch.autograd.Function):
    """The gradient of `M x` for each of one to three adapters, all of them trained; in the forward pass `x` itself."""

    @staticmethod
    def forward(ctx: Any, x, gate, up, saved, delta_cnbb, merged, *flat) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x: (*, n * b).
            gate, up: if `x` is `silu(gate) * up` without its history, these with theirs.
            saved: `gate` and `up`; two factors of `x` that are kept anyway; or `x` and None.
            merged: the cores carry the singular values.
            flat: basis, sigma, core and scale of each adapter, one adapter after the other.
        """
        ctx.merged, ctx.gated = merged, gate is not None
        ctx.save_for_backward(*saved, delta_cnbb, *flat)
        return tuple(x.view_as(x) for _ in delta_cnbb)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        x, other, delta_cnbb, *flat = ctx.saved_tensors
        with_dx = ctx.needs_input_grad[0]
        dx: torch.Tensor | None
        dx = d_gate = d_up = None
        if len(gradients) > 1:
            dx, shares = run_shared_gradient_shares(list(gradients), x, delta_cnbb, with_dx)
        else:
            if ctx.gated:
                d_gate, d_up, shares = run_gated_gradient_shares(gradients[0], x, other, delta_cnbb[0])
            else:
                dx, shares = run_gradient_shares(gradients[0], x, delta_cnbb[0], with_dx, other=other)
            shares = shares.unsqueeze(1)
        return dx if with_dx else None, d_gate, d_up, None, None, None, *gradients_of(shares, flat, ctx.merged)


class MultipliedLinears(torch.autograd.Function):
    """`x (W M)^T + bias` of one to three layers, whose gradients are those of layers with multiplied inputs: `dy W`.

    Saves nothing: a recomputation of activation checkpointing ends before a region's last product. Weights are held by
    reference, since FSDP exchanges what they hold.
    """

    @staticmethod
    def forward(ctx: Any, bases, delta_cnbb, *inputs) -> tuple[torch.Tensor, ...]:
        ctx.bases = [(base.weight, getattr(base.weight, "quant_state", None), base.weight._version) for base in bases]
        outputs = []
        for x, base, delta, (weight, state, _) in zip(inputs, bases, delta_cnbb, ctx.bases, strict=True):
            product = run_transform(weight, delta.mT) if state is None else run_merged(weight, state, delta)
            outputs.append(nn.functional.linear(x, product, None if base.bias is None else base.bias.to(x.dtype)))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        ctx.spent = True  # as in `SharedMultiply`
        return None, None, *(dy @ _unchanged(*base).to(dy.dtype) for dy, base in zip(gradients, ctx.bases, strict=True))


def _unchanged(weight: torch.Tensor, state: Any, version: int) -> torch.Tensor:
    """A base weight (out, in) as it was in the forward pass, from its codes if it is a 4-bit one."""
    if state is not None:
        return dequantize_4bit(weight.view(-1, 1), state)  # of one row of codes it would be transposed
    if weight._version != version:
        raise RuntimeError("a base weight has been modified by an inplace operation since the forward pass.")
    return weight
