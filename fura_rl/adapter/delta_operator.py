"""PyTorch's view of one adapter, from its trained tensors to `x + x D^T`: two launches forward, two backward.

As in `shared_operator`: eager steps run `autograd.Function`, and traced ones see the operator inside of it.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .block_operator import block_transform
from .delta_kernels import run_delta, run_delta_gradient, run_deltas
from .gradient_kernels import run_gradient_shares
from .kernels import run_transform
from .multipliers import keeps_multipliers, kept

TRAINED = "Tensor basis, Tensor? sigma, Tensor core, Tensor? scale, bool merged, bool transposed"
torch.library.define("fura::block_multiply", f"(Tensor x, {TRAINED}) -> (Tensor y, Tensor delta)")
torch.library.define(
    "fura::block_multiply_backward",
    f"(Tensor g, Tensor x, Tensor? other, Tensor delta, {TRAINED}, bool with_dx) "
    "-> (Tensor dx, Tensor d_core, Tensor d_scale)",
)
block_multiply = torch.ops.fura.block_multiply.default
block_multiply_backward = torch.ops.fura.block_multiply_backward.default


@torch.library.impl("fura::block_multiply", ("cpu", "cuda"))
def _(x, basis, sigma, core, scale, merged, transposed):
    delta = run_delta((basis, sigma, core, scale), merged, transposed, x.dtype)
    return run_transform(x, delta), delta


@torch.library.impl("fura::block_multiply_backward", ("cpu", "cuda"))
def _(g, x, other, delta, basis, sigma, core, scale, merged, transposed, with_dx):
    dx, shares = run_gradient_shares(g, x, delta, with_dx, other=other)
    return dx, *run_delta_gradient(shares, (basis, sigma, core, scale), merged, transposed)


@torch.library.register_fake("fura::block_multiply")
def _(x, basis, sigma, core, scale, merged, transposed):
    return x.new_empty(x.shape), core.new_empty(core.shape, dtype=x.dtype)


@torch.library.register_fake("fura::block_multiply_backward")
def _(g, x, other, delta, basis, sigma, core, scale, merged, transposed, with_dx):
    dx = g.new_empty(x.shape if with_dx else (0, x.shape[-1]))
    return dx, core.new_empty(core.shape), core.new_empty(0 if scale is None else scale.shape)


def multiplied(x: torch.Tensor, basis, sigma, core, scale, merged: bool, transposed: bool) -> tuple[torch.Tensor, ...]:
    """`block_multiply`: `x` (*, n * b) multiplied, and `D`, which may have been kept."""
    if not keeps_multipliers():
        return block_multiply(x, basis, sigma, core, scale, merged, transposed)
    delta = kept(run_deltas, [(basis, sigma, core, scale)], merged, transposed, x.dtype)[0]
    return run_transform(x, delta), delta


class BlockMultiply(torch.autograd.Function):
    """The gradients of `block_multiply`. `torch.library.register_autograd` would do, at 25 us more a call: it goes
    through the schema of the many arguments."""

    @staticmethod
    def forward(ctx: Any, x, factors, basis, sigma, core, scale, merged, transposed) -> torch.Tensor:
        """`factors`: two tensors whose product is `x` and that are kept anyway, to be saved in its place; or None."""
        y, delta = multiplied(x, basis, sigma, core, scale, merged, transposed)
        ctx.merged, ctx.transposed = merged, transposed
        ctx.trained = ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
        ctx.save_for_backward(delta, *((*(factors or (x, None)), basis, sigma, core, scale) if ctx.trained else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple:
        delta, *saved = ctx.saved_tensors
        if not ctx.trained:
            return block_transform(g, delta.mT), *[None] * 7
        x, other, basis, sigma, core, scale = saved
        need_dx = ctx.needs_input_grad[0]
        dx, d_core, d_scale = block_multiply_backward(
            g, x, other, delta, basis, sigma, core, scale, ctx.merged, ctx.transposed, need_dx
        )
        return dx if need_dx else None, None, None, None, d_core, None if scale is None else d_scale, None, None
