"""PyTorch's view of `x + x blockdiag(D)^T`: an operator of `x` and `D`, with its gradient.

The functions of `torch.library` that `custom_op` is made of: half its cost a call.
"""

from typing import Any

import torch

from .gradient_kernels import run_gradient
from .kernels import run_transform

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
