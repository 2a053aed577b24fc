"""`D` is built once for the forward passes between two optimiser steps, and never taken for that of other weights.

Runs in Triton's interpreter on a CPU, as `test_kernels.py` does.
"""

import pytest
import torch
from kernel_cases import INTERPRETED, inputs, kernels, run_in_interpreter
from peft import get_peft_model
from tiny_nets import adapted_llama, fura_layers, loss_and_gradients
from torch import nn

from fura_rl.adapter import FuraConfig, multiplied_weight
from fura_rl.adapter.multipliers import keep_multipliers

GROUPS = 4  # the inputs of a decoder layer: of q, k, v; of o; of gate and up; of down


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_kept_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture
def launches(monkeypatch):
    """A list that grows with each launch of the kernel that builds `D`."""
    from fura_rl.adapter import delta_kernels

    calls, run = [], delta_kernels.delta_kernel
    monkeypatch.setattr(delta_kernels, "delta_kernel", lambda *args, **how: calls.append(1) or run(*args, **how))
    return calls


def assert_equal(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


def trained(device, **options):
    return adapted_llama(torch.bfloat16, layers=1, **options).to(device).train()


@kernels
@pytest.mark.parametrize(
    ("choice", "options", "checkpointing"),
    [
        ("auto", {}, True),
        ("inputs", {"singular_values": "merged"}, False),
        ("inputs", {"side": "output", "hidden_act": "gelu"}, False),
    ],
)
def test_later_micro_batches_find_it(device, choice, options, checkpointing, launches, monkeypatch):
    monkeypatch.setattr(multiplied_weight, "choice", choice)
    monkeypatch.setattr(multiplied_weight, "pays", lambda rows, bases: True)
    model = trained(device, **options)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    expected = loss_and_gradients(model)
    built = len(launches)
    launches.clear()
    store = {}
    with keep_multipliers(store):
        for _ in range(2):
            assert_equal(loss_and_gradients(model), expected)
    of_a_pass = 7 if options.get("side") == "output" else GROUPS
    assert len(launches) == len(store) == of_a_pass == built // (1 + checkpointing)


@kernels
def test_weights_changed_in_place(device, launches):
    """By an optimiser inside of the round; by one that writes where no version is counted, after which one clears."""
    store = {}
    model = trained(device)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    with keep_multipliers(store):
        before = loss_and_gradients(model)["loss"]
        optimiser.step()
        with_new = loss_and_gradients(model)
    assert_equal(with_new, loss_and_gradients(model))
    assert with_new["loss"] != before
    for layer in fura_layers(model).values():
        layer.fura_blocks["default"].core.data = layer.fura_blocks["default"].core.data * 3
    store.clear()
    with keep_multipliers(store):
        assert_equal(loss_and_gradients(model), loss_and_gradients(model))
        assert loss_and_gradients(model)["loss"] != with_new["loss"]


@kernels
def test_other_dtypes_and_adapters_have_their_own(device, launches):
    model = trained(device)
    model.add_adapter("other", FuraConfig(target_modules="all-linear", init_weights=False))
    model.to(device)
    with keep_multipliers({}):
        first = loss_and_gradients(model)
        model.set_adapter("other")
        other = loss_and_gradients(model)
        model.set_adapter("default")
        model.float()
        precise = loss_and_gradients(model)
    assert len(launches) == 3 * GROUPS
    assert len({float(results["loss"]) for results in (first, other, precise)}) == 3
    assert_equal(precise, loss_and_gradients(model))
    assert len(launches) == 4 * GROUPS  # outside of it, nothing is kept


@kernels
def test_traced_steps_keep_nothing(device):
    """Their compiler may use the memory of `D` for something else."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(32, 32)), FuraConfig(target_modules=["0"])).to(device)
    x = inputs(device, torch.float32, 4, 8, 6)[0].requires_grad_()
    store = {}
    with keep_multipliers(store):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
        assert not store
        model(x)
        assert len(store) == 1


def test_without_kernels_nothing_is_kept():
    if INTERPRETED:
        pytest.skip("here are kernels")
    model, store = adapted_llama(), {}
    expected = loss_and_gradients(model)
    with keep_multipliers(store):
        assert_equal(loss_and_gradients(model), expected)
    assert not store
