"""What travels to a server, without one: bytes, bits and what an update may change."""

import json
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from syncs import make_policy

from fura_rl.errors import FuraError
from fura_rl.rollout.change import GROUP, LARGEST_ERROR, decode, encode, is_close
from fura_rl.rollout.payload import Adapter, StaleUpdateError, pack, pack_update, unpack
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of


def collect(policy):
    return adapter_of(policy, lambda parameters: nullcontext())


@pytest.fixture
def policy(tiny_model):
    torch.manual_seed(0)
    return make_policy(tiny_model)


@torch.no_grad()
def step(policy, size=1e-3):
    """What a step of AdamW does at most: every number moves by up to the learning rate."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.add_(size * (2 * torch.rand_like(parameter) - 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5 * GROUP + 3), st.integers(-60, 3), st.integers(0, 2**31))
def test_an_encoded_change_is_off_by_at_most_half_a_factor(size, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    held = torch.randn(size, generator=generator)
    new = held + 2.0**exponent * torch.randn(size, generator=generator)
    numbers, factors, after = encode(new, held)
    assert torch.equal(after, decode(held, numbers, factors))
    assert numbers.dtype == torch.int8 and numbers.shape == (size,) and factors.shape == (-(-size // GROUP),)
    half = factors.repeat_interleave(GROUP)[:size] / 2
    spacing = 2.0**-23 * torch.maximum(after.abs(), new.abs())  # of the difference and of the sum
    assert ((after - new).abs() <= 1.001 * half + spacing).all()


def test_what_does_not_change_is_not_touched():
    held = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    new = held.clone()
    new[300] += 1e-3
    _, _, after = encode(new, held)
    changed = after != held
    assert changed[300] and not changed[: 2 * GROUP].any() and not changed[3 * GROUP :].any()


def test_both_ends_get_the_same_bits_whatever_their_threads_and_memory():
    generator = torch.Generator().manual_seed(0)
    held = torch.randn(3 * 2**20 + 77, generator=generator)
    held[::7] = -0.0
    numbers, factors, there_first = encode(held + 1e-4 * torch.randn(held.shape, generator=generator), held)
    here = decode(held, numbers, factors)
    shifted = torch.empty(len(held) + 1)[1:].copy_(held)  # no vector of the processor begins where it did
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    there = decode(shifted, numbers.clone(), factors.clone())
    torch.set_num_threads(threads)
    by_hand = held.numpy() + numbers.numpy().astype("float32") * factors.repeat_interleave(GROUP)[: len(held)].numpy()
    found = [tensor.view(torch.int32) for tensor in (here, there, there_first, torch.from_numpy(by_hand))]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_pushes_in_a_row_do_not_add_up_errors(policy):
    """Twenty steps, each encoded on top of what the server has: as far from the trainer as after one."""
    held = collect(policy)
    server = unpack(pack(held))
    worst = []
    for _ in range(20):
        step(policy)
        adapter = collect(policy)
        held, data = pack_update(adapter, held, LARGEST_ERROR["bfloat16"])
        server = unpack(data, server)
        assert server.checksum == held.checksum and torch.equal(server.trained, held.trained)
        worst.append(float((held.trained - adapter.trained).abs().max()))
    assert max(worst) < 1e-3 / 250  # twice the step over 254, were there no error of the step before
    assert max(worst[10:]) < 1.2 * max(worst[:10])
    assert (held.trained - collect(policy).trained).abs().max() > 0


@pytest.mark.parametrize(
    "size, dtype, kind",
    [
        (1e-5, "float32", "int8"),
        (1e-4, "float32", "exact"),
        (1e-3, "bfloat16", "int8"),
        (1e-2, "bfloat16", "exact"),
        (1e-4, None, "exact"),
    ],
)
def test_a_change_too_large_for_eight_bits_goes_exactly(policy, size, dtype, kind):
    held = collect(policy)
    step(policy, size)
    adapter = collect(policy)
    after, data = pack_update(adapter, held, LARGEST_ERROR.get(dtype, 0.0))
    assert torch.equal(after.trained, adapter.trained) == (kind == "exact")
    assert len(data) == pytest.approx(adapter.trained.numel() * (4 if kind == "exact" else 1 + 4 / GROUP), rel=0.01)
    assert unpack(data, unpack(pack(held))).checksum == after.checksum


def test_what_is_not_finite_goes_exactly_and_is_refused(policy):
    held = collect(policy)
    for value in (float("nan"), float("inf")):
        trained = held.trained.clone()
        trained[5] = value
        _, data = pack_update(held.with_trained(trained), held, LARGEST_ERROR["bfloat16"])
        with pytest.raises(FuraError, match="NaN or infinite"):
            unpack(data, held)
    assert is_close(torch.tensor([1e-9, 1.9]), 1.0)
    assert not any(is_close(torch.tensor([1e-9, factor]), 1.0) for factor in (2.1, float("nan"), float("inf")))


def test_bytes_of_another_make_are_one_sentence(policy):
    """Whatever a client sends: an exception of another kind could end an engine with several ranks."""
    held = collect(policy)
    numbers, factors, _ = encode(held.trained, held.trained)
    base = {"base": held.checksum}
    for tensors, header in (
        ({}, {"kind": "full", "family": "no JSON"}),
        ({}, {"kind": "full", "family": "3"}),
        ({}, {"kind": "full", "family": json.dumps({"side": "input"})}),
        ({}, {"kind": "int8", **base}),
        ({"numbers": numbers, "factors": factors[:, None]}, {"kind": "int8", **base}),
        ({"numbers": numbers, "factors": factors[0]}, {"kind": "int8", **base}),
        ({"numbers": numbers.short(), "factors": factors}, {"kind": "int8", **base}),
        ({"trained": held.trained.half()}, {"kind": "exact", **base}),
        ({"trained": held.trained[1:]}, {"kind": "exact", **base}),
        ({"trained": held.trained}, {"kind": "exact"}),
    ):
        tensors = {key: value.contiguous() for key, value in tensors.items()} or {"trained": torch.zeros(1)}
        with pytest.raises(FuraError, match=r"packed|another adapter than the one sent before"):
            unpack(save(tensors, metadata=header), held)


def test_an_update_of_another_adapter_is_stale(policy):
    """Of none, of one before the last, and of the same one twice: an answer that was lost on the way."""
    first = collect(policy)
    step(policy)
    second, data = pack_update(collect(policy), first, LARGEST_ERROR["bfloat16"])
    with pytest.raises(StaleUpdateError, match="another adapter than the one that was sent last"):
        unpack(data)
    server = unpack(data, unpack(pack(first)))
    assert server.checksum == second.checksum
    with pytest.raises(StaleUpdateError):
        unpack(data, server)
    with pytest.raises(FuraError, match="no adapter that fura-rl has packed"):
        unpack(data[:-5], first)
    cut = Adapter(first.family, {name: first.modules[name] for name in list(first.modules)[1:]})
    with pytest.raises(FuraError, match="belongs to another adapter"):
        cut.with_trained(second.trained)


def test_the_checksum_is_of_every_tensor(policy):
    adapter = collect(policy)
    module = next(iter(adapter.modules))
    seen = {adapter.checksum, Adapter({**adapter.family, "side": "output"}, adapter.modules).checksum}
    for key, value in adapter.modules[module].items():
        other = value.clone()
        other.view(-1)[-1] += 1
        seen.add(Adapter(adapter.family, {**adapter.modules, module: {**adapter.modules[module], key: other}}).checksum)
    seen.add(Adapter(adapter.family, {f"x{name}": tensors for name, tensors in adapter.modules.items()}).checksum)
    assert len(seen) == 3 + len(adapter.modules[module])
    whole = unpack(pack(adapter))
    assert whole.checksum == adapter.checksum and whole.modules.keys() == adapter.modules.keys()


def test_frozen_tensors_are_read_again_when_they_change(policy):
    """`refresh_basis`, a loaded adapter and a write in place are seen; a step of training changes none."""
    first = collect(policy)
    step(policy)
    assert collect(policy).shares_frozen(first)
    layers = [m for m in policy.modules() if hasattr(m, "fura_blocks")]
    blocks = layers[0].fura_blocks["default"]
    blocks.sigma.mul_(1.0)  # a write, though of the same values
    second = collect(policy)
    assert not second.shares_frozen(first) and torch.equal(second.trained, collect(policy).trained)
    with layers[1].reading_weight() as weight:
        layers[1].fura_blocks["default"].refresh(weight)
    third = collect(policy)
    assert not third.shares_frozen(second) and not third.shares_frozen(first)
    assert sum("fold" in tensors for tensors in third.modules.values()) == 1
    blocks.basis = blocks.basis.clone()
    assert not collect(policy).shares_frozen(third)


def test_an_unknown_form_is_refused():
    with pytest.raises(FuraError, match="vllm_push is int8 or exact, not 'int4'"):
        AdapterVLLMClient("http://127.0.0.1:1", form="int4")


def test_an_adapter_without_a_core_is_one_sentence(policy):
    adapter = collect(policy)
    modules = {name: {k: v for k, v in tensors.items() if k != "core"} for name, tensors in adapter.modules.items()}
    with pytest.raises(FuraError, match="lacks the core of model"):
        unpack(pack(Adapter(adapter.family, modules))).to(torch.device("cpu")).multipliers(torch.device("cpu"))


def test_another_device_gets_everything_but_the_samples(policy):
    """The CPU's copies stay as they are; an update there has the frozen tensors of before."""
    adapter = collect(policy)
    there = adapter.to(torch.device("meta"))
    for name, tensors in adapter.modules.items():
        assert tensors.keys() == there.modules[name].keys()
        for key, value in there.modules[name].items():
            assert value.is_meta == (key != "base_sample") and value.shape == tensors[key].shape
    updated = there.with_trained(adapter.trained.to("meta"))
    assert updated.shares_frozen(there) and updated.to(torch.device("meta")) is updated
