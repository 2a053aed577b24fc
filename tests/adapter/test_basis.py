"""Block sizes, and the block basis against an SVD."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fura_rl.adapter import AdapterError
from fura_rl.adapter.basis import (
    aligned_block_size,
    block_basis,
    closest_block_size,
    fit_block_size,
    random_basis,
    resolve_block_size,
)


@pytest.mark.parametrize(
    ("width", "block_size"),
    [(896, 32), (2048, 64), (4864, 76), (6144, 96), (3584, 64), (18944, 148), (64, 8), (13, 13), (1, 1), (2, 2)],
)
def test_closest_block_size(width, block_size):
    assert closest_block_size(width) == block_size
    assert resolve_block_size("closest", width) == block_size


@pytest.mark.parametrize(
    ("width", "block_size"),
    [(896, 32), (2048, 64), (4864, 64), (6144, 64), (3584, 64), (18944, 128), (8960, 128), (1536, 32), (576, 32),
     (14336, 128), (10_000, 100), (256, 16), (64, 16), (48, 8), (13, 13), (8, 4)],
)  # fmt: skip
def test_aligned_block_size(width, block_size):
    """The nearest power of two by ratio, the larger one where two are level."""
    assert aligned_block_size(width) == resolve_block_size("aligned", width) == block_size
    assert width % block_size == 0


def test_block_rules():
    assert resolve_block_size("full", 896) == 896
    assert resolve_block_size(8, 896) == 8
    assert resolve_block_size("head", 896, head_dim=64) == 64
    assert resolve_block_size("head", 896) == 32  # the side's features are no heads
    with pytest.raises(AdapterError, match="7 does not divide the layer's width 12"):
        resolve_block_size(7, 12)


@pytest.mark.parametrize(("block", "width", "other", "fitted"), [(13, 13, 5, 1), (32, 896, 16, 16), (8, 64, 100, 8)])
def test_fit_block_size(block, width, other, fitted):
    assert fit_block_size(block, width, other) == fitted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_basis_is_the_svd_of_each_block(dtype):
    torch.manual_seed(0)
    weight = torch.randn(2000, 24).to(dtype)  # more rows than a chunk
    basis, sigma, floored = block_basis(weight, 8)
    assert floored == 0
    for j, block in enumerate(weight.double().split(8, dim=1)):
        left, expected, right = torch.linalg.svd(block, full_matrices=False)
        torch.testing.assert_close(sigma[j], expected, rtol=1e-10, atol=0)
        overlap = (right @ basis[j]).abs()
        torch.testing.assert_close(overlap, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
        columns = block @ basis[j] / sigma[j]  # U, never stored
        torch.testing.assert_close((left.T @ columns).abs(), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)


def test_signs_are_canonical():
    torch.manual_seed(0)
    weight = torch.randn(64, 32, dtype=torch.float64)
    first, _, _ = block_basis(weight, 8)
    # another order of summation turns LAPACK's signs at random; the basis must not follow
    second, _, _ = block_basis(weight[torch.randperm(64)], 8)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-8)


def test_null_directions_are_floored_and_zero_blocks_have_unit_scale():
    torch.manual_seed(0)
    weight = torch.randn(16, 12)
    weight[:, 0] = weight[:, 1]  # a null direction in the first block
    weight[:, 4:8] = 0
    basis, sigma, floored = block_basis(weight, 4)
    assert floored == 1 + 4
    assert sigma[0, -1] == pytest.approx(1e-4 * float(sigma[0, 0]))
    assert (sigma[1] == 1).all()
    eye = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    torch.testing.assert_close(basis.mT @ basis, eye)


def test_nan_weight_is_refused():
    weight = torch.randn(8, 8)
    weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match="NaN or infinite"):
        block_basis(weight, 4)


def test_thread_count_is_left_alone():
    before = torch.get_num_threads()
    block_basis(torch.randn(16, 16), 4)
    assert torch.get_num_threads() == before


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns, views of the input left out."""

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()
        self.storage = source.untyped_storage().data_ptr()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.storage:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("shape", [(8192, 512), (1024, 4096)])
def test_no_temporary_is_larger_than_the_layer(shape):
    weight = torch.randn(shape).bfloat16()
    with Largest(weight) as largest:
        block_basis(weight, closest_block_size(shape[1]))
    assert 0 < largest.nbytes <= weight.nbytes


def test_random_basis_is_orthogonal_and_seeded():
    torch.manual_seed(3)
    first = random_basis(2, 5)
    torch.manual_seed(3)
    assert torch.equal(first, random_basis(2, 5))
    torch.testing.assert_close(first.mT @ first, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
