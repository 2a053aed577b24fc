"""Layers that read `silu(gate) * up`: the kernel against float64, models against themselves, and when it is not used.

Runs in Triton's interpreter on a CPU, as `test_kernels.py` does.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from kernel_cases import DTYPES, INTERPRETED, ROUNDING, inputs, kernels, relative_error, run_in_interpreter
from tiny_nets import adapted_llama, loss_and_gradients, tokens
from torch.nn.functional import gelu, silu
from torch.utils.checkpoint import checkpoint

from fura_rl.adapter import transform
from fura_rl.adapter.product_input import forget, gate_and_up, remember


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_gated_in_the_interpreter():
    run_in_interpreter(__file__)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "b"), [(2, 64), (3, 24), (2, 16), (5, 3), (1, 96), (1, 128)])
@pytest.mark.parametrize("rows", [0, 1, 109])
def test_gradients_against_float64(device, dtype, n, b, rows):
    from fura_rl.adapter.gradient_kernels import run_gated_gradient_shares
    from fura_rl.adapter.launches import gated_launch, supports

    if not supports(b, dtype, torch.device(device)):
        pytest.skip("this dtype has no kernel for such blocks")
    gate, up, delta = inputs(device, dtype, n, b, rows)
    g, delta = 3 * gate.flip(0), delta.to(dtype)
    wide = torch.stack([up, gate], 1).flatten(1)  # rows of another stride
    exact = [tensor.detach().double().cpu().requires_grad_() for tensor in (gate, up, delta)]
    x = silu(exact[0]) * exact[1]
    expected = torch.autograd.grad(x + x @ torch.block_diag(*exact[2]).T, exact, g.double().cpu())
    launch = gated_launch(n, b, dtype, torch.device(device))
    many = replace(launch, residents=8, rows=16)  # shares
    for given, how in ((up, None), (wide[:, : n * b], None), (up, many)):
        torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
        try:
            d_gate, d_up, shares = run_gated_gradient_shares(g, gate, given, delta, how)
        finally:
            torch.use_deterministic_algorithms(False)
        assert d_gate.dtype == d_up.dtype == dtype
        assert relative_error(d_gate, expected[0]) < ROUNDING[dtype]
        assert relative_error(d_up, expected[1]) < 2 * ROUNDING[dtype]  # silu is rounded too, as in the forward pass
        assert relative_error(shares.sum(0), expected[2]) < 2 * ROUNDING[dtype]


@kernels
def test_large_gates_overflow_nothing(device):
    from fura_rl.adapter.gradient_kernels import run_gated_gradient_shares

    gate = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4, 1.0], device=device).repeat(4, 2)
    up, g = torch.full_like(gate, 3.0), torch.full_like(gate, 2.0)
    results = run_gated_gradient_shares(g, gate, up, torch.zeros(1, 16, 16, device=device))
    leaves = gate.double().requires_grad_(), up.double().requires_grad_()
    expected = torch.autograd.grad(silu(leaves[0]) * leaves[1], leaves, g.double())
    for mine, reference in zip(results[:2], expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.fixture
def model(device):
    """The interpreter takes 0.1 s for a launch: one MLP."""
    return adapted_llama(target_modules=["gate_proj", "up_proj", "down_proj"], layers=1).to(device).train()


@pytest.fixture
def pairs(monkeypatch):
    """What each search for `gate` and `up` found."""
    seen = []

    def recorded(x):
        seen.append(gate_and_up(x))
        return seen[-1]

    monkeypatch.setattr(transform, "gate_and_up", recorded)
    return seen


@kernels
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_a_model_learns_what_it_learns_without_kernels(device, model, pairs, checkpointing, monkeypatch):
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(checkpointing)
    found = loss_and_gradients(model)
    # the forward pass of a reentrant region has no graph
    assert [pair is not None for pair in pairs] == {None: [True], False: [True] * 2, True: [False, True]}[
        checkpointing and checkpointing["use_reentrant"]
    ]
    monkeypatch.setattr(transform, "kernel_choice", "torch")
    expected = loss_and_gradients(model)
    assert found.keys() == expected.keys() and len(found) == 1 + 2 * 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def saved_pointers(loss):
    """Where the tensors lie that the graph of `loss` has saved."""
    pointers, stack, seen = set(), [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for each in saved:
            for tensor in each if isinstance(each, tuple) else (each,):
                if isinstance(tensor, torch.Tensor):
                    pointers.add(tensor.data_ptr())
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    return pointers


@kernels
def test_of_the_product_only_gate_and_up_are_kept(device, model, pairs):
    (mlp,) = [module for name, module in model.named_modules() if name.endswith("mlp")]
    seen = {}
    mlp.act_fn.register_forward_hook(lambda module, args, out: seen.update(gate=args[0].data_ptr(), act=out.data_ptr()))
    mlp.up_proj.register_forward_hook(lambda module, args, out: seen.update(up=out.data_ptr()))
    products = []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: products.append(args[0].detach()))
    batch = tokens().to(device)
    kept = []  # so that no other tensor takes their places
    mlp.act_fn.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    pointers = saved_pointers(model(input_ids=batch, labels=batch).loss)
    assert pairs[0] is not None
    assert {seen["gate"], seen["up"]} <= pointers
    assert not {seen["act"], products[0].data_ptr()} & pointers


def parts(device, requires_grad=True):
    torch.manual_seed(0)
    leaves = [torch.randn(3, 48, device=device).requires_grad_(requires_grad) for _ in range(2)]
    gate, up = (leaf + 0.0 for leaf in leaves)
    forget()
    remember(gate)
    remember(up)
    return gate, up


def test_the_record_of_autograd_decides():
    for make in (lambda gate, up: silu(gate) * up, lambda gate, up: up * silu(gate)):
        gate, up = parts("cpu")
        x = make(gate, up)
        found = gate_and_up(x)
        assert found[0] is gate and found[1] is up
        assert gate_and_up(x) is None  # once
    gate, up = parts("cpu")
    forget()
    assert gate_and_up(silu(gate) * up) is None


def changed(gate, up):
    x = silu(gate) * up
    with torch.no_grad():
        x.mul_(2.0)
    return x


def gate_changed(gate, up):
    x = silu(gate) * up
    with torch.no_grad():
        gate.mul_(2.0)
    return x


def act_changed(gate, up):
    act = silu(gate)
    with torch.no_grad():
        act[:, ::2] = 0.0
    return act * up


def hooked(gate, up):
    x = silu(gate) * up
    x.register_hook(lambda g: g)
    return x


def act_hooked(gate, up):
    act = silu(gate)
    act.register_hook(lambda g: g)
    return act * up


def act_retained(gate, up):
    act = silu(gate)
    act.retain_grad()
    return act * up


def retained(gate, up):
    x = silu(gate) * up
    x.retain_grad()
    return x


@pytest.mark.parametrize(
    "make",
    [
        changed,
        gate_changed,
        act_changed,
        hooked,
        retained,
        act_hooked,
        act_retained,
        lambda gate, up: gelu(gate) * up,
        lambda gate, up: silu(gate) + up,
        lambda gate, up: silu(gate) * gate,
        lambda gate, up: silu(gate) * (up + 0.0),
        lambda gate, up: silu(gate + 0.0) * up,
        lambda gate, up: silu(gate) * up[:1],
        lambda gate, up: silu(gate[:1]) * up,
        lambda gate, up: silu(gate) * 2.0,
        lambda gate, up: (silu(gate) * up).bfloat16(),
        lambda gate, up: silu(gate.bfloat16()) * up.bfloat16(),
        lambda gate, up: (silu(gate) * up).detach(),
        lambda gate, up: silu(silu(gate)) * up,
        lambda gate, up: silu(gate, inplace=True) * up,
        lambda gate, up: (silu(gate) * up).mul_(2.0),
        lambda gate, up: silu(gate) * up.view_as(up),
        lambda gate, up: silu(gate).view(48, 3) * up.view(48, 3),
    ],
)
def test_everything_else_is_left_to_autograd(make):
    assert gate_and_up(make(*parts("cpu"))) is None


def test_without_gradients_there_is_nothing_to_hand_on():
    gate, up = parts("cpu")
    x = silu(gate) * up
    with torch.no_grad():
        assert gate_and_up(x) is None
    assert gate_and_up(silu(gate.detach()) * up) is None
    gate, up = parts("cpu", requires_grad=False)
    assert gate_and_up(silu(gate) * up) is None


@kernels
@pytest.mark.parametrize("case", ["frozen", "two adapters", "output side", "large blocks", "gate alone", "hooks"])
def test_models_that_do_without(device, case, pairs, monkeypatch):
    """Same gradients as in plain torch, whether a search finds something or not."""
    targets = ["gate_proj", "up_proj", "down_proj"]
    if case == "gate alone":
        targets = ["gate_proj", "down_proj"]
    if case == "large blocks":
        monkeypatch.setattr("fura_rl.adapter.product_input.LARGEST_GATED", 4)
    side = "output" if case == "output side" else "input"
    model = adapted_llama(target_modules=targets, layers=1, side=side).to(device).train()
    down = model.base_model.model.model.layers[0].mlp.down_proj
    if case == "frozen":
        down.fura_blocks["default"].requires_grad_(False)
    if case == "two adapters":
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
    if case == "hooks":
        model.base_model.model.model.layers[0].mlp.act_fn.register_full_backward_hook(lambda module, into, out: None)
    found = loss_and_gradients(model)
    # of two adapters the one that is applied first finds them
    assert sum(pair is not None for pair in pairs) == (1 if case == "two adapters" else 0)
    monkeypatch.setattr(transform, "kernel_choice", "torch")
    for name, value in loss_and_gradients(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def region(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


REGIONS = {
    "none": lambda mlp, x: mlp(x),
    "mlp": lambda mlp, x: region(mlp, x),
    "mlp in another": lambda mlp, x: region(lambda x: region(mlp, x), x),
    "down": lambda mlp, x: region(mlp.down_proj, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)),
    "act and down": lambda mlp, x: region(
        lambda gate, up: mlp.down_proj(mlp.act_fn(gate) * up), mlp.gate_proj(x), mlp.up_proj(x)
    ),
    "gate": lambda mlp, x: mlp.down_proj(mlp.act_fn(region(mlp.gate_proj, x)) * mlp.up_proj(x)),
    "up in the mlp's": lambda mlp, x: region(
        lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * region(mlp.up_proj, x)), x
    ),
    "each": lambda mlp, x: region(mlp.down_proj, region(mlp.act_fn, region(mlp.gate_proj, x)) * region(mlp.up_proj, x)),
}


@kernels
@pytest.mark.parametrize("name", REGIONS)
def test_regions_of_checkpointing(device, model, pairs, name, monkeypatch):
    """A region that begins between `gate` and `down_proj` saves as many tensors when it is computed again."""
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(3, 32, device=device, requires_grad=True)
    trained = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    found = torch.autograd.grad(REGIONS[name](mlp, x).square().sum(), trained)
    assert any(pair is not None for pair in pairs) == (name in ("none", "mlp", "mlp in another"))
    monkeypatch.setattr(transform, "kernel_choice", "torch")
    for value, expected in zip(found, torch.autograd.grad(mlp(x).square().sum(), trained), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@kernels
def test_a_hook_on_the_layer_finds_the_gradient_of_its_input(device, model, pairs, monkeypatch):
    """Forward hooks are given the input after the search."""
    mlp = model.base_model.model.model.layers[0].mlp
    x, kept = torch.randn(3, 32, device=device), []
    mlp.down_proj.register_forward_hook(lambda module, args, out: (args[0].retain_grad(), kept.append(args[0]))[0])
    mlp(x).square().sum().backward()
    assert pairs == [None]
    monkeypatch.setattr(transform, "kernel_choice", "torch")
    mlp(x).square().sum().backward()
    torch.testing.assert_close(kept[0].grad, kept[1].grad, rtol=1e-4, atol=1e-5)


@kernels
def test_gate_and_up_that_do_not_share_their_input(device, pairs, monkeypatch):
    """Blocks over 64 are multiplied layer by layer; a search of theirs, on the product of a norm, drops nothing."""
    monkeypatch.setattr("fura_rl.adapter.shared_kernels.LARGEST_BLOCK", 4)
    model = adapted_llama(target_modules=["gate_proj", "up_proj", "down_proj"], layers=1).to(device).train()
    model.enable_input_require_grads()
    loss_and_gradients(model)
    assert [pair is not None for pair in pairs] == [False, False, True]


@kernels
def test_nothing_is_held_after_a_pass(device, model):
    (mlp,) = [module for name, module in model.named_modules() if name.endswith("mlp")]
    outputs = []
    mlp.gate_proj.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    x = torch.randn(1, 2, 32, device=device, requires_grad=True)
    y = mlp(x)
    assert outputs[0]() is not None
    del y
    assert outputs[0]() is None
    checkpoint(mlp, x, use_reentrant=False).sum().backward()
    assert [output() for output in outputs] == [None] * 3
    mlp.down_proj.forward = lambda _: 1 / 0  # a pass that fails in between leaves nothing either
    with pytest.raises(ZeroDivisionError):
        mlp(x)
    assert outputs[3]() is None


@kernels
@pytest.mark.parametrize("case", ["gated", "large blocks", "output side", "frozen", "torch"])
def test_nothing_is_held_after_a_recomputation(device, case, monkeypatch):
    """Which ends, with an exception, in the middle of `down_proj`, and on a CUDA device in a thread of its own."""
    side = "output" if case == "output side" else "input"
    model = adapted_llama(target_modules=["gate_proj", "up_proj", "down_proj"], side=side).to(device).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if case == "large blocks":
        monkeypatch.setattr("fura_rl.adapter.product_input.LARGEST_GATED", 4)
    if case == "torch":
        monkeypatch.setattr(transform, "kernel_choice", "torch")
    outputs = []
    for layer in model.base_model.model.model.layers:
        if case == "frozen":
            layer.mlp.down_proj.fura_blocks["default"].requires_grad_(False)
        layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    loss_and_gradients(model)
    assert [output() for output in outputs] == [None] * 4


def test_a_failed_region_of_checkpointing_is_held_until_the_next_pass():
    def fail(leaf):
        gate = leaf + 0.0
        remember(gate)
        kept.append(weakref.ref(gate))
        raise ZeroDivisionError

    kept = []
    with pytest.raises(ZeroDivisionError):
        checkpoint(fail, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert kept[0]() is not None
    forget()  # what any adapted layer but gate and up does
    assert kept[0]() is None


def test_outputs_are_remembered_by_thread():
    from concurrent.futures import ThreadPoolExecutor

    gate, up = parts("cpu")
    x = silu(gate) * up
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(gate_and_up, x).result() is None
        pool.submit(forget).result()
    assert gate_and_up(x) is not None


@kernels
def test_second_derivatives_are_refused(device, model):
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(1, 32, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
