"""Block sizes and block bases: the frozen part of a FuRA adapter, read from the base weight once.

A weight `W` (out, in) splits into `n` column blocks `W_j` (out, b). FuRA needs the right singular vectors `V_j` (b, b)
and the singular values `sigma_j` (b) of each block, never its left ones. Both come from the eigendecomposition of the
Gram matrix `W_j^T W_j` in float64: exact enough (a condition number of 1e4 leaves 8 digits) and faster than the SVD of
a tall block. The output side is the same with `W^T`.

Shapes: n blocks, b block size, out rows, in columns, `n * b = in`.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch

from .errors import AdapterError

SIGMA_FLOOR = 1e-4  # relative to a block's largest singular value: real weights have conditions of at most 100
CHUNKS = 8  # of rows of W, of which the Gram matrix needs a float64 copy: one at a time is half a bf16 layer
SMALL_BLOCK = 256
MIN_HOST_THREADS = 4


def closest_block_size(width: int) -> int:
    """The larger of the two most nearly equal factors of `width`: 896 -> 32 (28 x 32), a prime p -> p."""
    smaller = math.isqrt(width)
    while width % smaller:
        smaller -= 1
    return width // smaller


def aligned_block_size(width: int) -> int:
    """The power of two nearest to the square root of `width` that divides it: 4864 -> 64, 18944 -> 128, 6144 -> 64.

    Kernels read blocks of such sizes at the rate of memory, and those of 76 or 148 features at half of it. Where none
    from 16 on lies within a factor of two of the square root, the closest factors' size.
    """
    near = [b for b in (16, 32, 64, 128, 256) if width % b == 0 and b * b <= 4 * width <= 16 * b * b]
    return min(near, key=lambda b: (max(b * b / width, width / (b * b)), -b), default=closest_block_size(width))


def fit_block_size(block_size: int, width: int, other: int) -> int:
    """The largest divisor of `width` that is at most `block_size` and at most `other`, the weight's other dimension.

    A block wider than `other` has null directions, along which a trained core would do nothing.
    """
    limit = min(block_size, other)
    return next(b for b in range(limit, 0, -1) if width % b == 0)


def resolve_block_size(rule: int | str, width: int, head_dim: int | None = None) -> int:
    """The block size that `rule` asks for on a side of `width` features.

    Args:
        rule: "closest", "aligned", "head", "full" or an int.
        width: `in` on the input side, `out` on the output side.
        head_dim: the size of an attention head if this side's features are heads; other layers fall back to "closest".

    Raises:
        AdapterError: if an int, or the head dimension, does not divide `width`.
    """
    if rule == "full":
        return width
    if rule == "aligned":
        return aligned_block_size(width)
    if rule == "closest" or (rule == "head" and head_dim is None):
        return closest_block_size(width)
    block_size = head_dim if rule == "head" else rule
    assert isinstance(block_size, int)
    if width % block_size:
        raise AdapterError(
            f"block_size {block_size} does not divide the layer's width {width}; the closest factor pair would give "
            f"{closest_block_size(width)}."
        )
    return block_size


def block_gram(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """Gram matrices `W_j^T W_j` (n, b, b) in float64 of the column blocks of `weight` (out, in)."""
    n = weight.shape[1] // block_size
    gram_nbb = torch.zeros(n, block_size, block_size, dtype=torch.float64, device=weight.device)
    for rows in weight.split(min(1024, max(64, weight.shape[0] // CHUNKS))):
        rows_nrb = rows.double().view(-1, n, block_size).transpose(0, 1)
        gram_nbb.baddbmm_(rows_nrb.mT, rows_nrb)
    return gram_nbb


def map_blocks(function: Callable[[torch.Tensor], Any], matrices_nbb: torch.Tensor) -> list[Any]:
    """Applies a function of linear algebra to batches of blocks, and returns its results in order.

    Many small matrices suit neither a library's threads nor a GPU: threads inside one small problem wait for each other
    (eigh of 32 blocks of 64 took 1.5 s on two busy cores, 0.03 s with one thread), and a GPU takes 30 ms for what 16
    cores do in 3. So each thread gets problems of its own. Large blocks, and blocks on a GPU whose host has few threads
    for this process, stay where they are.
    """
    threads = torch.get_num_threads()
    if matrices_nbb.shape[-1] > SMALL_BLOCK or (matrices_nbb.is_cuda and threads < MIN_HOST_THREADS):
        return [function(matrices_nbb)]
    torch.set_num_threads(1)
    try:
        return list(_pool(threads).map(function, matrices_nbb.cpu().chunk(threads)))
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fura-basis")


def block_basis(weight: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Right singular vectors and singular values of the column blocks of `weight`.

    Singular vectors have no natural sign; here each one has a non-negative product with one fixed vector, so that two
    machines agree on it.

    Args:
        weight: (out, in), any floating dtype; the result lies on its device.
        block_size: b, a divisor of `in`.

    Returns:
        V (n, b, b) with the vectors as columns, sigma (n, b) in falling order, both float64; and the number of
        directions whose singular value was raised to the floor. A block of zeros gets sigma = 1: it has no scale.

    Raises:
        AdapterError: if the weight holds NaN or infinite values.
    """
    gram_nbb = block_gram(weight, block_size)
    if not torch.isfinite(gram_nbb).all():
        raise AdapterError("the base weight holds NaN or infinite values, so it has no singular vectors.")
    eigenvalues, vectors = zip(*map_blocks(torch.linalg.eigh, gram_nbb), strict=True)
    sigma_nb = torch.cat(eigenvalues).to(weight.device).clamp_min(0).sqrt().flip(-1)
    basis_nbb = torch.cat(vectors).to(weight.device).flip(-1)
    reference_b = torch.randn(block_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signs_nb = torch.sign(reference_b.to(basis_nbb.device) @ basis_nbb)
    basis_nbb = basis_nbb * torch.where(signs_nb == 0, 1.0, signs_nb).unsqueeze(-2)

    largest_n1 = sigma_nb[:, :1]
    floor_n1 = torch.where(largest_n1 > 0, SIGMA_FLOOR * largest_n1, 1.0)
    floored = int((sigma_nb < floor_n1).sum())
    # float32 must be able to hold sigma and 1 / sigma
    sigma_nb = torch.maximum(sigma_nb, floor_n1).clamp(1e-30, 1e30)
    return basis_nbb, sigma_nb, floored


def random_basis(num_blocks: int, block_size: int, device: torch.device | None = None) -> torch.Tensor:
    """Random orthogonal matrices (n, b, b) in float64, drawn on the CPU from the global generator."""
    gaussian_nbb = torch.randn(num_blocks, block_size, block_size, dtype=torch.float64)
    return torch.linalg.qr(gaussian_nbb).Q.to(device)
