"""Layers that read one tensor, traced by `torch.compile`: one operator a group, results and gradients of eager steps.

Runs in Triton's interpreter on a CPU, as `test_kernels.py` does. What a compiled step computes alone and what it shares
is the same to the last bit there, so most comparisons are exact.
"""

import gc
import weakref

import pytest
import torch
from kernel_cases import DEVICES, INTERPRETED, inputs, kernels, relative_error, run_in_interpreter
from peft import get_peft_model
from tiny_nets import perturb, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3ForCausalLM

from fura_rl.adapter import FuraConfig

GROUP = torch.ops.fura.shared_multiply.default if INTERPRETED or torch.cuda.is_available() else None


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_shared_compile_in_the_interpreter():
    run_in_interpreter(__file__)


class Mlp(nn.Module):
    """A parent with one group. `steps` says what its layers are called with; each keyword is a way to call them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 24, bias=False), nn.Linear(width, 24, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None, way: str = "") -> torch.Tensor:
        if way == "changed before":
            x.add_(1.0)
        gate = checkpoint(self.gate_proj, x, use_reentrant=False) if way == "each checkpointed" else self.gate_proj(x)
        if way == "changed between":
            x.add_(1.0)
        if way == "each checkpointed":
            return gate * checkpoint(self.up_proj, x, use_reentrant=False)
        return gate * self.up_proj(x if other is None else other)


class Net(nn.Module):
    """The parent behind something that makes its input, as a norm does; or on its own, `bare`."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.bare = False

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.mlp(x if self.bare else nn.functional.silu(x), *args, **kwargs)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def net(device):
    torch.manual_seed(0)
    model = get_peft_model(Net(), FuraConfig(target_modules=["gate_proj", "up_proj"]))
    perturb(model)
    return model.to(device)


class Counting:
    """A backend that counts operators in the graphs that it is given, and leaves them as they are."""

    def __init__(self) -> None:
        self.groups: list[int] = []  # of each graph
        self.outputs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list) -> torch.fx.GraphModule:
        graphs = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        self.groups.append(sum(node.target is GROUP for one in graphs for node in one.graph.nodes))
        (output,) = graph.graph.find_nodes(op="output")
        self.outputs.append(len(output.args[0]))
        return graph


@pytest.fixture
def counting():
    return Counting()


def random_input(device, dtype=torch.float32, seed=0):
    return inputs(device, dtype, 4, 8, 6, seed)[0]


