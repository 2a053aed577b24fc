"""Multipliers that are built once for all forward passes between two optimiser steps.

What the kernels multiply by, `D`, depends on trained tensors only, which gradient accumulation leaves as they are from
one micro-batch to the next. Autograd's functions of the kernels take the trained tensors and build `D` themselves, so
each pass has gradients of its own whether it built `D` or found it. Plain torch's `D` belongs to the graph of its pass,
and a traced step may use the memory of `D` for something else: neither keeps any.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# By dtype and trained tensors: these tensors, so that no other ones take their place, their versions, and `D`.
Store = dict[tuple[Any, ...], tuple[list[torch.Tensor], list[int], torch.Tensor]]
_store: Store | None = None


@contextmanager
def keep_multipliers(store: Store) -> Iterator[None]:
    """Within it, `D` of a layer (a group of layers that share an input) is taken from `store`, or built and put there.

    Whoever makes an optimiser step has to `clear()` the store after it: a change in place is noticed, but DeepSpeed and
    others write through `.data`, which cannot be seen. `D` (n, b, b) in the dtype of the layer's input stays in memory
    until then, also under activation checkpointing.

    Args:
        store: an empty dict, or one that was filled since the last optimiser step.
    """
    global _store  # not of a context: autograd recomputes checkpointed layers in threads of its own
    before, _store = _store, store
    try:
        yield
    finally:
        _store = before


def keeps_multipliers() -> bool:
    """Whether this pass is inside of `keep_multipliers`, and not traced."""
    return _store is not None and not torch.compiler.is_compiling()


def kept(
    build: Callable[..., torch.Tensor], adapters: Sequence[Any], merged: bool, transposed: bool, dtype: torch.dtype
) -> torch.Tensor:
    """`build(adapters, merged, transposed, dtype)`, which is `delta_kernels.run_deltas`, or what it returned before."""
    if not keeps_multipliers():
        return build(adapters, merged, transposed, dtype)
    assert _store is not None
    trained = [tensor for _, _, *own in adapters for tensor in own if tensor is not None]
    versions = [tensor._version for tensor in trained]
    key = dtype, *map(id, trained)
    if key not in _store or _store[key][1] != versions:
        _store[key] = trained, versions, build(adapters, merged, transposed, dtype)
    return _store[key][2]
