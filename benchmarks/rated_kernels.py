"""The kernels that `kernel_rates.py` times, each beside the same function in torch: one `Case` for each shape.

Shapes: n blocks, b block size, K = n * b features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fura_rl.adapter import (
    delta_kernels,
    four_bit_kernels,
    gathered,
    gradient_kernels,
    kernels,
    shared_kernels,
    transform,
)
from fura_rl.rollout import merge_kernel

Results = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    Attributes:
        least_bytes: That must move through memory.
        run, torch: The kernels and the same without; each returns what it computed.
    """

    kernel: str
    shape: str
    least_bytes: int
    run: Callable[[], Results]
    torch: Callable[[], Results]


def without_kernels(function: Callable[[], Results]) -> Results:
    transform.kernel_choice, before = "torch", transform.kernel_choice
    try:
        return function()
    finally:
        transform.kernel_choice = before


def transform_cases(rows: int, device: str, n: int, b: int) -> list[Case]:
    x, other, g = (torch.randn(rows, n * b, device=device, dtype=torch.bfloat16) for _ in range(3))
    delta = (torch.randn(n, b, b, device=device) / b).bfloat16()
    leaf, leaf_delta = x.clone().requires_grad_(), delta.clone().requires_grad_()

    def plain() -> torch.Tensor:
        return without_kernels(lambda: transform.block_transform(leaf, leaf_delta))

    y = plain()

    def factors() -> Results:
        dx, shares = gradient_kernels.run_gradient_shares(g, x, delta, True, other=other)
        return dx, shares.sum(0)

    def backward() -> Results:
        return gradient_kernels.run_gradient(g, x, delta, True)

    def plain_factors() -> Results:
        product = (x * other).requires_grad_()
        y = without_kernels(lambda: transform.block_transform(product, leaf_delta))
        return torch.autograd.grad(y, (product, leaf_delta), g)

    def plain_backward() -> Results:
        return torch.autograd.grad(y, (leaf, leaf_delta), g, retain_graph=True)

    def gated() -> Results:
        d_gate, d_up, shares = gradient_kernels.run_gated_gradient_shares(g, x, other, delta)
        return d_gate, d_up, shares.sum(0)

    def plain_gated() -> Results:
        gate, up = x.clone().requires_grad_(), other.clone().requires_grad_()
        y = without_kernels(lambda: transform.block_transform(torch.nn.functional.silu(gate) * up, leaf_delta))
        return torch.autograd.grad(y, (gate, up, leaf_delta), g)

    shape, unit, small = f"{n} x {b}", x.nbytes, delta.nbytes  # D is read in bf16, its gradient written in float32
    return [
        Case("forward", shape, 2 * unit + small, lambda: kernels.run_transform(x, delta), plain),
        Case(
            "backward",
            shape,
            3 * unit + 3 * small,
            lambda: gradient_kernels.run_gradient(g, x, delta, True),
            plain_backward,
        ),
        Case("backward, of factors", shape, 4 * unit + 3 * small, factors, plain_factors),
    ] + [Case("backward, gated", shape, 5 * unit + 3 * small, gated, plain_gated)] * transform.can_gate(b)


def shared_cases(rows: int, device: str, n: int, b: int, count: int) -> list[Case]:
    x = torch.randn(rows, n * b, device=device, dtype=torch.bfloat16)
    gradients = [torch.randn_like(x) for _ in range(count)]
    delta = (torch.randn(count, n, b, b, device=device) / b).bfloat16()
    leaf, deltas = x.clone().requires_grad_(), [d.clone().requires_grad_() for d in delta]

    def plain() -> list[torch.Tensor]:
        return without_kernels(lambda: [transform.block_transform(leaf, d) for d in deltas])

    ys = plain()

    def backward() -> Results:
        dx, shares = shared_kernels.run_shared_gradient_shares(gradients, x, delta, True)
        return dx, *shares.sum(0)

    def plain_backward() -> Results:
        return torch.autograd.grad(ys, [leaf, *deltas], gradients, retain_graph=True)

    shape, unit, small = f"{count} of {n} x {b}", x.nbytes, delta.nbytes
    forward = lambda: shared_kernels.run_shared_transform(x, delta)  # noqa: E731
    return [
        Case("shared forward", shape, (1 + count) * unit + small, forward, plain),
        Case("shared backward", shape, (2 + count) * unit + 3 * small, backward, plain_backward),
    ]


