"""Layers that multiply their weight: the 4-bit kernel and layers against float64, models against themselves.

Runs in Triton's interpreter on a CPU, as `test_kernels.py` does.
"""

import copy

import pytest
import torch
from kernel_cases import DTYPES, INTERPRETED, ROUNDING, kernels, no_cuda, relative_error, run_in_interpreter
from peft import get_peft_model
from tiny_nets import fura_layers, perturb, tiny_llama, tokens
from torch import nn
from torch.nn.functional import silu

from fura_rl.adapter import FuraConfig, FuraLayer, multiplied_weight
from fura_rl.adapter.product_input import remember

bnb = pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
STORED = ["plain", "4 bit"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_multiplied_weight_in_the_interpreter():
    run_in_interpreter(__file__)


def four_bit(linear, device, dtype=torch.bfloat16, nested=True, quant_type="nf4"):
    """The layer on NF4; its state on a CPU is that of training, where weights are not repacked."""
    out_features, in_features = linear.weight.shape
    layer = bnb.nn.Linear4bit(
        in_features,
        out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=nested,
        quant_type=quant_type,
    )
    layer.load_state_dict(linear.state_dict())
    layer = layer.to(device).requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False
    return layer


def stored_as(stored, linear, device, dtype=torch.bfloat16):
    if stored == "4 bit":
        return four_bit(linear, device, dtype)
    return linear.to(device, dtype).requires_grad_(False)


def exact_weight(base):
    """What is stored, in float64. (On a CPU bitsandbytes errs where rows are no multiple of 64.)"""
    if isinstance(base, nn.Linear) and base.weight.is_floating_point():
        return base.weight.double().cpu()
    state = copy.copy(base.weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(base.weight, state).double().cpu()


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("nested", "quant_type"), [(True, "nf4"), (False, "nf4"), (False, "fp4")])
@pytest.mark.parametrize(("n", "b", "rows"), [(4, 64, 130), (8, 16, 5), (8, 24, 64), (2, 96, 33), (3, 128, 70)])
def test_merged_codes_against_float64(device, dtype, nested, quant_type, n, b, rows):
    from fura_rl.adapter.four_bit_kernels import run_merged

    torch.manual_seed(0)
    base = four_bit(nn.Linear(n * b, rows, bias=False), device, nested=nested, quant_type=quant_type)
    delta = (torch.randn(n, b, b) / b**0.5).to(device, dtype)
    multiplier = torch.eye(n * b).double() + torch.block_diag(*delta.double().cpu())
    merged = run_merged(base.weight, base.weight.quant_state, delta)
    assert merged.dtype == dtype
    assert relative_error(merged, exact_weight(base) @ multiplier) < ROUNDING[dtype]


@kernels
def test_small_differences_survive_rounding(device):
    """`D` of an eighth of the distance of bf16 numbers: most weights stay what they were, and their sum moves."""
    from fura_rl.adapter.four_bit_kernels import run_merged

    torch.manual_seed(0)
    n, b = 4, 64
    base = four_bit(nn.Linear(n * b, 512, bias=False), device)
    shift = 2.0**-11
    before, after = (
        run_merged(base.weight, base.weight.quant_state, torch.eye(b).expand(n, b, b).to(device, torch.bfloat16) * size)
        for size in (0.0, shift)
    )
    weight, moved = before.double(), (after - before).double()
    assert (moved == 0).float().mean() > 0.7
    assert float((moved * weight).sum() / weight.square().sum()) == pytest.approx(shift, rel=0.2)
    stored = weight.bfloat16()
    assert torch.equal(stored + stored * shift, stored)  # as a weight in bf16 would lose it


def adapted(base, b, **options):
    layer = FuraLayer(base, "default", FuraConfig(block_size=b, **options))
    perturb(layer)
    return layer


def counting(monkeypatch):
    calls = []
    for name in ("run_merged", "run_transform"):
        run = getattr(multiplied_weight, name)
        monkeypatch.setattr(multiplied_weight, name, lambda *args, run=run: calls.append(1) or run(*args))
    return calls


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(multiplied_weight, "pays", lambda rows, bases: True)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"singular_values": "merged"}, {"singular_values": "frozen"}])
@pytest.mark.parametrize("product", ["none", "factors", "gated"])
@pytest.mark.parametrize("stored", STORED)
def test_a_layer_and_its_gradients_against_float64(device, dtype, options, product, stored, always, monkeypatch):
    calls = counting(monkeypatch)
    torch.manual_seed(0)
    layer = adapted(stored_as(stored, nn.Linear(192, 40), device, dtype), 24, **options)
    factors = [torch.randn(3, 7, 192).to(device, dtype).requires_grad_() for _ in range(2)]
    gate, up = factors[0] + 0.0, factors[1] + 0.0
    remember(gate)
    remember(up)
    x = {"none": lambda: gate, "factors": lambda: gate * up, "gated": lambda: silu(gate) * up}[product]()
    y = layer(x)
    multiply = y.grad_fn.next_functions[-1][0]
    gated = product == "gated"
    assert [node is not None for node, _ in multiply.next_functions[:3]] == [not gated, gated, gated]
    dy = torch.randn(y.shape).to(device, dtype)
    trained = [p for p in layer.parameters() if p.requires_grad]
    found = torch.autograd.grad(y, [factors[0], *trained], dy)
    assert len(calls) == 1

    weight = exact_weight(layer.base_layer)
    exact = [factor.detach().double().cpu().requires_grad_() for factor in factors]
    blocks = copy.deepcopy(layer.fura_blocks["default"]).cpu()
    for parent, name in [(blocks, "basis"), (blocks, "sigma")]:
        setattr(parent, name, getattr(parent, name).double())
    for p in blocks.parameters():
        p.data = p.data.double()
    x64 = {"none": exact[0], "factors": exact[0] * exact[1], "gated": silu(exact[0]) * exact[1]}[product]
    expected = x64 @ (weight @ (torch.eye(192) + torch.block_diag(*blocks()))).T + layer.base_layer.bias.double().cpu()
    own = [p for p in blocks.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, [exact[0], *own], dy.double().cpu())
    for mine, reference in zip([y, *found], [expected.detach(), *gradients], strict=True):
        assert relative_error(mine, reference) < 2.5 * ROUNDING[dtype]  # of the weight, the product, and each gradient


