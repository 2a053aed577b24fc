"""A linear layer whose input is multiplied, row by row, by one of several adapters: what an engine needs that serves
many adapters at once.

Adapters stand in numbered slots of one tensor, whose memory never moves. A layer may be fused of several parts (q, k,
v) that share an input and have multipliers of their own.

Shapes: T rows, K = n * b features, n blocks, b block size, S parts of a fused layer, A slots.
"""

import torch
from torch.nn import functional as F

from . import transform
from .errors import AdapterError

if transform.HAVE_KERNELS:
    from . import gathered_kernels


def widen_blocks(delta: torch.Tensor, block_size: int) -> torch.Tensor:
    """The same multiplier in larger blocks: (n, b, b) as (n * b / block_size, block_size, block_size).

    Raises:
        AdapterError: `block_size` is no multiple of b, or does not divide n * b.
    """
    n, b, _ = delta.shape
    if b == block_size:
        return delta
    if block_size % b or (n * b) % block_size:
        raise AdapterError(f"blocks of {b} do not fit into blocks of {block_size}.")
    count = block_size // b
    wide = delta.new_zeros(n // count, count, b, count, b)
    for i in range(count):
        wide[:, i, :, i] = delta[i::count]
    return wide.view(n // count, block_size, block_size)


def shard_blocks(delta: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The blocks (n / ranks, b, b) of the features that one of `ranks` equal shards of the input holds.

    Raises:
        AdapterError: a block would lie in two shards.
    """
    n, b, _ = delta.shape
    if n % ranks:
        raise AdapterError(
            f"{n} blocks of {b} features cannot be divided between {ranks} ranks: a block would lie on two of them."
        )
    return delta[rank * (n // ranks) : (rank + 1) * (n // ranks)]


def gathered_transform(
    x: torch.Tensor, delta: torch.Tensor, active: torch.Tensor, ids: torch.Tensor, order: torch.Tensor | None = None
) -> torch.Tensor:
    """`x + x D^T` for each part, with the `D` of each row's slot.

    Args:
        x: (T, K).
        delta: (A, S, n, b, b).
        active: (A, S) int32; zero where a slot's adapter leaves a part as it is: its `D` is not read.
        ids: at least T, int32: the slot of each row; anything below 0 or from A on stands for none.
        order: at least T, int32, the first T a permutation of the rows: in which the kernel takes them. Sorted by slot,
            it has less to read; the result is the same.

    Returns:
        (S, T, K) in the dtype of `x`; rows without a slot are exactly those of `x`.
    """
    if transform.HAVE_KERNELS and (
        transform.kernel_choice == "triton" or (transform.kernel_choice == "auto" and x.is_cuda)
    ):
        return gathered_kernels.run_gathered(x, delta, active, ids, order)
    y_STK = x.expand(delta.shape[1], *x.shape).clone()
    ids = ids[: x.shape[0]]
    for slot in ids.unique().tolist():
        if not 0 <= slot < delta.shape[0]:
            continue
        rows = (ids == slot).nonzero().squeeze(1)
        for part in active[slot].nonzero().squeeze(1).tolist():
            y_STK[part, rows] = transform.block_transform(x[rows], delta[slot, part])
    return y_STK


# Opaque to torch.compile, so that what is read from `counts` is not traced. It lies in CPU memory: reading it does not
# wait for the device, and while a CUDA graph is captured it decides what the graph holds.
torch.library.define(
    "fura::gathered_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor active, Tensor ids, Tensor order, Tensor counts,"
    " int[] sizes) -> Tensor",
)


def gathered_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    delta: torch.Tensor,
    active: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    """`gathered_transform`, then each part's `x W^T + bias`. For inference: it has no gradient.

    Args:
        x: (*, K).
        weight: (rows, K), the weights of all parts one below the other.
        bias: (rows) or None.
        delta, active, ids: see `gathered_transform`.
        order: at least T, int32; begins with a permutation of the batch's rows, beyond them each row stands for itself.
        counts: two ints in CPU memory: the rows that have a slot, without any of which nothing is transformed, and the
            rows of the batch.
        sizes: the rows of each part.

    Returns:
        (*, rows).
    """
    return torch.ops.fura.gathered_linear(x, weight, bias, delta, active, ids, order, counts, sizes)


@torch.library.impl("fura::gathered_linear", ("cpu", "cuda"))
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    delta: torch.Tensor,
    active: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    counts: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    adapted, batch = counts.tolist()
    if not adapted:
        return F.linear(x, weight, bias)
    x_TK = x.reshape(-1, x.shape[-1])
    y_STK = gathered_transform(x_TK, delta, active, ids, order if batch <= len(x_TK) else None)
    if len(sizes) == 1:
        out = F.linear(y_STK[0], weight, bias)
    elif bias is None:
        out = x.new_empty(y_STK.shape[1], weight.shape[0])
        for y_TK, weight_s, out_s in zip(y_STK, weight.split(sizes), out.split(sizes, dim=1), strict=True):
            torch.mm(y_TK, weight_s.T, out=out_s)  # into its columns, without a copy
    else:
        parts = zip(y_STK, weight.split(sizes), bias.split(sizes), strict=True)
        out = torch.cat([F.linear(*part) for part in parts], dim=1)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("fura::gathered_linear")
def _(x, weight, bias, delta, active, ids, order, counts, sizes):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
