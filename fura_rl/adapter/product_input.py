"""Inputs that are products: `act(gate) * up`, which the last projection of a gated MLP reads.

Nothing is assumed about the model: autograd's record of how the input was made says whether it is one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

LARGEST_GATED = 128  # features of a block


def can_gate(block_size: int) -> bool:
    """Whether the gradient of an input `silu(gate) * up` of blocks of this size can go on to `gate` and `up`."""
    return block_size <= LARGEST_GATED


class _Output(NamedTuple):
    """What a layer has returned."""

    get: Callable[[], torch.Tensor | None]
    version: int
    saving: Any  # how tensors were saved when it was made


_recent = threading.local()  # `outputs`: the last two that were remembered in this thread


def remember(y: torch.Tensor) -> None:
    """Keeps `y`, the output of a projection that may be `gate` or `up`, in mind for the next `gate_and_up`.

    Activation checkpointing holds no tensor that a graph saved, so there it is held here; else a weak reference does,
    and what a failed pass leaves behind is its graph's alone.
    """
    if y.grad_fn is None:
        return
    saving = _saved_tensors_hooks()
    output = _Output(weakref.ref(y) if saving is None else (lambda: y), y._version, saving)
    _recent.outputs = (*getattr(_recent, "outputs", ())[-1:], output)


def forget() -> None:
    _recent.outputs = ()


def gate_and_up(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`gate` and `up`, with their history, if `x` is `silu(gate) * up` of the two outputs remembered last; else None.

    What is computed from `x` can then hand its gradient on to them directly. Whether it is so is read from the edges of
    autograd's graph, which are there under activation checkpointing too. All three have to be of one region of it: of
    another, they are not there when this one is computed again, which has to save as many tensors as before.

    The gradients of `x` and of `silu(gate)` themselves are then not computed: `torch.autograd.grad` of one finds none.
    If either has hooks, or is to keep its gradient, the answer is None. Out of sight are hooks that come later or that
    are on a node of the graph and, under checkpointing, those of `silu(gate)` and whether that was changed.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    outputs: tuple[_Output, ...] = getattr(_recent, "outputs", ())
    if len(outputs) < 2 or not _is_product(x):
        return None
    factors = [f for f in _saved_factors(x) or () if f is not None]
    if any(t._backward_hooks or t.retains_grad for t in (x, *factors)) or any(f._version for f in factors):
        return None
    edges: Any = x.grad_fn.next_functions  # type: ignore[union-attr]
    for (act, _), up_edge in (edges, edges[::-1]):
        if act is None or act.name() != "SiluBackward0":
            continue
        for gate, up in (outputs, outputs[::-1]):
            if _is_at(gate, act.next_functions[0], x) and _is_at(up, up_edge, x):
                forget()  # here, not after the layer: a recomputation ends with the last tensor that is saved
                return gate.get(), up.get()  # type: ignore[return-value]
    return None


def _is_product(x: torch.Tensor) -> bool:
    """Of another version, `x` was changed in place since (or made so) and may not be what autograd knows of."""
    return x.grad_fn is not None and x.grad_fn.name() == "MulBackward0" and x._version == 0


def _is_at(output: _Output, edge: tuple, x: torch.Tensor) -> bool:
    """Whether the output is what the edge leads to, unchanged, and like `x`."""
    y = output.get()
    if y is None or y._version != output.version or output.saving != _saved_tensors_hooks():
        return False
    return edge == (y.grad_fn, y.output_nr) and _are_alike(y, x)


def _are_alike(y: torch.Tensor, x: torch.Tensor) -> bool:
    return y.shape == x.shape and y.dtype == x.dtype and y.device == x.device


def product_factors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two tensors whose product is `x`, if autograd keeps both for that product's own gradient; None otherwise.

    Both factors stay in memory until the backward pass, and multiplying them again there costs less than keeping the
    widest activation of a layer.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _is_product(x):
        return None
    factors = _saved_factors(x)
    if factors is None or any(f is None or not _are_alike(f, x) for f in factors):
        return None
    return factors[0].detach(), factors[1].detach()


def _saved_factors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What autograd keeps of the product `x`. None where hooks replace saved tensors (activation checkpointing,
    offloading), now or when `x` was made: looking would compute or fetch them."""
    node: Any = x.grad_fn
    if _saved_tensors_hooks() is not None:
        return None
    try:
        if node._raw_saved_self.unpack_hook is not None or node._raw_saved_other.unpack_hook is not None:
            return None
        return node._saved_self, node._saved_other
    except RuntimeError:  # freed by a backward pass, or changed in place
        return None


def _saved_tensors_hooks() -> Any:
    """What packs tensors that a graph saves now: another pair in each region of activation checkpointing, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)
