"""Rows of many adapters in one batch: the kernel and its torch reference against float64, and the fused layer."""

import pytest
import torch
from kernel_cases import DTYPES, INTERPRETED, ROUNDING, kernels, relative_error, run_in_interpreter

from fura_rl.adapter.errors import AdapterError
from fura_rl.adapter.gathered import (
    gathered_linear,
    gathered_transform,
    shard_blocks,
    sort_rows,
    widen_blocks,
)

SLOTS, PARTS = 5, 3
# (n, b): powers of two, the sizes of real models that are none, blocks of several tiles, the smallest
BLOCKS = [(2, 32), (1, 64), (1, 76), (2, 96), (1, 148), (2, 16), (5, 3), (1, 1)]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_kernel_in_the_interpreter():
    run_in_interpreter(__file__)


def case(device, dtype, n, b, rows, seed=0):
    """Random rows; slots with and without an adapter on each part; ids that are none: -1, and what lies in padding."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n * b, generator=generator).to(device, dtype)
    delta = (torch.randn(SLOTS, PARTS, n, b, b, generator=generator) / b**0.5).to(device, dtype)
    active = (torch.rand(SLOTS, PARTS, generator=generator) < 0.8).to(device, torch.int32)
    ids = torch.randint(-1, SLOTS + 1, (rows + 7,), generator=generator, dtype=torch.int32)
    return x, delta, active, torch.where(ids == SLOTS, 2**30, ids).to(device)


def expected(x, delta, active, ids):
    """In float64, row by row."""
    x, delta = x.double().cpu(), delta.double().cpu()
    y = x.repeat(delta.shape[1], 1, 1)
    for part in range(delta.shape[1]):
        for row, slot in enumerate(ids[: len(x)].tolist()):
            if 0 <= slot < delta.shape[0] and active[slot, part]:
                y[part, row] += torch.block_diag(*delta[slot, part]) @ x[row]
    return y


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors are full of NaN, so that an element which is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def check(arguments):
    found = gathered_transform(*arguments)
    assert found.dtype == arguments[0].dtype
    assert relative_error(found, expected(*arguments)) < ROUNDING[found.dtype]
    assert torch.equal(gathered_transform(*arguments, *sorted_rows(*arguments)), found)
    return found


def sorted_rows(x, delta, active, ids, batch=None):
    """An order as long as `ids`: the batch's rows by slot, then what lies beyond them."""
    batch = len(x) if batch is None else batch
    order, starts = sort_rows(ids[:batch], len(delta))
    return torch.cat([order, torch.arange(batch, len(ids), device=ids.device).int()]), starts


def devices(function):
    """On a CPU the torch reference, in the interpreter's process and on a CUDA device the kernel."""
    return (kernels if INTERPRETED else pytest.mark.parametrize("device", ["cpu", *cuda()]))(function)


def cuda():
    return [value for value in kernels.args[1] if value != "cpu"]


@devices
@pytest.mark.parametrize(("n", "b"), BLOCKS)
def test_every_block_size(device, n, b):
    check(case(device, torch.bfloat16, n, b, rows=37))


@devices
@pytest.mark.parametrize(
    ("dtype", "rows"), [(dtype, 17) for dtype in DTYPES] + [(torch.bfloat16, n) for n in (1, 16, 300)]
)
def test_any_number_of_rows(device, dtype, rows):
    check(case(device, dtype, 2, 20, rows))


@devices
def test_no_rows(device):
    x, *rest = case(device, torch.float32, 2, 16, rows=4)
    assert gathered_transform(x[:0], *rest).shape == (PARTS, 0, 32)


@devices
def test_rows_without_an_adapter_are_untouched_and_neighbours_do_not_matter(device):
    """Bit for bit; the other adapters' blocks are NaN where they must not be read."""
    x, delta, active, ids = case(device, torch.bfloat16, 2, 24, rows=24, seed=3)
    found = check((x, delta, active, ids))
    none = (ids[:24] < 0) | (ids[:24] >= SLOTS)
    assert none.any() and torch.equal(found[:, none], x[none].expand(PARTS, -1, -1))
    inactive = torch.where((active == 0)[:, :, None, None, None], torch.nan, delta)
    assert torch.equal(gathered_transform(x, inactive, active, ids), found)
    alone = [gathered_transform(x[i : i + 1], delta, active, ids[i : i + 1]) for i in range(24)]
    gap = (torch.cat(alone, dim=1).float() - found.float()).abs().max()
    assert gap == 0 if INTERPRETED or device == "cuda" else gap < 0.04  # torch multiplies one row in another order


@devices
@pytest.mark.parametrize("batch", [0, 1, 9, 20])
def test_rows_beyond_the_batch_are_untouched(device, batch):
    """A captured graph has more rows than the batch, whose memory may hold an older batch's slots."""
    x, delta, active, ids = case(device, torch.float32, 2, 16, rows=20)
    known = sorted_rows(x, delta, active, ids, batch)
    own = torch.cat([ids[:batch], torch.full_like(ids[batch:], -1)])
    found = gathered_transform(x, delta, active, own, *known)
    assert relative_error(found, expected(x, delta, active, own)) < ROUNDING[torch.float32]
    assert torch.equal(found[:, batch:], x[batch:].expand(PARTS, -1, -1))


