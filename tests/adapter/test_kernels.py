"""The Triton kernels against float64, and the choice between them and torch.

On a CPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported: one test starts this
file again in a process of its own. On a CUDA device they run as they are.
"""

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import (
    DEVICES,
    DTYPES,
    INTERPRETED,
    ROUNDING,
    inputs,
    kernels,
    reference,
    relative_error,
    run_in_interpreter,
)
from tiny_nets import adapted_llama, tokens

from fura_rl.adapter import transform

# (n, b): powers of two, the sizes of real models that are none, blocks of several tiles, the smallest
BLOCKS = [(2, 64), (2, 96), (1, 76), (1, 148), (3, 32), (2, 16), (5, 3), (1, 1)]
SIDES = ["input", "output"]
FORMS = ["trainable", "frozen", "merged", "no sigma"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_kernels_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors are full of NaN, so that an element which is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def check(x, g, delta):
    from fura_rl.adapter.block_operator import block_transform

    x, delta = x.detach().requires_grad_(), delta.detach().requires_grad_()
    y = block_transform(x, delta)
    y.backward(g)
    expected = reference(x, g, delta, x.dtype)
    tolerance = ROUNDING[x.dtype]
    assert y.dtype == x.grad.dtype == x.dtype
    assert delta.grad.dtype == delta.dtype
    assert relative_error(y, expected[0]) < tolerance
    assert relative_error(x.grad, expected[1]) < tolerance
    assert relative_error(delta.grad, expected[2]) < 2.0**-18  # float32 sums of exact products
    return delta.grad


@kernels
@pytest.mark.parametrize(
    ("dtype", "n", "b"),
    [(torch.bfloat16, n, b) for n, b in BLOCKS]
    + [(dtype, n, b) for dtype in (torch.float16, torch.float32) for n, b in ((2, 64), (1, 48), (5, 3))]
    + [(torch.float16, 1, 148), (torch.bfloat16, 2, 192), (torch.bfloat16, 1, 224), (torch.bfloat16, 1, 130)],
)
def test_transform_and_gradients(device, dtype, n, b):
    check(*inputs(device, dtype, n, b, rows=109))


@kernels
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 321])
def test_any_number_of_rows(device, rows):
    check(*inputs(device, torch.bfloat16, 2, 32, rows))


@kernels
def test_no_rows(device):
    from fura_rl.adapter.block_operator import block_transform

    x, g, delta = inputs(device, torch.float32, 2, 16, rows=0)
    x.requires_grad_(), delta.requires_grad_()
    y = block_transform(x, delta)
    y.backward(g)
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(delta.grad, torch.zeros_like(delta))


@kernels
@pytest.mark.parametrize("layout", ["transposed", "row_slice", "column_slice", "every_second_column", "batch_first"])
def test_non_contiguous_input_and_gradient(device, layout):
    n, b, rows = 2, 24, 60
    wide = torch.randn(2 * rows, 4 * n * b, generator=torch.Generator().manual_seed(1)).to(device)
    view = {
        "transposed": lambda t: t[: n * b, :rows].T,
        "row_slice": lambda t: t[: 2 * rows : 2, : n * b],
        "column_slice": lambda t: t[:rows, 5 : 5 + n * b],
        "every_second_column": lambda t: t[:rows, : 2 * n * b : 2],
        "batch_first": lambda t: t[:rows, : n * b].view(20, 3, n * b).transpose(0, 1),
    }[layout]
    x, g = view(wide), view(wide.flip(0))
    assert not x.is_contiguous()
    _, _, delta = inputs(device, torch.float32, n, b, 1)
    if x.ndim == 2:
        check(x, g, delta)
    else:
        from fura_rl.adapter.block_operator import block_transform

        y = block_transform(x, delta)
        assert (
            relative_error(
                y.reshape(-1, n * b), reference(x.reshape(-1, n * b), x.reshape(-1, n * b), delta, x.dtype)[0]
            )
            < 2.0**-20
        )


@kernels
def test_broadcast_gradient(device):
    x, _, delta = inputs(device, torch.float32, 2, 16, rows=33)
    check(x, torch.ones(1, 1, device=device).expand(33, 32), delta)  # what .sum().backward() hands over


@kernels
def test_transposed_delta(device):
    x, g, delta = inputs(device, torch.float32, 2, 24, rows=33)
    check(x, g, delta.mT)


@kernels
def test_two_runs_give_the_same_bits(device):
    x, g, delta = inputs(device, torch.bfloat16, 2, 64, rows=555)
    assert torch.equal(check(x, g, delta), check(x, g, delta))


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_delta_changes_nothing(device, dtype):
    from fura_rl.adapter.block_operator import block_transform

    x, _, delta = inputs(device, dtype, 2, 48, rows=70)
    assert torch.equal(block_transform(x, torch.zeros_like(delta)), x)


