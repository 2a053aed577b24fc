"""What a step of training has changed, in one byte a number: the update that travels to a server.

A step moves every trained number by about the learning rate, so its change fits into int8 with one factor for each
group of neighbours. Nothing accumulates: trainer and server both go on from `decode`, the numbers that the server then
has, and the next change is taken from there. So a server is never further from the trainer than half a factor, 1/254
of the largest change that ONE step has made in a group.

`decode` is a product and a sum in float32 on the CPU, each rounded once: the same bits on every machine.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

GROUP = 128  # numbers that share a factor: 3% more bytes, and most blocks are made of whole groups
CHUNK = 2**13 * GROUP  # worked on at a time, so that what is in between stays in the processor's cache
SMALLEST_FACTOR = 2.0**-100  # some processors are told to flush what is below 2^-126 to zero, others are not
# Beyond which a change goes exactly, by the engine's dtype. In a block of 64, errors of 2^-15 move a weight by some
# 2^-12 of itself, rounding to bfloat16 by up to 2^-8; how far log-probs move: docs/performance.md, "Syncs".
LARGEST_ERROR = {"float32": 2.0**-23, "bfloat16": 2.0**-15, "float16": 2.0**-18}


def encode(new: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The change from `held` to `new`, (N,) in float32.

    Returns:
        int8 numbers (N,), factors (N / GROUP, rounded up), and what `decode` makes of them (N,).
    """
    numbers, after, factors = torch.empty(new.shape, dtype=torch.int8), torch.empty_like(held), []
    for at in range(0, len(new), CHUNK):
        end = min(at + CHUNK, len(new))
        change = _groups(new[at:end] - held[at:end])
        factor = change.abs().amax(1, keepdim=True).div_(127).clamp_(min=SMALLEST_FACTOR)
        change.div_(factor).round_().add_(0.0)  # int8 knows no -0
        numbers[at:end] = change.view(-1)[: end - at]
        torch.add(held[at:end], change.mul_(factor).view(-1)[: end - at], out=after[at:end])
        factors.append(factor.view(-1))
    return numbers, torch.cat(factors), after


def decode(held: torch.Tensor, numbers: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """`held` (N,) after the change, as a new tensor."""
    after = torch.empty_like(held)
    for at in range(0, len(held), CHUNK):
        end = min(at + CHUNK, len(held))
        factor = factors[at // GROUP : -(-end // GROUP)]
        change = _groups(numbers[at:end].float()).mul_(factor.unsqueeze(1)).view(-1)
        torch.add(held[at:end], change[: end - at], out=after[at:end])
    return after


def is_close(factors: torch.Tensor, largest_error: float) -> bool:
    """Whether `encode` has rounded away no more than this anywhere, and everything is finite."""
    return bool(factors.max() / 2 <= largest_error)


def _groups(values: torch.Tensor) -> torch.Tensor:
    return pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
