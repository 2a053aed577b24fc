"""FuRA as this project computes it against the published form: `U diag(s) R` by blocks, stored separately.

The published layer stores `U` (as large as `W`) and trains `R` and `s`; ours leaves `W` alone and trains differences.
Outputs, gradients and merged weights must agree, step by step.
"""

import pytest
import torch
from torch import nn

from fura_rl.adapter import FuraConfig, FuraLayer

SIDES = ["input", "output"]
SINGULAR_VALUES = ["trainable", "frozen", "merged"]
SHAPES = {"tall": (24, 12), "wide": (12, 30)}
BLOCKS = {"closest": "closest", "full": "full", "int": 3}


class PublishedFura(nn.Module):
    """`W'_j = U_j diag(s_j) R_j` by column blocks (input side); by row blocks of `W`, transposed (output side)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, block_size: int, side: str, singular_values: str):
        super().__init__()
        self.side = side
        # the output side is the input side of the transposed weight
        matrix = weight if side == "input" else weight.T
        blocks = matrix.reshape(matrix.shape[0], -1, block_size).transpose(0, 1)  # (n, rows, b)
        left, sigma, right = torch.linalg.svd(blocks, full_matrices=False)
        self.register_buffer("left", left)
        if singular_values == "merged":
            self.register_buffer("s", torch.ones_like(sigma))
            self.core = nn.Parameter(sigma.unsqueeze(-1) * right)
        else:
            self.core = nn.Parameter(right.clone())
            if singular_values == "trainable":
                self.s = nn.Parameter(sigma.clone())
            else:
                self.register_buffer("s", sigma)
        self.right = right
        self.bias = nn.Parameter(bias.clone())

    def weight(self) -> torch.Tensor:
        blocks = self.left @ (self.s.unsqueeze(-1) * self.core)
        matrix = blocks.transpose(0, 1).reshape(blocks.shape[1], -1)
        return matrix if self.side == "input" else matrix.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight().T + self.bias


def make_pair(shape: str, side: str, singular_values: str, block: str, dtype: torch.dtype) -> tuple:
    torch.manual_seed(0)
    out_features, in_features = SHAPES[shape]
    linear = nn.Linear(in_features, out_features, dtype=torch.float64)
    config = FuraConfig(side=side, singular_values=singular_values, train_bias=True)
    ours = FuraLayer(linear.to(dtype), "default", config, block_rule=BLOCKS[block])
    weight, bias = linear.weight.data.double(), linear.bias.data.double()
    published = PublishedFura(weight, bias, ours.block_size["default"], side, singular_values)
    for parameter in ours.base_layer.parameters():
        parameter.requires_grad_(False)
    return ours, published


def signs(ours: FuraLayer, published: PublishedFura) -> torch.Tensor:
    """(n, b): -1 where the two singular vectors of a direction point in opposite directions."""
    basis = ours.fura_blocks["default"].basis.double()
    return torch.sign(torch.einsum("nbk,nkb->nk", basis, published.right))


def steps(ours, published, dtype, count, learning_rate=1e-2):
    """Trains both on the same data and yields them after each backward pass and step."""
    blocks = ours.fura_blocks["default"]
    trained = [p for p in (blocks.core, blocks.scale, blocks.bias) if p is not None]
    optimizers = [
        torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0),
        torch.optim.AdamW(published.parameters(), lr=learning_rate, weight_decay=0.0),
    ]
    out_features, in_features = ours.out_features, ours.in_features
    for _ in range(count):
        x = torch.randn(8, in_features, dtype=torch.float64)
        target = torch.randn(8, out_features, dtype=torch.float64)
        outputs = [ours(x.to(dtype)).double(), published(x)]
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
        yield outputs
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("singular_values", SINGULAR_VALUES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_published_form_in_float64(shape, side, singular_values, block):
    ours, published = make_pair(shape, side, singular_values, block, torch.float64)
    if ours.block_size["default"] > min(SHAPES[shape]):
        pytest.fail("a block wider than the weight must have been shrunk")
    blocks = ours.fura_blocks["default"]
    flip = signs(ours, published)
    close = dict(rtol=0, atol=1e-10)
    for our_output, published_output in steps(ours, published, torch.float64, 50):
        torch.testing.assert_close(our_output, published_output, **close)
        core_gradient = blocks.core.grad if side == "input" else blocks.core.grad.mT
        torch.testing.assert_close(core_gradient * flip.unsqueeze(-1), published.core.grad, **close)
        if blocks.scale is not None:
            torch.testing.assert_close(blocks.scale.grad, published.s.grad, **close)
        torch.testing.assert_close(blocks.bias.grad, published.bias.grad, **close)
        torch.testing.assert_close(ours.merged_weight(), published.weight().detach(), **close)
        torch.testing.assert_close(ours.merged_bias(), published.bias.detach(), **close)
    moved = (ours.merged_weight() - ours.base_layer.weight).norm() / ours.base_layer.weight.norm()
    assert moved > 0.1  # the agreement is one of trained weights


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-6),  # rounding: 1e-7 of the update after 50 steps
        (torch.bfloat16, 2e-3),  # activations and gradients carry 8 bits (2^-9 each), the trained tensors 24
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_stays_near_the_published_form_in_low_precision(side, dtype, tolerance):
    ours, published = make_pair("tall", side, "trainable", "closest", dtype)
    start = ours.merged_weight().double()
    for _ in steps(ours, published, dtype, 50):
        pass
    update = published.weight().detach() - start
    error = ours.merged_weight().double() - published.weight().detach()
    assert update.norm() > 0.1 * start.norm()
    assert error.norm() < tolerance * update.norm()


def test_update_has_full_rank():
    ours, published = make_pair("tall", "input", "trainable", "closest", torch.float64)
    for _ in steps(ours, published, torch.float64, 5):
        pass
    update = ours.get_delta_weight("default")
    assert torch.linalg.matrix_rank(update) == min(update.shape)