@kernels
def test_only_what_is_needed_is_computed_and_kept(device):
    from fura_rl.adapter.block_operator import block_transform

    x, g, delta = inputs(device, torch.float32, 2, 16, rows=40)
    expected = reference(x, g, delta, x.dtype)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        of_x = block_transform(x.clone().requires_grad_(), delta)  # D is frozen: x is not kept
        assert [t.data_ptr() for t in kept] == [delta.data_ptr()]
        kept.clear()
        trained = delta.clone().requires_grad_()
        of_delta = block_transform(x, trained)  # the first layer: no gradient of x
        assert [t.data_ptr() for t in kept] == [x.data_ptr(), trained.data_ptr()]
    (dx,) = torch.autograd.grad(of_x, of_x.grad_fn.next_functions[0][0].variable, g)
    (d_delta,) = torch.autograd.grad(of_delta, trained, g)
    assert relative_error(dx, expected[1]) < 2.0**-20
    assert relative_error(d_delta, expected[2]) < 2.0**-18


# -- D of trained tensors ----------------------------------------------------------------------------------------------


def trained_tensors(device, n, b, form):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, b, b, generator=generator)).Q.to(device)  # not contiguous
    sigma = None if form == "no sigma" else (torch.rand(n, b, generator=generator) + 0.5).to(device)
    core = torch.randn(n, b, b, generator=generator).to(device)
    scale = None if form in ("frozen", "merged") else torch.randn(n, b, generator=generator).to(device)
    return basis, sigma, core, scale


@kernels
@pytest.mark.parametrize(
    ("n", "b", "form", "side"),
    [(2, 33, form, side) for form in FORMS for side in SIDES]
    + [(n, b, "trainable", "input") for n, b in BLOCKS if b != 1],
)
def test_delta_and_its_gradients(device, n, b, form, side):
    from fura_rl.adapter.delta_kernels import run_delta, run_delta_gradient

    tensors = trained_tensors(device, n, b, form)
    g = torch.randn(n, b, b, generator=torch.Generator().manual_seed(1)).to(device)
    merged, transposed = form == "merged", side == "output"
    basis, sigma, core, scale = [None if t is None else t.double().cpu() for t in tensors]
    exact = [t.requires_grad_() for t in (core, scale) if t is not None]
    expected = transform.block_delta(basis, sigma, core.mT if transposed else core, scale, merged=merged)
    expected = expected.mT if transposed else expected
    expected_gradients = torch.autograd.grad(expected, exact, g.double().cpu())

    assert relative_error(run_delta(tensors, merged, transposed), expected.detach()) < 2.0**-20
    gradients = run_delta_gradient(torch.stack([g / 4, g / 4, g / 2]), tensors, merged, transposed)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=False):
        assert relative_error(gradient, expected_gradient) < 2.0**-20
    assert len(expected_gradients) == 2 or gradients[1].numel() == 0


@kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_operator_is_its_parts(device, form, side, dtype):
    from fura_rl.adapter.delta_kernels import run_delta, run_delta_gradient
    from fura_rl.adapter.gradient_kernels import run_gradient_shares
    from fura_rl.adapter.kernels import run_transform

    n, b, merged, transposed = 2, 24, form == "merged", side == "output"
    basis, sigma, core, scale = tensors = trained_tensors(device, n, b, form)
    x, g, _ = inputs(device, dtype, n, b, rows=50)
    delta = run_delta(tensors, merged, transposed, dtype)
    dx, shares = run_gradient_shares(g, x, delta, with_dx=True)
    d_core, d_scale = run_delta_gradient(shares, tensors, merged, transposed)

    leaves = [t.requires_grad_() for t in (x, core, scale) if t is not None]
    y = transform.block_multiply(x, basis, sigma, core, scale, merged=merged, transposed=transposed)
    gradients = torch.autograd.grad(y, leaves, g)
    assert torch.equal(y, run_transform(x, delta))
    for gradient, expected in zip(gradients, (dx, d_core, d_scale), strict=False):
        assert torch.equal(gradient, expected)


@kernels
def test_a_frozen_adapter_passes_the_gradient_on(device):
    from fura_rl.adapter.delta_kernels import run_delta
    from fura_rl.adapter.kernels import run_transform

    tensors = trained_tensors(device, 2, 24, "trainable")
    x, g, _ = inputs(device, torch.float32, 2, 24, rows=50)
    y = transform.block_multiply(x.requires_grad_(), *tensors)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(dx, run_transform(g, run_delta(tensors, False, False).mT))


@kernels
def test_delta_of_nothing_trained_is_exactly_zero(device):
    from fura_rl.adapter.delta_kernels import run_delta

    basis, sigma, core, scale = trained_tensors(device, 2, 40, "trainable")
    zeros = run_delta((basis, sigma, torch.zeros_like(core), torch.zeros_like(scale)), False, False)
    assert torch.equal(zeros, torch.zeros_like(core))


# -- as PyTorch operators ----------------------------------------------------------------------------------------------


