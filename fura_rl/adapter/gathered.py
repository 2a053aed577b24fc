"""A linear layer whose input is multiplied, row by row, by one of several adapters: what an engine needs that serves
many adapters at once.

Adapters stand in numbered slots of one tensor, whose memory never moves. A layer may be fused of several parts (q, k,
v) that share an input and have multipliers of their own.

Shapes: T rows, K = n * b features, n blocks, b block size, S parts of a fused layer, A slots.
"""

import itertools

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


def sort_rows(ids: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in the order of their slots, those without one first: what `gathered_transform`'s kernel goes by.

    Args:
        ids: (T,) the slot of each row; anything below 0 or from `slots` on stands for none.
        slots: A.

    Returns:
        A permutation of the rows (T,), and (A + 1,) where in it each slot's rows begin, and where the last ones end;
        both int32.
    """
    known, order = torch.where(ids < slots, ids, -1).clamp(min=-1).sort(stable=True)
    starts = torch.searchsorted(known, torch.arange(slots + 1, dtype=known.dtype, device=known.device))
    return order.int(), starts.int()


def gathered_transform(
    x: torch.Tensor,
    delta: torch.Tensor,
    active: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x + x D^T` for each part, with the `D` of each row's slot.

    Args:
        x: (T, K).
        delta: (A, S, n, b, b).
        active: (A, S) int32; zero where a slot's adapter leaves a part as it is: its `D` is not read.
        ids: at least T, int32: the slot of each row; anything below 0 or from A on stands for none.
        order, starts: `sort_rows` of a batch of at most T rows; beyond these, `order` has each row itself. Found here
            if None; on the CPU, not used.

    Returns:
        (S, T, K) in the dtype of `x`; rows without a slot are exactly those of `x`.
    """
    if transform.HAVE_KERNELS and (
        transform.kernel_choice == "triton" or (transform.kernel_choice == "auto" and x.is_cuda)
    ):
        if order is None or starts is None:
            order, starts = sort_rows(ids[: x.shape[0]], delta.shape[0])
        return gathered_kernels.run_gathered(x, delta, active, order, starts)
    y_STK = x.expand(delta.shape[1], *x.shape).clone()
    ids = ids[: x.shape[0]]
    for slot in ids.unique().tolist():
        if not 0 <= slot < delta.shape[0]:
            continue
        rows = (ids == slot).nonzero().squeeze(1)
        for part in active[slot].nonzero().squeeze(1).tolist():
            y_STK[part, rows] = transform.block_transform(x[rows], delta[slot, part])
    return y_STK


def linear_parts(
    y_STK: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: list[int]
) -> torch.Tensor:
    """`y W^T + bias` of each part, side by side, (T, rows); neighbouring parts of one size in one batched product."""
    T = y_STK.shape[1]
    out = y_STK.new_empty(T, weight.shape[0]) if bias is None else bias.expand(T, -1).clone()
    part = row = 0
    for size, same in itertools.groupby(sizes):
        count = len(list(same))
        rows = slice(row, row + count * size)
        weight_SKR = weight[rows].view(count, size, -1).transpose(1, 2)
        out_STR = out[:, rows].view(T, count, size).transpose(0, 1)
        y = y_STK[part : part + count]
        if bias is not None:
            out_STR.baddbmm_(y, weight_SKR) if count > 1 else out_STR[0].addmm_(y[0], weight_SKR[0])
        elif count > 1:
            torch.bmm(y, weight_SKR, out=out_STR)  # into its columns, without a copy
        else:
            torch.mm(y[0], weight_SKR[0], out=out_STR[0])
        part, row = part + count, rows.stop
    return out


# Opaque to torch.compile, so that what is read from `counts` is not traced. It lies in CPU memory: reading it does not
# wait for the device, and while a CUDA graph is captured it decides what the graph holds.
torch.library.define(
    "fura::gathered_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor delta, Tensor active, Tensor ids, Tensor order, Tensor starts,"
    " Tensor counts, int[] sizes) -> Tensor",
)


def gathered_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    delta: torch.Tensor,
    active: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    """`gathered_transform`, then each part's `x W^T + bias`. For inference: it has no gradient.

    Args:
        x: (*, K).
        weight: (rows, K), the weights of all parts one below the other.
        bias: (rows) or None.
        delta, active, ids, order, starts: see `gathered_transform`.
        counts: two ints in CPU memory: the rows that have a slot, without any of which nothing is transformed, and the
            rows of the batch.
        sizes: the rows of each part.

    Returns:
        (*, rows).
    """
    return torch.ops.fura.gathered_linear(x, weight, bias, delta, active, ids, order, starts, counts, sizes)


@torch.library.impl("fura::gathered_linear", ("cpu", "cuda"))
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    delta: torch.Tensor,
    active: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    sizes: list[int],
) -> torch.Tensor:
    adapted, batch = counts.tolist()
    if not adapted:
        return F.linear(x, weight, bias)
    x_TK = x.reshape(-1, x.shape[-1])
    known = (order, starts) if batch <= len(x_TK) else (None, None)
    y_STK = gathered_transform(x_TK, delta, active, ids, *known)
    out = F.linear(y_STK[0], weight, bias) if len(sizes) == 1 else linear_parts(y_STK, weight, bias, sizes)
    return out.view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("fura::gathered_linear")
def _(x, weight, bias, delta, active, ids, order, starts, counts, sizes):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