def results(function, model, x, *args, **kwargs):
    """The output, and the gradients of the input and of all that is trained."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = function(x + 0, *args, **kwargs)  # not a leaf, which could not be changed in place
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad, **gradients(model)}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(compiled, eager):
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        assert torch.equal(compiled[name], value), name


def assert_close(compiled, eager, tolerance):
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=tolerance, atol=tolerance)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoder(device):
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
        num_hidden_layers=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    model = get_peft_model(Qwen3ForCausalLM(config), FuraConfig(target_modules=targets))
    perturb(model)
    return model.to(device).train()


def step(function, model):
    """The loss and all gradients; with embeddings as input, which need a gradient under checkpointing."""
    model.zero_grad()
    ids = tokens(rows=1, length=6).to(next(model.parameters()).device)
    embedded = model.get_input_embeddings().weight[ids].detach().requires_grad_()
    loss = function(inputs_embeds=embedded, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), "embedded": embedded.grad, **gradients(model)}


@kernels
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_model_in_one_graph(device, decoder, counting, reentrant):
    """q, k, v are one operator, gate and up another, in checkpointed regions as outside them."""
    if reentrant is not None:
        decoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = torch.compile(decoder, backend=counting, fullgraph=True)
    traced, eager = step(compiled, decoder), step(decoder, decoder)
    # by the kind of CPU or GPU the last bits differ, as they do between two kernels for attention (4e-7 on a CPU)
    assert traced.keys() == eager.keys()
    assert all(relative_error(traced[name], eager[name].double().cpu()) < 1e-5 for name in eager)
    assert counting.groups == [2]


@kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_compiled_one_by_one(device, decoder, counting, reentrant):
    """As trainers do it. A reentrant region runs without gradients first, in a graph that shares nothing."""
    decoder.gradient_checkpointing_enable({"use_reentrant": reentrant})
    eager = step(decoder, decoder)
    for layer in decoder.base_model.model.model.layers:
        layer.compile(backend=counting, fullgraph=True)
    assert_equal(step(decoder, decoder), eager)
    assert sorted(counting.groups) == ([0, 2] if reentrant else [2])


# -- backends, dtypes and ways to train --------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, d) for b in ("aot_eager", "inductor") for d in (torch.float32, torch.bfloat16)] + [("eager", torch.bfloat16)],
)
def test_backends(device, net, backend, dtype):
    """Inductor fuses the product and its rounding, so the last bits differ."""
    net.base_model.model.to(dtype)
    x = random_input(device, dtype)
    eager = results(net, net, x)
    compiled = results(torch.compile(net, backend=backend, fullgraph=True), net, x)
    if backend == "inductor":
        assert_close(compiled, eager, 1e-4 if dtype == torch.float32 else 0.1)
    else:
        assert_equal(compiled, eager)


@kernels
def test_under_autocast(device, net, counting):
    """What comes in bf16, as behind a norm of a bf16 model, is shared. What autocast copies is not: the copy is saved
    for the gradient, so a change of the original between two layers would go unseen."""
    for dtype, way, groups in ((torch.bfloat16, "", 1), (torch.float32, "", 0), (torch.float32, "changed between", 0)):
        compiled = torch.compile(net, backend=counting, fullgraph=True)
        x = random_input(device, dtype)
        with torch.autocast(device, torch.bfloat16):
            eager, traced = (results(function, net, x, way=way) for function in (net, compiled))
        assert_close(traced, eager, 0.05)  # sums of bf16 numbers in another order
        assert counting.groups[-1] == groups
        torch._dynamo.reset()


@kernels
def test_steps_with_accumulated_gradients(device, net, counting):
    """Parameters change between two steps; the graph stays, and computes with the new ones."""
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    totals = []
    for function in (net, compiled):
        net.load_state_dict(initial)
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            for seed in range(2):
                function(random_input(device, seed=seed)).square().sum().backward()
            optimizer.step()
        totals.append({**gradients(net), **{f"new {name}": value.clone() for name, value in net.state_dict().items()}})
    assert_equal(*totals)
    assert counting.groups == [1]


@kernels
def test_an_output_that_nothing_depends_on(device, net):
    """Its gradient is zero, in the operator as in the function."""
    mlp = net.base_model.model.mlp

    def one(x):
        mlp.gate_proj(x)
        return mlp.up_proj(x)

    mlp.forward = one
    assert_equal(
        results(torch.compile(net, backend="aot_eager", fullgraph=True), net, random_input(device)),
        results(net, net, random_input(device)),
    )


@kernels
@pytest.mark.parametrize("singular_values", ["frozen", "merged", "trainable"])
def test_forms(device, counting, singular_values):
    torch.manual_seed(0)
    config = FuraConfig(target_modules=["gate_proj", "up_proj"], singular_values=singular_values)
    net = get_peft_model(Net(), config)
    perturb(net)
    net.to(device)
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    x = random_input(device)
    assert_equal(results(compiled, net, x), results(net, net, x))
    assert counting.groups == [1]


@pytest.mark.skipif(INTERPRETED, reason="there are kernels in the interpreter")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_without_kernels(backend):
    """Each layer computes alone, in operators that a compiler can fuse."""
    torch.manual_seed(0)
    net = get_peft_model(Net(), FuraConfig(target_modules=["gate_proj", "up_proj"]))
    perturb(net)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    x = random_input("cpu")
    assert_close(results(compiled, net, x), results(net, net, x), 1e-4)


# -- what is not shared ------------------------------------------------------------------------------------------------


@kernels
def test_without_gradients_nothing_is_shared(device, net, counting):
    """An input that nothing saves may change between two layers, which a graph does not show."""
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    with torch.no_grad():
        for way in ("", "changed between", "changed before"):
            assert torch.equal(compiled(random_input(device), way=way), net(random_input(device), way=way))
    assert set(counting.groups) == {0}


@kernels
def test_an_input_that_changes_before_the_first_layer(device, net, counting):
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    eager, traced = (results(f, net, random_input(device), way="changed before") for f in (net, compiled))
    assert_equal(traced, eager)
    assert counting.groups == [1]


@kernels
def test_layers_called_with_different_tensors(device, net, counting):
    """As in cross attention: nothing is computed for a layer that does not read it."""
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    x, other = random_input(device), random_input(device, seed=1)
    assert_equal(results(compiled, net, x, other), results(net, net, x, other))
    assert counting.groups == [0]


@kernels
def test_layers_that_make_their_own_inputs(device, net):
    """The parent's one input is not what the second layer reads."""
    mlp = net.base_model.model.mlp
    mlp.forward = lambda x: mlp.gate_proj(x) * mlp.up_proj(2.0 * x)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_equal(results(compiled, net, random_input(device)), results(net, net, random_input(device)))


@kernels
def test_a_layer_called_without_its_parent(device, net, counting):
    layers = net.base_model.model.mlp.gate_proj, net.base_model.model.mlp.up_proj
    function = lambda x: layers[0](x) * layers[1](x)  # noqa: E731
    compiled = torch.compile(function, backend=counting, fullgraph=True)
    alone, together = results(compiled, net, random_input(device)), results(function, net, random_input(device))
    assert_close(alone, together, 1e-5)  # which sum the input's gradient in another order
    assert counting.groups == [0]