def adapted_llama(device, stored="4 bit"):
    model = tiny_llama(torch.bfloat16, hidden_size=64, intermediate_size=128, max_position_embeddings=128)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, stored_as(stored, child.float(), device))
    config = FuraConfig(target_modules="all-linear", block_size=32)  # few programs: each costs an interpreter its time
    model = get_peft_model(model.to(device), config)
    perturb(model)
    return model


def step(model, device):
    ids = tokens(2, 40).to(device)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def flat(gradients):
    return torch.cat([gradient.double().cpu().flatten() for gradient in gradients.values()])


@kernels
@pytest.mark.parametrize("stored", STORED)
def test_a_model_is_as_close_to_float32_as_with_multiplied_inputs(device, stored, monkeypatch):
    """All layers of a Llama, q/k/v and gate/up sharing their input, with the loss and each gradient."""
    model = adapted_llama(device, stored)
    monkeypatch.setattr(multiplied_weight, "pays", lambda rows, bases: False)
    calls = counting(monkeypatch)
    loss, gradients = step(model, device)
    assert not calls
    monkeypatch.setattr(multiplied_weight, "pays", lambda rows, bases: True)
    deferred_loss, deferred_gradients = step(model, device)
    assert len(calls) == 14
    exact = copy.deepcopy(model).float()
    for layer in fura_layers(exact).values():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device=device)
        dense.weight = nn.Parameter(exact_weight(layer.base_layer).float().to(device), requires_grad=False)
        layer.base_layer = dense
    expected_loss, expected = step(exact, device)
    assert abs(deferred_loss - expected_loss) < 1.5 * abs(loss - expected_loss) + 2.0**-8 * expected_loss
    of_all = [relative_error(flat(g), flat(expected)) for g in (gradients, deferred_gradients)]
    assert of_all[1] < 1.5 * of_all[0]
    for name, reference in expected.items():
        # One layer's scale alone is a small rest of large sums: over five seeds its errors differed by up to 3 times.
        errors = [relative_error(g[name], reference.double().cpu()) for g in (gradients, deferred_gradients)]
        assert errors[1] < 3.5 * errors[0] + 0.01, name


