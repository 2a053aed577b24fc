"""Bases computed by several ranks, each a share of the layers, and sent to all: the same bits everywhere.

Without it every rank computes every basis, and ranks on different machines may end with singular vectors that differ in
their last bits, or in more where a block has equal singular values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from transformers.integrations import is_fsdp_enabled

from .blocks import FuraBlocks


class _Split:
    """The blocks of one injection in the model's order, which is every rank's; their ranks take turns.

    With accelerate's `cpu_ram_efficient_loading` transformers gives the weights to the first rank and zeros to others,
    until FSDP spreads them: then the first does it all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.blocks: list[FuraBlocks] = []
        self.ranks = 1 if is_fsdp_enabled() else dist.get_world_size()

    def set_basis(self, blocks: FuraBlocks, weight: torch.Tensor | None) -> int:
        turn = len(self.blocks) % self.ranks
        self.blocks.append(blocks)
        return blocks.set_basis(weight) if turn == dist.get_rank() else 0

    def share(self) -> None:
        for i, blocks in enumerate(self.blocks):
            for tensor in (blocks.basis, blocks.sigma, blocks.base_sample):
                if tensor is not None:
                    sent = tensor.to(self.device)
                    dist.broadcast(sent, src=i % self.ranks)
                    tensor.copy_(sent)
        self.blocks.clear()


_split: ContextVar[_Split | None] = ContextVar("split", default=None)


@contextmanager
def split_bases(device: torch.device) -> Iterator[None]:
    """Adapters that are put into a model inside this block get their bases from all ranks together.

    Every rank must put the same adapter into the same model. Without several ranks nothing is different.

    Args:
        device: Of the tensors that the process group can send.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    token = _split.set(_Split(device) if several else None)
    try:
        yield
    finally:
        _split.reset(token)


def set_basis(blocks: FuraBlocks, weight: torch.Tensor | None) -> int:
    """`blocks.set_basis(weight)`, or nothing if it is another rank's turn; see `share_bases`."""
    split = _split.get()
    return blocks.set_basis(weight) if split is None else split.set_basis(blocks, weight)


def share_bases() -> None:
    """Sends each basis that was set since the last call from the rank that computed it to all others."""
    split = _split.get()
    if split is not None:
        split.share()
