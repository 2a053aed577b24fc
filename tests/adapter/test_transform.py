"""The pure functions of the multiplier, against dense matrices."""

import pytest
import torch

from fura_rl.adapter.transform import block_delta, block_transform, compose_deltas, merge_input_side, merge_output_side


def dense(delta: torch.Tensor) -> torch.Tensor:
    return torch.block_diag(*delta) + torch.eye(delta.shape[0] * delta.shape[1], dtype=delta.dtype)


@pytest.fixture
def delta():
    torch.manual_seed(0)
    return torch.randn(3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("lead", [(5,), (2, 5), (), (0,), (2, 3, 1)])
def test_block_transform_is_a_dense_product(delta, lead):
    x = torch.randn(*lead, 12, dtype=torch.float64)
    torch.testing.assert_close(block_transform(x, delta), x @ dense(delta).T)


def test_block_transform_gradients(delta):
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block_transform, (x, delta.requires_grad_()))


def test_block_transform_of_non_contiguous_input(delta):
    x = torch.randn(12, 5, dtype=torch.float64).T
    torch.testing.assert_close(block_transform(x, delta), x @ dense(delta).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_delta_changes_nothing(dtype):
    x = torch.randn(7, 12).to(dtype)
    assert torch.equal(block_transform(x, torch.zeros(3, 4, 4)), x)


def test_bf16_keeps_a_delta_that_a_bf16_multiplier_would_lose():
    # I + D rounds to I in bf16 where D is below 2^-9; x + x D keeps the sum of many such terms
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    delta = torch.full((1, 64, 64), 2.0**-10)
    moved = block_transform(x, delta).float()
    torch.testing.assert_close(moved, torch.full((1, 64), 1 + 64 * 2.0**-10), rtol=2**-8, atol=0)
    rounded_diagonal = (torch.eye(64) + delta[0]).bfloat16().diagonal()
    assert (rounded_diagonal == 1).all()


def test_merges_are_dense_products(delta):
    weight = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(merge_input_side(weight, delta), weight @ dense(delta))
    torch.testing.assert_close(merge_output_side(weight.T, delta), dense(delta) @ weight.T)
    assert merge_output_side(weight.T, delta).is_contiguous()


def test_merging_the_weight_is_transforming_the_input(delta):
    weight, x = torch.randn(5, 12, dtype=torch.float64), torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(x @ merge_input_side(weight, delta).T, block_transform(x, delta) @ weight.T)


def test_compose_deltas(delta):
    other = torch.randn_like(delta)
    torch.testing.assert_close(dense(compose_deltas(delta, other)), dense(delta) @ dense(other))


@pytest.mark.parametrize("with_basis", [True, False])
def test_block_delta_is_the_published_multiplier_minus_one(with_basis):
    torch.manual_seed(0)
    n, b = 3, 4
    basis = torch.linalg.qr(torch.randn(n, b, b, dtype=torch.float64)).Q if with_basis else None
    sigma = torch.rand(n, b, dtype=torch.float64) + 0.5 if with_basis else None
    core, scale = torch.randn(n, b, b, dtype=torch.float64), torch.randn(n, b, dtype=torch.float64)
    eye = torch.eye(b, dtype=torch.float64).expand(n, b, b)
    v, s = (basis, sigma) if with_basis else (eye, torch.ones(n, b, dtype=torch.float64))

    projection = v / s.unsqueeze(-2)  # P = V diag(1 / sigma)
    trained = projection @ ((s + scale).unsqueeze(-1) * (v.mT + core))
    torch.testing.assert_close(block_delta(basis, sigma, core, scale), trained - eye)
    frozen = projection @ (s.unsqueeze(-1) * (v.mT + core))
    torch.testing.assert_close(block_delta(basis, sigma, core), frozen - eye)
    merged = projection @ (s.unsqueeze(-1) * v.mT + core)
    torch.testing.assert_close(block_delta(basis, sigma, core, merged=True), merged - eye)


def test_tiny_updates_survive():
    # at 1e-10, M - I computed from M in float32 would be all rounding error
    core = torch.full((2, 4, 4), 1e-10)
    basis = torch.eye(4).expand(2, 4, 4)
    torch.testing.assert_close(block_delta(basis, torch.ones(2, 4), core, torch.zeros(2, 4)), core)