@kernels
def test_operators_are_registered_as_pytorch_wants_them(device):
    from fura_rl.adapter.block_operator import block_transform, block_transform_backward
    from fura_rl.adapter.delta_operator import block_multiply, block_multiply_backward

    x, g, delta = inputs(device, torch.float32, 2, 16, rows=8)
    trained = delta.clone().requires_grad_()
    torch.library.opcheck(block_transform, (x.clone().requires_grad_(), trained))
    torch.library.opcheck(block_transform, (x.view(2, 4, 32), trained))
    torch.library.opcheck(block_transform_backward, (g, x, delta, True))
    basis, sigma, core, scale = trained_tensors(device, 2, 16, "trainable")
    torch.library.opcheck(block_multiply, (x, basis, sigma, core, scale, False, False))
    torch.library.opcheck(block_multiply, (x, basis, None, core, None, True, True))
    torch.library.opcheck(block_multiply_backward, (g, x, None, delta, basis, sigma, core, scale, False, True, True))


@kernels
def test_compiled_without_a_break(device):
    x, g, delta = inputs(device, torch.float32, 2, 16, rows=24)
    basis, sigma, core, scale = trained_tensors(device, 2, 16, "trainable")
    leaves = [t.requires_grad_() for t in (x, delta, core, scale)]

    def layer(x, delta, core, scale):
        x = transform.block_transform(torch.nn.functional.silu(x), delta)
        return transform.block_multiply(x, basis, sigma, core, scale) * 2

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, g)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.fixture
def adapted_model(device):
    targets = ["q_proj", "down_proj"]  # each of a square and a wide layer: the interpreter takes 0.1 s for one
    return lambda **options: adapted_llama(target_modules=targets, **options).to(device).train()


def loss_and_gradients(model, choice, monkeypatch):
    monkeypatch.setattr(transform, "kernel_choice", choice)
    model.zero_grad()
    ids = tokens().to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@kernels
@pytest.mark.parametrize("side", SIDES)
def test_a_model_learns_the_same_with_and_without_kernels(adapted_model, side, monkeypatch):
    model = adapted_model(side=side)
    loss, gradients = loss_and_gradients(model, "triton", monkeypatch)
    expected_loss, expected = loss_and_gradients(model, "torch", monkeypatch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys() and len(gradients) == 2 * 2 * 2  # core and scale in 2 layers
    for name in gradients:
        assert relative_error(gradients[name], expected[name].double().cpu()) < 1e-4, name


@kernels
def test_checkpointing_changes_no_gradient(adapted_model, monkeypatch):
    model = adapted_model()
    loss, gradients = loss_and_gradients(model, "triton", monkeypatch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed_loss, checkpointed = loss_and_gradients(model, "triton", monkeypatch)
    assert torch.equal(loss, checkpointed_loss)
    for name, gradient in gradients.items():  # but for roundings of float32
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES[-1:])  # too many launches for the interpreter
def test_training_curves_agree(adapted_model, device, monkeypatch):
    curves = []
    for choice in ("triton", "torch"):
        monkeypatch.setattr(transform, "kernel_choice", choice)
        model = adapted_model(moved=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        ids = tokens(rows=4).to(device)
        losses = []
        for _ in range(200):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    assert curves[0][-1] < 0.98 * curves[0][0]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-4)


# -- the torch path and the choice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_torch_path(form):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    basis, sigma = torch.linalg.qr(draw(2, 4, 4)).Q, None if form == "no sigma" else draw(2, 4).abs() + 0.5
    scale = draw(2, 4).requires_grad_() if form in ("trainable", "no sigma") else None
    trained = [draw(5, 8).requires_grad_(), draw(2, 4, 4).requires_grad_()] + ([] if scale is None else [scale])

    def layer(x, core, scale=None):
        delta = transform.block_delta(basis, sigma, core, scale, merged=form == "merged")
        return transform.block_transform(x, delta)

    assert torch.autograd.gradcheck(layer, trained)


def test_torch_serves_what_the_kernels_do_not(monkeypatch):
    from fura_rl.adapter import launches

    monkeypatch.setattr(transform, "launches", launches, raising=False)
    monkeypatch.setattr(transform, "HAVE_KERNELS", True)
    monkeypatch.setattr(launches, "INTERPRETED", True)  # no device to ask
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    monkeypatch.setattr(transform, "kernel_choice", "auto")
    assert not transform.use_kernels(half, 64)  # on a CPU
    monkeypatch.setattr(transform, "kernel_choice", "triton")
    assert transform.use_kernels(half, 256) and not transform.use_kernels(half, 257)
    assert transform.use_kernels(single, 64) and not transform.use_kernels(single, 65)
    assert not transform.use_kernels(double, 64)
    monkeypatch.setattr(transform, "kernel_choice", "torch")
    assert not transform.use_kernels(half, 64)


@pytest.mark.skipif(INTERPRETED, reason="nothing in it needs a kernel")
@pytest.mark.parametrize(
    ("name", "value", "known"),
    [("FURA_KERNELS", "cuda", "auto, triton, torch"), ("FURA_MULTIPLY", "x", "auto, inputs")],
)
def test_an_unknown_choice_is_one_sentence(name, value, known):
    run = subprocess.run(
        [sys.executable, "-c", "import fura_rl"],
        env=dict(os.environ, **{name: value}),
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert f"AdapterError: {name} is {value!r}; it must be one of {known}." in run.stderr
