"""Layers that read one tensor, and inputs kept as two factors: kernels against float64, models against themselves.

Runs in Triton's interpreter on a CPU, as `test_kernels.py` does.
"""

import copy
import gc
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import DTYPES, INTERPRETED, ROUNDING, inputs, kernels, reference, relative_error, run_in_interpreter
from tiny_nets import adapted_llama, loss_and_gradients, tokens
from torch.utils.checkpoint import checkpoint

from fura_rl.adapter import shared_input, transform
from fura_rl.adapter.shared_input import MISSES


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_shared_input_in_the_interpreter():
    run_in_interpreter(__file__)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "n", "b"), [(2, 2, 64), (3, 3, 24), (2, 5, 3)])
@pytest.mark.parametrize("rows", [0, 65, 321])
def test_shared_input_against_float64(device, dtype, count, n, b, rows):
    from fura_rl.adapter.shared_kernels import run_shared_gradient_shares, run_shared_transform

    x = inputs(device, dtype, n, b, rows)[0]
    parts = [inputs(device, dtype, n, b, rows, seed)[1:] for seed in range(1, count + 1)]
    delta_cnbb = torch.stack([delta for _, delta in parts]).to(dtype)
    outputs = run_shared_transform(x, delta_cnbb)
    gradients = [g for g, _ in parts]
    dx, shares = run_shared_gradient_shares(gradients, x, delta_cnbb, True)
    d_delta_cnbb = shares.sum(0)
    expected_dx = 0
    for y, (g, delta), d_delta in zip(outputs, parts, d_delta_cnbb, strict=True):
        expected = reference(x, g, delta, dtype)
        expected_dx = expected_dx + expected[1]
        assert relative_error(y, expected[0]) < ROUNDING[dtype]
        assert relative_error(d_delta, expected[2]) < 2.0**-18
    assert relative_error(dx, expected_dx) < ROUNDING[dtype]
    assert run_shared_gradient_shares(gradients, x, delta_cnbb, False)[0] is None


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "b"), [(2, 64), (3, 24), (1, 148)])
def test_gradient_of_an_input_kept_as_its_two_factors(device, dtype, n, b):
    """As from the product itself; its rounding is the same, but a compiler may fuse it with what follows."""
    from fura_rl.adapter.gradient_kernels import run_gradient_shares
    from fura_rl.adapter.launches import supports

    if not supports(b, dtype, torch.device(device)):
        pytest.skip("this dtype has no kernel for such blocks")
    left, right, delta = inputs(device, dtype, n, b, 109)
    wide = torch.stack([right, left], 1).flatten(1)  # one factor in rows of another stride
    g = left.flip(0)
    x = left * right
    for other in (right, wide[:, : n * b]):
        assert torch.equal(other, right)
        for with_dx in (True, False):
            direct = run_gradient_shares(g, x, delta, with_dx)
            factors = run_gradient_shares(g, left, delta, with_dx, other=other)
            assert torch.equal(direct[0], factors[0])
            assert relative_error(factors[1], direct[1].double().cpu()) < (2.0**-7 if INTERPRETED else 1e-6)


@pytest.fixture
def model(device):
    """The interpreter takes 0.1 s for a launch: one layer, the head's projections left alone. Not gated by SiLU, whose
    products are `test_gated.py`'s."""
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    return adapted_llama(target_modules=targets, layers=1, hidden_act="gelu").to(device).train()


@pytest.fixture
def passes(monkeypatch):
    """How many layers each shared pass served."""
    seen = []
    shared = transform.shared_multiply
    monkeypatch.setattr(transform, "shared_multiply", lambda x, all_: seen.append(len(all_)) or shared(x, all_))
    return seen


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-4, atol=1e-6)


@kernels
def test_a_model_with_shared_inputs(device, model, passes, monkeypatch):
    """The loss and gradients of layers that compute alone in plain torch; the same under checkpointing."""
    together = loss_and_gradients(model)
    assert passes == [3, 2]  # q, k, v and gate, up
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = loss_and_gradients(model)
    assert passes == [3, 2] * 3  # forward and recomputation
    model.gradient_checkpointing_disable()
    monkeypatch.setattr(transform, "kernel_choice", "torch")
    alone = loss_and_gradients(model)
    assert len(passes) == 6
    assert_same(together, alone)
    assert_same(checkpointed, alone)