@devices
def test_many_small_groups(device):
    """More slots than rows, and groups that fill several tiles with a rest."""
    generator = torch.Generator().manual_seed(5)
    slots = 33
    delta = (torch.randn(slots, 1, 2, 16, 16, generator=generator) / 4).to(device)
    active = torch.ones(slots, 1, dtype=torch.int32, device=device)
    for ids in ([32, 0, 31], [7] * 17 + [-1] * 16 + [32] * 33 + [0]):
        x = torch.randn(len(ids), 32, generator=generator).to(device)
        check((x, delta, active, torch.tensor(ids, dtype=torch.int32, device=device)))


def test_the_order_of_rows():
    order, starts = sort_rows(torch.tensor([2, -1, 0, 5, 2, 3], dtype=torch.int32), 3)
    assert order.tolist() == [1, 3, 5, 2, 0, 4]
    assert starts.tolist() == [3, 4, 4, 6]


@devices
def test_rows_of_a_wider_tensor(device):
    x, *rest = case(device, torch.float32, 2, 16, rows=20)
    wide = torch.cat([x, x], dim=1)[:, :32]
    assert wide.stride(0) == 64
    check((wide, *rest))


@devices
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [[7, 3, 3], [8], [5, 5], [2, 3, 4]])
def test_fused_layers(device, bias, sizes):
    """Each part's rows of the weight see their own multiplier; leading dimensions are kept."""
    generator = torch.Generator().manual_seed(1)
    x, delta, active, ids = case(device, torch.float32, 3, 16, rows=24)
    delta, active = delta[:, : len(sizes)].contiguous(), active[:, : len(sizes)].contiguous()
    weight = torch.randn(sum(sizes), 48, generator=generator).to(device)
    offset = torch.randn(sum(sizes), generator=generator).to(device) if bias else None
    arguments = (x.view(2, 12, 48), weight, offset, delta, active, ids, *sorted_rows(x, delta, active, ids))
    found = gathered_linear(*arguments, torch.tensor([9, 24]), sizes)
    inputs = expected(x, delta, active, ids)
    rows = zip(inputs, weight.double().cpu().split(sizes), strict=True)
    reference = torch.cat([y @ w.T for y, w in rows], dim=1).view(2, 12, -1)
    assert relative_error(found, reference if offset is None else reference + offset.double().cpu()) < 1e-5
    order = torch.full_like(ids, 2**30)  # a longer batch's: not of use here, and must not be read
    assert torch.equal(gathered_linear(*arguments[:-2], order, arguments[-1], torch.tensor([9, 25]), sizes), found)
    base = gathered_linear(*arguments, torch.tensor([0, 24]), sizes)
    assert torch.equal(base, torch.nn.functional.linear(arguments[0], weight, offset))


@devices
def test_the_operator_compiles(device):
    """As one opaque node that still reads `counts` at run time."""
    x, delta, active, ids = case(device, torch.float32, 2, 16, rows=8)
    weight = torch.randn(6, 32, device=device)
    (order, starts), counts = sorted_rows(x, delta, active, ids), torch.tensor([0, 8])

    def layer(x):
        return gathered_linear(x, weight, None, delta, active, ids, order, starts, counts, [2, 2, 2]) * 2

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    base = compiled(x)
    counts[0] = 5
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), base)


@pytest.mark.parametrize("b", [2, 3, 6, 12])
def test_wider_blocks_are_the_same_multiplier(b):
    delta = torch.randn(24 // b, b, b, generator=torch.Generator().manual_seed(b))
    wide = widen_blocks(delta, 12)
    assert wide.shape == (2, 12, 12)
    assert torch.equal(torch.block_diag(*wide), torch.block_diag(*delta))


def test_blocks_that_do_not_fit_are_refused():
    with pytest.raises(AdapterError, match="blocks of 8 do not fit into blocks of 12"):
        widen_blocks(torch.zeros(3, 8, 8), 12)
    with pytest.raises(AdapterError, match="blocks of 6 do not fit into blocks of 12"):
        widen_blocks(torch.zeros(3, 6, 6), 12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_together_are_the_whole(ranks):
    """A sharded input, multiplied by each rank's blocks and by its columns of the weight, sums to the whole."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(8, 4, 4, generator=generator, dtype=torch.float64)
    x, weight = (torch.randn(5, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    whole = (x + x @ torch.block_diag(*delta).T) @ weight.T
    total = torch.zeros_like(whole)
    for rank in range(ranks):
        own = shard_blocks(delta, rank, ranks)
        x_r, weight_r = (tensor.chunk(ranks, dim=1)[rank] for tensor in (x, weight))
        total += (x_r + x_r @ torch.block_diag(*own).T) @ weight_r.T
    assert torch.allclose(total, whole)


def test_a_block_on_two_ranks_is_refused():
    with pytest.raises(AdapterError, match="8 blocks of 4 features cannot be divided between 3 ranks"):
        shard_blocks(torch.zeros(8, 4, 4), 0, 3)
