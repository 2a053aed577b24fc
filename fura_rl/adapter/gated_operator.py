"""A layer that reads `silu(gate) * up`: its gradient goes to `gate` and `up` in one pass, past the product's own.

Autograd would go through `dx` of the layer, the two gradients of the product and that of `silu`: four launches that
read nine tensors and write four, each as wide as the MLP. Here three are read and two written, and `silu(gate)`, which
the product saved for its gradient, is not kept.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .delta_kernels import run_delta_gradient
from .delta_operator import multiplied
from .gradient_kernels import run_gated_gradient_shares


class GatedMultiply(torch.autograd.Function):
    """`M x` of one trained adapter on the input side."""

    @staticmethod
    def forward(ctx: Any, x, gate, up, merged, basis, sigma, core, scale) -> torch.Tensor:
        """
        Args:
            x: (*, n * b), `silu(gate) * up`, without its history.
            gate, up: as `x`, with theirs.
            merged: the core carries the singular values.
        """
        y, delta = multiplied(x, basis, sigma, core, scale, merged, False)
        ctx.merged = merged
        ctx.save_for_backward(gate, up, delta, basis, sigma, core, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple:
        gate, up, delta, *adapter = ctx.saved_tensors
        d_gate, d_up, shares = run_gated_gradient_shares(g, gate, up, delta)
        d_core, d_scale = run_delta_gradient(shares, tuple(adapter), ctx.merged, False)
        return None, d_gate, d_up, None, None, None, d_core, None if adapter[3] is None else d_scale