@kernels
def test_the_input_of_a_gated_mlp_is_kept_as_its_factors(device, model):
    """Of `act(gate) * up` nothing is saved that the product does not save itself; not under checkpointing's hooks."""
    (mlp,) = [module for name, module in model.named_modules() if name.endswith("mlp")]
    products = []
    mlp.down_proj.register_forward_pre_hook(lambda module, args: products.append(args[0]))
    batch = tokens().to(device)
    loss = model(input_ids=batch, labels=batch).loss
    (x,) = products
    left, right = transform.product_factors(x)
    assert torch.equal(left * right, x)
    assert left.data_ptr() == x.grad_fn._saved_self.data_ptr()
    pointers, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        saved = getattr(node, "saved_tensors", ())  # of autograd functions such as ours
        pointers |= {tensor.data_ptr() for tensor in saved if tensor is not None}
        stack += [parent for parent, _ in node.next_functions if parent is not None]
    assert left.data_ptr() in pointers
    assert x.data_ptr() not in pointers
    with torch.autograd.graph.save_on_cpu():
        assert transform.product_factors(x) is None
    assert transform.product_factors(x + x) is None
    with torch.no_grad():
        assert transform.product_factors(x) is None


@kernels
def test_what_changes_between_two_layers_is_seen(device, model, passes):
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 2, 32, device=device, requires_grad=True)
    q, k = attention.q_proj, attention.k_proj
    q(x)
    before = k(x).detach()
    assert passes == [3]
    q(x)
    with torch.no_grad():
        assert not k(x).requires_grad  # a result with a gradient is not handed to one without
    assert passes == [3] * 3
    q(x)
    with torch.no_grad():
        k.fura_blocks["default"].core.add_(0.1)
    assert not torch.allclose(k(x), before)
    q(x)
    with model.disable_adapter():
        assert torch.equal(k(x), k.base_layer(x))
    y = x.detach().clone()
    q(y)
    y.mul_(2.0)
    torch.testing.assert_close(k(y), k(2.0 * x.detach()))


@kernels
def test_more_that_changes_between_two_layers_is_seen(device, model, passes):
    attention = model.base_model.model.model.layers[0].self_attn
    q, k = attention.q_proj, attention.k_proj
    x = torch.randn(1, 2, 32, device=device)
    for layer in (q, k):  # each graph is freed before the next layer is called
        layer(x).sum().backward()
    assert k.fura_blocks["default"].core.grad.any()
    q(x)
    before = k(x).detach()
    q(x)
    with torch.no_grad():
        k.fura_blocks["default"].scale.add_(0.3)
    assert not torch.allclose(k(x), before)
    q(x)
    k(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@kernels
def test_each_layer_checkpointed_alone(device, model):
    """A recomputation saves what the forward pass of its region saved, whatever other regions computed."""
    attention = model.base_model.model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    gradients = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        x = torch.linspace(-1, 1, 64, device=device).view(1, 2, 32).requires_grad_()
        sum(run(layer, x).square().sum() for layer in layers).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_shares_as_the_forward_pass_did(device, model, monkeypatch, reentrant):
    """The same bits from as many passes. That as many tensors are saved, of the same shapes, `checkpoint` checks."""
    mlp = model.base_model.model.model.layers[0].mlp
    seen = []
    shared = transform.shared_multiply

    def recorded(x, adapters):
        outputs = shared(x, adapters)
        seen.append([x.detach(), *(y.detach() for y in outputs)])
        return outputs

    monkeypatch.setattr(transform, "shared_multiply", recorded)
    results = []
    for run in (mlp, lambda x: checkpoint(mlp, x, use_reentrant=reentrant)):
        x = torch.linspace(-1, 1, 64, device=device).view(1, 2, 32).requires_grad_()
        model.zero_grad()
        run(x).square().sum().backward()
        results.append([x.grad, *(p.grad for layer in (mlp.gate_proj, mlp.up_proj) for p in layer.parameters())])
    assert len(seen) == 3  # without checkpointing, forward, again
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@kernels
def test_nothing_is_handed_to_another_stream(device, model, passes, monkeypatch):
    """It would not wait for the first one's kernels. On a CPU, which has none, streams are numbers."""
    mlp = model.base_model.model.model.layers[0].mlp
    x = torch.randn(1, 2, 32, device=device)
    expected = mlp.up_proj(x.clone()).detach()  # another tensor: nothing of it is left for the calls below
    del passes[:]
    if device == "cuda":
        other = torch.cuda.Stream()
        mlp.gate_proj(x)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            y = mlp.up_proj(x)
        torch.cuda.current_stream().wait_stream(other)
    else:
        streams = iter(range(2))
        monkeypatch.setattr(shared_input, "_stream", lambda x: next(streams))
        mlp.gate_proj(x)
        y = mlp.up_proj(x)
    assert passes == [2, 2]
    torch.testing.assert_close(y, expected)


@kernels
@pytest.mark.parametrize("called", [("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj"), ("q_proj",)])
def test_layers_that_read_different_tensors_part(device, model, passes, called):
    """As in cross attention, whose keys and values may be cached: computed for nothing a few times, then no more."""
    attention = model.base_model.model.model.layers[0].self_attn
    x, other = torch.randn(2, 1, 2, 32, device=device).unbind(0)
    layers = [getattr(attention, name) for name in called]
    expected = [layer.base_layer(layer.fura_blocks["default"](other)) for layer in layers]
    for _ in range(MISSES + 2):
        layers[0](x.clone())
        for layer, y in zip(layers[1:], expected[1:], strict=True):
            torch.testing.assert_close(layer(other), y)
    assert len(passes) == MISSES
    attention.q_proj(x)
    attention.k_proj(x)
    assert len(passes) == MISSES
    assert attention.q_proj.shared_input._stash is None


@kernels
def test_a_replica_does_not_use_the_original_layers(device, model, passes):
    """`torch.nn.DataParallel` copies modules, not what they refer to: those are on another device."""
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    replica = layer._replicate_for_data_parallel()
    replica._modules.update(layer._modules)
    x = torch.randn(1, 2, 32, device=device)
    expected = layer(x)
    del passes[:]
    torch.testing.assert_close(replica(x), expected, rtol=1e-5, atol=1e-6)
    assert passes == []


@kernels
def test_threads_that_run_one_model(device, model, monkeypatch):
    """Each gets its own results, whoever computed last."""
    attention = model.base_model.model.model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    shared = attention.q_proj.shared_input
    monkeypatch.setattr(transform, "shared_multiply", lambda x, _: (x, x + 1, x + 2))
    monkeypatch.setattr(shared_input, "MISSES", 10**9)

    @torch.no_grad()
    def run(value):
        for _ in range(1000):
            x = torch.full((1, 32), value, device=device)
            for i, layer in enumerate(layers):
                assert shared.multiply(layer, x, x).tensor[0, 0] == value + i

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, [0.0, 100.0, 200.0, 300.0]))
    finally:
        sys.setswitchinterval(interval)


