"""Any shape, any scale: never NaN, the identity at the start, merge equals forward."""

import hypothesis
import hypothesis.strategies as st
import torch
from hypothesis.extra.numpy import array_shapes
from torch import nn

from fura_rl.adapter import FuraConfig, FuraLayer

seeded = hypothesis.settings(deadline=None, derandomize=True, max_examples=150)

PRIMES = [2, 3, 5, 7, 13, 31]
widths = st.one_of(st.integers(1, 40), st.sampled_from(PRIMES))
sides = st.sampled_from(["input", "output"])
rules = st.sampled_from(["closest", "full"])
singular_values = st.sampled_from(["trainable", "frozen", "merged"])
bases = st.sampled_from(["svd", "svd", "identity", "random"])
exponents = st.integers(-25, 25)  # of the weight's scale


@st.composite
def layers(draw) -> FuraLayer:
    """A layer of random shape, options, scale, rank and null columns, in float64."""
    in_features, out_features = draw(widths), draw(widths)
    linear = nn.Linear(in_features, out_features, bias=draw(st.booleans()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    rank = draw(st.integers(0, min(weight.shape)))
    if draw(st.booleans()):  # rank-deficient
        left, singular, right = torch.linalg.svd(weight, full_matrices=False)
        weight = left[:, :rank] @ torch.diag(singular[:rank]) @ right[:rank]
    if draw(st.booleans()):  # zero columns or rows
        weight[:, : in_features // 2] = 0
        weight[: out_features // 3] = 0
    linear.weight.data = weight * 10.0 ** draw(exponents)
    config = FuraConfig(
        side=draw(sides),
        block_size=draw(rules),
        singular_values=draw(singular_values),
        basis=draw(bases),
        train_bias=draw(st.booleans()),
    )
    return FuraLayer(linear.to(draw(st.sampled_from([torch.float64, torch.float32]))), "default", config)


def train_a_little(layer: FuraLayer, seed: int) -> None:
    """Moves the trained tensors by a fraction of what they are differences to."""
    generator = torch.Generator().manual_seed(seed)
    blocks = layer.fura_blocks["default"]
    for parameter in blocks.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    if blocks.sigma is not None:
        if blocks.scale is not None:
            blocks.scale.data *= blocks.sigma
        if blocks.singular_values == "merged":
            rows = blocks.sigma.unsqueeze(-1)
            blocks.core.data *= rows if blocks.side == "input" else rows.mT


@seeded
@hypothesis.given(layer=layers(), lead=array_shapes(min_dims=0, max_dims=3, max_side=3), seed=st.integers(0, 9))
def test_identity_at_the_start_then_merge_equals_forward(layer, lead, seed):
    weight = layer.base_layer.weight.detach().clone()
    x = torch.randn(*lead, layer.in_features, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
    base = layer.base_layer(x)
    assert torch.equal(layer(x), base)
    assert torch.equal(layer.merged_weight(), weight)

    train_a_little(layer, seed)
    output = layer(x)
    assert output.isfinite().all()
    plain = nn.functional.linear(x, layer.merged_weight().to(weight.dtype), None)
    if layer.merged_bias() is not None:
        plain = plain + layer.merged_bias().to(weight.dtype)
    precision = 1e-9 if weight.dtype == torch.float64 else 1e-3
    scale = float(torch.cat([base.flatten(), plain.flatten()]).detach().abs().max())
    torch.testing.assert_close(output, plain, rtol=precision, atol=precision * scale)

    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), plain, rtol=precision, atol=precision * scale)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, weight)


@seeded
@hypothesis.given(layer=layers(), seed=st.integers(0, 9))
def test_gradients_and_a_training_step_are_finite(layer, seed):
    layer.base_layer.requires_grad_(False)
    train_a_little(layer, seed)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(seed))
    x = x.to(layer.base_layer.weight.dtype).requires_grad_()
    output = layer(x)
    largest = output.detach().abs().max()
    (output / torch.where(largest > 0, largest, 1.0)).square().mean().backward()
    assert x.grad.isfinite().all()
    for parameter in layer.fura_blocks.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@seeded
@hypothesis.given(layer=layers())
def test_blocks_tile_the_adapted_side(layer):
    blocks = layer.fura_blocks["default"]
    width = layer.in_features if blocks.side == "input" else layer.out_features
    other = layer.out_features if blocks.side == "input" else layer.in_features
    assert blocks.num_blocks * blocks.block_size == width
    assert blocks.block_size <= other or blocks.block_size == 1
    if blocks.sigma is not None:
        assert (blocks.sigma > 0).all() and blocks.sigma.isfinite().all()
        eye = torch.eye(blocks.block_size, dtype=blocks.basis.dtype)
        assert ((blocks.basis.mT @ blocks.basis) - eye).abs().max() < 1e-5


@seeded
@hypothesis.given(layer=layers(), seed=st.integers(0, 9))
def test_refresh_keeps_the_function(layer, seed):
    if layer.fura_blocks["default"].sigma is None:
        return
    train_a_little(layer, seed)
    before = layer.merged_weight()
    layer.refresh_basis("default")
    assert torch.equal(layer.merged_weight(), before)
