"""PyTorch's view of several adapters on one input: a function of autograd for eager steps, an operator for traced ones.

Both start the same kernels. The operator is what `torch.compile` sees of a group of layers: one node, whose gradient is
one node. In eager steps `autograd.Function` does the same with less work on the host.

Shapes: n blocks, b block size, c = 2 or 3 adapters.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .delta_kernels import Tensors, run_delta_gradients, run_deltas
from .multipliers import kept
from .shared_kernels import run_shared_gradient_shares, run_shared_transform


class SharedMultiply(torch.autograd.Function):
    """`block_multiply` of one `x` by several adapters of the same geometry, all of them trained."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, merged: bool, *flat: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """
        Args:
            x: (*, n * b).
            merged: the cores carry the singular values.
            flat: basis, sigma, core and scale of each adapter, one adapter after the other.
        """
        delta_cnbb = kept(run_deltas, adapters_of(flat), merged, False, x.dtype)
        ctx.merged = merged
        ctx.save_for_backward(x, delta_cnbb, *flat)
        return tuple(run_shared_transform(x, delta_cnbb))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        x, delta_cnbb, *flat = ctx.saved_tensors
        ctx.spent = True  # an output that was not fetched before has no gradient any more
        dx, shares = run_shared_gradient_shares(list(gradients), x, delta_cnbb, ctx.needs_input_grad[0])
        return dx, None, *gradients_of(shares, flat, ctx.merged)


def adapters_of(flat: Sequence[torch.Tensor | None]) -> list[Tensors]:
    """Basis, sigma, core and scale of each adapter, from all of them in a row."""
    return [flat[start : start + 4] for start in range(0, len(flat), 4)]  # type: ignore[misc]


def gradients_of(shares: torch.Tensor, flat: Sequence[torch.Tensor | None], merged: bool) -> list[torch.Tensor | None]:
    """Of all in `flat`, from shares of every `dD` (shares, c, n, b, b); None for what is frozen or missing."""
    d_cores, d_scales = run_delta_gradients(shares, adapters_of(flat), merged, False)
    has_scale = flat[3] is not None
    d_flat = [(None, None, d_core, d_scales[k] if has_scale else None) for k, d_core in enumerate(d_cores)]
    return list(chain.from_iterable(d_flat))


# One tensor an adapter in each list; `sigma` and `scale` are empty where adapters have none.
TRAINED = "Tensor[] basis, Tensor[] sigma, Tensor[] core, Tensor[] scale, bool merged"
torch.library.define("fura::shared_multiply", f"(Tensor x, {TRAINED}) -> Tensor[]")  # c outputs, then all `D`
torch.library.define(
    "fura::shared_multiply_backward",
    f"(Tensor[] gradients, Tensor x, Tensor delta, {TRAINED}, bool with_dx) "
    "-> (Tensor dx, Tensor d_core, Tensor d_scale)",
)
_shared_multiply = torch.ops.fura.shared_multiply.default
_shared_multiply_backward = torch.ops.fura.shared_multiply_backward.default


def shared_multiply(x: torch.Tensor, merged: bool, *flat: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """`SharedMultiply.apply` as one operator: for steps that are traced."""
    basis, sigma, core, scale = ([tensor for tensor in flat[i::4] if tensor is not None] for i in range(4))
    return tuple(_shared_multiply(x, basis, sigma, core, scale, merged)[:-1])


def _by_adapter(
    basis: list[torch.Tensor], sigma: list[torch.Tensor], core: list[torch.Tensor], scale: list[torch.Tensor]
) -> list[Tensors]:
    none = [None] * len(core)
    return list(zip(basis, sigma or none, core, scale or none, strict=True))


@torch.library.impl("fura::shared_multiply", ("cpu", "cuda"))
def _(x, basis, sigma, core, scale, merged):
    delta_cnbb = run_deltas(_by_adapter(basis, sigma, core, scale), merged, False, x.dtype)
    return [*run_shared_transform(x, delta_cnbb), delta_cnbb]


@torch.library.register_fake("fura::shared_multiply")
def _(x, basis, sigma, core, scale, merged):
    return [*(x.new_empty(x.shape) for _ in core), x.new_empty((len(core), *core[0].shape))]


@torch.library.impl("fura::shared_multiply_backward", ("cpu", "cuda"))
def _(gradients, x, delta_cnbb, basis, sigma, core, scale, merged, with_dx):
    dx, shares = run_shared_gradient_shares(gradients, x, delta_cnbb, with_dx)
    gradients = run_delta_gradients(shares, _by_adapter(basis, sigma, core, scale), merged, False)
    return x.new_empty(0) if dx is None else dx, *gradients


@torch.library.register_fake("fura::shared_multiply_backward")
def _(gradients, x, delta_cnbb, basis, sigma, core, scale, merged, with_dx):
    d_core = core[0].new_empty((len(core), *core[0].shape))
    d_scale = core[0].new_empty((len(core), *scale[0].shape) if scale else 0)
    return x.new_empty(x.shape if with_dx else 0), d_core, d_scale


def _save(ctx: Any, inputs: tuple, output: list[torch.Tensor]) -> None:
    x, basis, sigma, core, scale, ctx.merged = inputs
    ctx.counts = [len(basis), len(sigma), len(core), len(scale)]
    ctx.save_for_backward(x, output[-1], *basis, *sigma, *core, *scale)


def _backward(ctx: Any, gradients: list[torch.Tensor]) -> tuple:
    x, delta_cnbb, *rest = ctx.saved_tensors
    lists = []
    for count in ctx.counts:
        lists.append(rest[:count])
        rest = rest[count:]
    need_dx = ctx.needs_input_grad[0]
    dx, d_core, d_scale = _shared_multiply_backward(gradients[:-1], x, delta_cnbb, *lists, ctx.merged, need_dx)
    basis, sigma, _, scale = lists
    none = [None] * len(basis), [None] * len(sigma)
    return dx if need_dx else None, *none, list(d_core.unbind(0)), list(d_scale.unbind(0)) if scale else [], None


torch.library.register_autograd("fura::shared_multiply", _backward, setup_context=_save)