@kernels
@pytest.mark.parametrize("stored", STORED)
def test_a_projection_called_after_a_backward_pass_has_gradients(device, stored, always):
    """What `q_proj` left for it hangs on a graph that is gone."""
    attention = adapted_llama(device, stored).base_model.model.model.layers[0].self_attn
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16).requires_grad_()
    for layer in (attention.q_proj, attention.k_proj):
        layer(x).sum().backward()
        assert layer.fura_blocks["default"].core.grad.norm() > 0


def negate(weight):
    with torch.no_grad():
        weight.neg_()


CHANGES = {
    "none": lambda layer: None,
    "core": lambda layer: negate(layer.fura_blocks["default"].core),
    "weight": lambda layer: negate(layer.base_layer.weight),
    "weight replaced": lambda layer: setattr(
        layer.base_layer, "weight", nn.Parameter(-layer.base_layer.weight, requires_grad=False)
    ),
    "hook": lambda layer: layer.base_layer.register_forward_hook(lambda module, args, y: -y),
    "disabled": lambda layer: layer.enable_adapters(False),
}


@kernels
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_projections_of_one_input(device, name, always, monkeypatch):
    """`q_proj` has already computed what `k_proj` would return."""
    results = []
    for choice in multiplied_weight.CHOICES:
        monkeypatch.setattr(multiplied_weight, "choice", choice)
        attention = adapted_llama(device, "plain").base_model.model.model.layers[0].self_attn
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
        attention.q_proj(x)
        CHANGES[name](attention.k_proj)
        results.append(attention.k_proj(x))
    assert relative_error(results[0], results[1].detach().double().cpu()) < 0.02


@kernels
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stored", STORED)
def test_gradient_checkpointing_gives_the_same_gradients(device, reentrant, stored, always, monkeypatch):
    model = adapted_llama(device, stored).train()
    loss, gradients = step(model, device)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = counting(monkeypatch)
    again, others = step(model, device)
    # torch leaves out what follows the last tensor that a region saves
    assert len(calls) == (28 if reentrant else 26)
    assert again == loss
    for name, gradient in gradients.items():
        assert relative_error(others[name], gradient.double().cpu()) < ROUNDING[torch.bfloat16], name


@kernels
@pytest.mark.parametrize("stored", STORED)
def test_without_gradients_and_with_a_frozen_adapter(device, stored, always, monkeypatch):
    calls = counting(monkeypatch)
    layer = adapted(stored_as(stored, nn.Linear(192, 40), device), 24)
    x = torch.randn(5, 192, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), y)
    assert len(calls) == 2
    layer.requires_grad_(False)  # its input is multiplied: the gradient of that alone is one kernel
    assert relative_error(layer(x), y.double().cpu()) < 2.0**-6
    assert len(calls) == 2


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
def test_where_the_input_is_multiplied(device, dtype, stored, monkeypatch):
    """Few rows, another dtype than the layer computes in, hooks on the base layer, merged and disabled adapters."""
    calls = counting(monkeypatch)
    monkeypatch.setattr(multiplied_weight, "LAUNCH_BYTES", 0)
    base = stored_as(stored, nn.Linear(64, 40), device)
    layer = adapted(base, 16)
    fewest = 2048 if stored == "4 bit" else 80
    x = torch.randn(fewest, 64, device=device, dtype=dtype)
    if dtype == base.bias.dtype or stored == "4 bit":
        layer(x[:-1])
        assert not calls
        layer(x)
        assert len(calls) == (dtype == torch.bfloat16)
        calls.clear()
    with torch.autocast(device, torch.bfloat16):
        layer(x)  # the layer sees a copy
    assert len(calls) == 1
    calls.clear()
    x = x.to(base.bias.dtype)
    seen = []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_pre_hook"):
        hook = getattr(base, register)(lambda *_: seen.append(1))
        layer(x).sum().backward()
        assert len(seen) == 1 and not calls, register
        seen.clear()
        hook.remove()
    forward = base.forward
    base.forward = lambda x: seen.append(1) or forward(x)
    layer(x)
    assert seen and not calls
    del base.forward
    layer.enable_adapters(False)
    layer(x)
    layer.enable_adapters(True)
    layer.merge()
    layer(x)
    assert not calls