def delta_cases(device: str, n: int, b: int, count: int) -> list[Case]:
    bases = [torch.linalg.qr(torch.randn(n, b, b, device=device))[0].contiguous() for _ in range(count)]
    sigmas = [torch.rand(n, b, device=device) + 1 for _ in range(count)]
    cores = [(torch.randn(n, b, b, device=device) / b).requires_grad_() for _ in range(count)]
    scales = [(torch.randn(n, b, device=device) / b).requires_grad_() for _ in range(count)]
    adapters = [tuple(t.detach() for t in a) for a in zip(bases, sigmas, cores, scales, strict=True)]
    d_delta = torch.randn(1, count, n, b, b, device=device)  # one share

    def plain() -> list[torch.Tensor]:
        return [transform.block_delta(*adapter) for adapter in zip(bases, sigmas, cores, scales, strict=True)]

    deltas = plain()

    def build() -> Results:
        return list(delta_kernels.run_deltas(adapters, False, False, torch.bfloat16))

    def backward() -> Results:
        d_cores, d_scales = delta_kernels.run_delta_gradients(d_delta, adapters, False, False)
        return [*d_cores, *d_scales]

    def plain_backward() -> Results:
        return torch.autograd.grad(deltas, [*cores, *scales], list(d_delta[0]), retain_graph=True)

    shape, entries = f"{count} of {n} x {b}", count * n * b * b
    return [
        Case("D", shape, entries * (4 + 4 + 2), build, lambda: [d.bfloat16() for d in plain()]),
        Case("gradients from D's", shape, entries * 4 * 4, backward, plain_backward),
    ]


def merge_cases(device: str, out: int, n: int, b: int) -> list[Case]:
    weight = torch.randn(out, n * b, device=device, dtype=torch.bfloat16)
    delta, stored = torch.randn(n, b, b, device=device) / b / 10, torch.empty_like(weight)

    def merge() -> Results:
        merge_kernel.merge_into(weight, delta, stored)
        return stored

    def plain() -> Results:
        return transform.merge_input_side(weight.float(), delta).bfloat16()

    return [Case("merge", f"{out} of {n} x {b}", 2 * weight.nbytes + delta.nbytes, merge, plain)]


def gathered_cases(device: str, n: int, b: int, rows: int, adapters: int) -> list[Case]:
    parts = 3
    x = torch.randn(rows, n * b, device=device, dtype=torch.bfloat16)
    delta = (torch.randn(adapters, parts, n, b, b, device=device) / b).bfloat16()
    active = torch.ones(adapters, parts, dtype=torch.int32, device=device)
    ids = (torch.arange(rows, device=device) % adapters).int()
    known = gathered.sort_rows(ids, adapters)

    def transformed() -> torch.Tensor:
        return gathered.gathered_transform(x, delta, active, ids, *known)

    shape = f"{rows} rows, {adapters} adapters, {parts} of {n} x {b}"
    least = (1 + parts) * x.nbytes + delta.nbytes
    return [Case("gathered", shape, least, transformed, lambda: without_kernels(transformed))]


def four_bit_cases(device: str, out: int, n: int, b: int) -> list[Case]:
    """On bitsandbytes' NF4 with double quantisation; read are the codes and the scales of their groups."""
    import bitsandbytes
    from nf4 import nf4

    weight = torch.randn(out, n * b, device=device, dtype=torch.bfloat16)
    packed, state = nf4(weight)
    delta = (torch.randn(n, b, b, device=device) / b).bfloat16()

    def dequantised() -> torch.Tensor:
        return bitsandbytes.functional.dequantize_4bit(packed, state)

    def exact() -> torch.Tensor:
        bytes_ = packed.flatten().int()
        values = state.code[torch.stack([bytes_ >> 4, bytes_ & 15], -1)].view(-1, state.blocksize)
        return (values * four_bit_kernels.absmax_of(state)[:, None]).view(out, n * b)

    def merged() -> Results:
        return four_bit_kernels.run_merged(packed, state, delta)

    def plain() -> torch.Tensor:
        return transform.merge_input_side(exact(), delta.float())

    shape, least = f"{out} of {n} x {b}", 2 * out * n * b + packed.nbytes + state.absmax.nbytes
    return [
        Case("dequantise (bitsandbytes)", shape, least, dequantised, exact),
        Case("merge 4 bits", shape, least + delta.nbytes, merged, plain),
    ]
