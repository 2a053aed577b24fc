"""An adapter's tensors on their way to an engine's device, and what is refused there."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file

from fura_rl.adapter.errors import AdapterError
from fura_rl.adapter.loading import ORTHOGONALITY, PEFT_PREFIX, are_sound, check_values
from fura_rl.rollout.payload import Adapter, pack, read_folder, unpack

ELSEWHERE = torch.device("cuda" if torch.cuda.is_available() else "cpu:0")  # no tensor says that it is on "cpu:0"


@pytest.fixture
def adapter(adapter_dir):
    return read_folder(adapter_dir / "a", check=False)


def test_every_tensor_arrives_where_it_belongs(adapter):
    mixed = {name: dict(tensors) for name, tensors in adapter.modules.items()}
    first, second = list(mixed)[:2]
    mixed[first]["core"] = mixed[first]["core"].half()
    mixed[second]["bias"] = torch.arange(3)
    adapter = Adapter(adapter.family, mixed)
    threads = torch.get_num_threads()
    there = adapter.to(ELSEWHERE)
    assert torch.get_num_threads() == threads
    assert there is not adapter and there.modules.keys() == adapter.modules.keys()
    for name, tensors in adapter.modules.items():
        assert there.modules[name].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(there.modules[name][key].cpu(), value.float())
    adapter.check_values(there)


@pytest.mark.parametrize("key, spoil, reason", [
    ("core", lambda t: t.view(-1)[5].fill_(torch.nan), "core of {} holds NaN or infinite"),
    ("scale", lambda t: t.view(-1)[-1].fill_(-torch.inf), "scale of {} holds NaN or infinite"),
    ("base_sample", lambda t: t[63].fill_(torch.nan), "base_sample of {} holds NaN or infinite"),
    ("sigma", lambda t: t.view(-1)[5].zero_(), "sigma of {} is not positive"),
    ("basis", lambda t: t[0, 0].zero_(), "basis of {} is not orthogonal"),
    ("basis", lambda t: t.fill_(1e30), "basis of {} is not orthogonal"),
])  # fmt: skip
@pytest.mark.parametrize("elsewhere", [True, False])
def test_bad_values_are_refused_with_their_place(adapter, key, spoil, reason, elsewhere):
    name = list(adapter.modules)[3]
    adapter.modules[name][key] = spoiled = adapter.modules[name][key].clone()
    spoil(spoiled)
    with pytest.raises(AdapterError, match=reason.format(name)):
        adapter.check_values(adapter.to(ELSEWHERE) if elsewhere else None)


@pytest.mark.parametrize("key, change", [
    ("basis", lambda t: t[0, 0]),
    ("basis", lambda t: t[0, 0, 0]),
    ("basis", lambda t: t[:0]),
    ("core", lambda t: t.to(torch.complex64)),
    ("core", lambda t: t.to(torch.float8_e4m3fn)),
    ("scale", lambda t: t.view(-1)[0]),
])  # fmt: skip
def test_tensors_of_no_adapter_are_refused_in_a_sentence(adapter, adapter_dir, tmp_path, key, change):
    """In a worker of several ranks any other exception would end the engine."""
    name = list(adapter.modules)[3]
    adapter.modules[name][key] = change(adapter.modules[name][key])
    data = pack(adapter)
    with pytest.raises(AdapterError, match=f"{key} of {name} is of torch.* and shape .*: the adapter is corrupted"):
        unpack(data)
    shutil.copytree(adapter_dir / "a", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME)
    key = f"{PEFT_PREFIX}{name}.fura_blocks.{key}"
    save_file({**tensors, key: change(tensors[key]).clone()}, tmp_path / SAFETENSORS_WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="the adapter is corrupted"):
        read_folder(tmp_path, check=False)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["core", "sigma", "basis"]), st.integers(0, 2**31), st.floats(0, 2.5 * ORTHOGONALITY))
def test_all_at_once_nothing_passes_that_is_refused_one_by_one(key, seed, error):
    generator = torch.Generator().manual_seed(seed)
    stack = torch.linalg.qr(torch.randn(3, 2, 8, 8, generator=generator))[0]  # three modules
    if key == "sigma":
        stack = (2 * error - ORTHOGONALITY) + torch.rand(3, 2, 8, generator=generator)
    else:
        stack[1] *= 1 + error
    try:
        for tensor in stack:
            check_values("layer", {key: tensor})
        accepted = True
    except AdapterError:
        accepted = False
    assert accepted or not are_sound([(key, stack)])
    if key != "basis" or error < ORTHOGONALITY / 5:
        assert are_sound([(key, stack)]) == accepted