@kernels
def test_siblings_that_differ(device, net, counting):
    """Another adapter, two, none, or one that is not trained: every change gives the right graph."""
    net.add_adapter("second", net.peft_config["default"])
    perturb(net, seed=3)
    gate, up = net.base_model.model.mlp.gate_proj, net.base_model.model.mlp.up_proj
    x = random_input(device)
    compiled = torch.compile(net, backend=counting, fullgraph=True)

    def check(groups):
        assert_equal(results(compiled, net, x), results(net, net, x))
        assert counting.groups[-1] == groups

    check(1)
    up.set_adapter("second")
    check(1)  # one adapter each, whatever its name
    up.set_adapter(["default", "second"])
    check(0)
    up.set_adapter("default")
    up.fura_blocks["default"].requires_grad_(False)
    check(0)
    up.fura_blocks["default"].requires_grad_(True)
    up.enable_adapters(False)
    check(0)
    up.enable_adapters(True)
    gate.merge()
    check(0)
    gate.unmerge()
    with net.disable_adapter():
        assert torch.equal(compiled(x), net(x))


# -- what stays behind -------------------------------------------------------------------------------------------------


@kernels
def test_nothing_is_left_after_a_call(device, net, counting):
    """No attribute on the caller's tensor, no tensor on a module, no output of the graph but the result."""
    net.base_model.model.bare = True
    compiled = torch.compile(net, backend=counting, fullgraph=True)
    x = random_input(device).requires_grad_()
    for _ in range(3):
        y = compiled(x)
        y.sum().backward()
    assert counting.groups == [1] and counting.outputs == [1]
    assert vars(x) == {}
    assert net.base_model.model.mlp.up_proj.shared_input._stash is None
    freed = weakref.ref(y)
    del y
    gc.collect()
    assert freed() is None


@kernels
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_gradients_are_handed_over(device, net, backend):
    """Those of a group lie in one tensor, as its kernel wrote them: autograd copies none of them."""
    function = net if backend is None else torch.compile(net, backend=backend, fullgraph=True)
    results(function, net, random_input(device))
    mlp = net.base_model.model.mlp
    gate, up = (layer.fura_blocks["default"] for layer in (mlp.gate_proj, mlp.up_proj))
    for one, other in ((gate.core, up.core), (gate.scale, up.scale)):
        assert one.grad.untyped_storage().data_ptr() == other.grad.untyped_storage().data_ptr()
        assert one.grad.untyped_storage().nbytes() == 2 * one.grad.nbytes


@kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_parent_checkpointed_on_its_own(device, net, counting, reentrant):
    """Its input comes from outside the region, where no attribute can be left: the alias is made inside."""
    mlp = net.base_model.model.mlp
    function = lambda x: checkpoint(mlp, x.sin(), use_reentrant=reentrant)  # noqa: E731
    compiled = torch.compile(function, backend=counting, fullgraph=True)
    assert_equal(results(compiled, net, random_input(device)), results(function, net, random_input(device)))
    assert counting.groups == [1]


@kernels
def test_layers_checkpointed_one_by_one(device, net):
    """The only break in a graph: one region's results are not handed to another, nor traced into it from outside."""
    compiled = torch.compile(net, backend="aot_eager")
    eager, traced = (results(f, net, random_input(device), way="each checkpointed") for f in (net, compiled))
    assert_close(traced, eager, 1e-5)


@kernels
def test_an_unloaded_model_has_no_hooks(device, net):
    assert net.base_model.model.mlp._forward_pre_hooks
    net.add_adapter("second", net.peft_config["default"])  # links the layers again
    assert len(net.base_model.model.mlp._forward_pre_hooks) == 1
    plain = net.unload()
    del net
    gc.collect()
    assert not plain.mlp._forward_pre_hooks


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_is_registered_as_pytorch_wants_it(device):
    from fura_rl.adapter import shared_operator

    x, g, _ = inputs(device, torch.float32, 2, 16, rows=8)
    basis, core = torch.randn(2, 2, 2, 16, 16, device=device) / 4
    sigma, scale = torch.rand(2, 2, 2, 16, device=device) + 0.5
    for cores, scales in ((core, scale), (core.requires_grad_(), scale.requires_grad_())):
        lists = [list(tensors.unbind(0)) for tensors in (basis, sigma, cores, scales)]
        torch.library.opcheck(shared_operator._shared_multiply, (x.clone().requires_grad_(), *lists, False))
        torch.library.opcheck(shared_operator._shared_multiply, (x, lists[0], [], lists[2], [], True))
    lists = [list(tensors.detach().unbind(0)) for tensors in (basis, sigma, core, scale)]
    arguments = ([g, 2 * g], x, torch.randn(2, 2, 16, 16, device=device), *lists, False)
    for with_dx in (True, False):
        torch.library.opcheck(shared_operator._shared_multiply_backward, (*arguments, with_dx))