@kernels
def test_inputs_of_inference_mode(device, model, passes):
    """They have no version; under autocast only the copy that the layer makes of them has."""
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.inference_mode():
        x = torch.randn(1, 2, 32, device=device)
        layer(x)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        layer(x)
    assert passes == []


@kernels
def test_a_deleted_layer_is_gone_at_once(device, model):
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 2, 32, device=device)
    attention.q_proj(x)  # half-used
    deleted = weakref.ref(attention.k_proj)
    gc.collect()
    gc.disable()
    try:
        del attention.k_proj
        assert deleted() is None
    finally:
        gc.enable()
    attention.q_proj(x)


@kernels
def test_second_derivatives_are_refused(device, model):
    attention = model.base_model.model.model.layers[0].self_attn
    for layer in (attention.q_proj, model.base_model.model.model.layers[0].mlp.down_proj):
        x = torch.ones(1, layer.in_features, device=device, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dx.sum().backward()


@kernels
def test_products_that_are_not_kept_as_factors(device, model):
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    core = layer.fura_blocks["default"].core
    left, right = torch.randn(2, 3, 48, device=device).requires_grad_().unbind(0)

    def gradient(x):
        return torch.autograd.grad(layer(x).square().sum(), core, retain_graph=True)[0]

    x = left * right
    assert transform.product_factors(x) is not None
    with torch.no_grad():
        x.mul_(3.0)  # autograd still knows the old product
    torch.testing.assert_close(gradient(x), gradient(x.detach()))
    for other in (2.0, right[0], right.to(torch.bfloat16)):
        assert transform.product_factors(left * other) is None
    calls = []
    multiply = lambda a, b: calls.append(1) or torch.sin(a) * torch.cos(b)  # noqa: E731
    x = checkpoint(multiply, left, right, use_reentrant=False)
    assert transform.product_factors(x) is None and len(calls) == 1  # not computed again by looking
    a, b = left + 0, right + 0
    x = a * b
    x.sum().backward()
    assert transform.product_factors(x) is None
    x = a * b
    with torch.no_grad():
        a.zero_()
    assert transform.product_factors(x) is None


@kernels
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_among_its_own_layers(device, model, passes, copied):
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 2, 32, device=device)
    expected = attention.q_proj(x)  # half-used
    twin = copied(attention)
    assert torch.equal(twin.q_proj(x), expected)
    assert twin.q_proj.shared_input is twin.v_proj.shared_input is not attention.q_proj.shared_input
    assert set(twin.q_proj.shared_input.layers) == {twin.q_proj, twin.k_proj, twin.v_proj}
    with torch.no_grad():
        twin.k_proj.fura_blocks["default"].core.add_(0.1)
    assert not torch.allclose(twin.k_proj(x), attention.k_proj(x))


@kernels
def test_two_adapters_or_none_on_a_layer_are_not_shared(device, model, passes):
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 2, 32, device=device)
    alone = {name: getattr(attention, name)(x.clone()) for name in ("q_proj", "k_proj")}
    del passes[:]
    attention.v_proj.requires_grad_(False)
    for name, expected in alone.items():
        torch.testing.assert_close(getattr(attention, name)(x), expected, rtol=1e-5, atol=1e-6)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    for name, expected in alone.items():  # the second one is the identity
        torch.testing.assert_close(getattr(attention, name)(x), expected, rtol=1e-5, atol=1e-6)
    assert passes == []