@kernels
@pytest.mark.parametrize("case", ["trained weight", "trained bias", "float32", "subclass", "ZeRO-3", "inference"])
def test_a_plain_layer_that_is_another_one(device, case, always, monkeypatch):
    class Other(nn.Linear):
        pass

    calls = counting(monkeypatch)
    dtype = torch.float32 if case == "float32" else torch.bfloat16
    with torch.inference_mode(case == "inference"):
        base = (Other if case == "subclass" else nn.Linear)(64, 40, device=device, dtype=dtype).requires_grad_(False)
    layer = adapted(base, 16)
    if case == "trained weight":
        base.weight.requires_grad_()
    if case == "trained bias":
        base.bias.requires_grad_()
    if case == "ZeRO-3":
        base.weight.ds_id = 0
    x = torch.randn(5, 64, device=device, dtype=dtype)
    if case == "inference":
        with torch.inference_mode():
            layer(x)
    else:
        layer(x).float().sum().backward()
    assert not calls
    for parameter in base.parameters():
        assert (parameter.grad is not None) == parameter.requires_grad


def test_what_is_less_work():
    """Half the bytes: 4 for each row of a weight, against one for each row of the input and one for each product; and
    32 MB for the start of each further kernel."""
    q, k = nn.Linear(2**20, 64, device="meta"), nn.Linear(2**20, 32, device="meta")
    for rows, bases in [(128, [q, k, k]), (128, [q]), (171, [q, q])]:
        assert multiplied_weight.pays(rows, bases) and not multiplied_weight.pays(rows - 1, bases)
    q, k = nn.Linear(2048, 2048, device="meta"), nn.Linear(2048, 1024, device="meta")
    for fewest, bases in [(8192, [q, k, k]), (6144, [q])]:
        assert multiplied_weight.pays(fewest, bases) and not multiplied_weight.pays(fewest - 1, bases)


@kernels
def test_a_base_weight_that_changes_before_the_gradient_is_an_error(device, always):
    base = stored_as("plain", nn.Linear(64, 40), device)
    y = adapted(base, 16)(torch.randn(5, 64, device=device, dtype=torch.bfloat16))
    base.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@kernels
def test_a_parameter_that_lost_its_state(device, always, monkeypatch):
    """FSDP makes such ones. Each call takes the same way, or checkpointing would find other tensors than it saved."""
    calls = counting(monkeypatch)
    base = four_bit(nn.Linear(64, 40), device)
    layer = adapted(base, 16)
    base.quant_state = base.weight.quant_state
    base.weight = nn.Parameter(base.weight.data, requires_grad=False)
    x = torch.randn(5, 64, device=device, dtype=torch.bfloat16)
    assert torch.equal(layer(x), layer(x))
    assert len(calls) == 2


@pytest.mark.skipif(not INTERPRETED, reason="a process group of this CPU")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_that_fsdp_gathers_and_lets_go_of(checkpointing, always, tmp_path, monkeypatch):
    """What a layer keeps for its gradient is empty after the forward pass, and filled again before the gradient."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = adapted_llama("cpu", "plain").train()
    _, gradients = step(model, "cpu")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    calls = counting(monkeypatch)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
        for module in [*model.base_model.model.model.layers, model]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
        for _ in range(2):
            _, others = step(model, "cpu")
    finally:
        distributed.destroy_process_group()
    assert len(calls) == 2 * (26 if checkpointing else 14)
    for name, gradient in gradients.items():
        assert torch.equal(others[name], gradient), name


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_at_its_start_is_the_quantised_layer_bit_for_bit(nested, dtype, monkeypatch):
    """Codes are rounded as bitsandbytes rounds them. (The interpreter truncates bf16.)"""
    calls = counting(monkeypatch)
    torch.manual_seed(0)
    base = four_bit(nn.Linear(512, 384), "cuda", dtype, nested)
    layer = FuraLayer(base, "default", FuraConfig(block_size=64))
    x = torch.randn(4096, 512, device="cuda", dtype=dtype)
    assert torch.equal(layer(x), base(x))
    assert len(calls) == 1


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_at_its_start_is_the_plain_layer_bit_for_bit(dtype, monkeypatch):
    calls = counting(monkeypatch)
    monkeypatch.setattr(multiplied_weight, "LAUNCH_BYTES", 0)
    base = stored_as("plain", nn.Linear(512, 384), "cuda", dtype)
    layer = FuraLayer(base, "default", FuraConfig(block_size=64))
    x = torch.randn(4096, 512, device="cuda", dtype=dtype)
    assert torch.equal(layer(x), base(x))
    assert len(calls) == 1
