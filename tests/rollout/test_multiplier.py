"""`D` and the merge of one layer, by kernels (in Triton's interpreter where there is no GPU) and by torch."""

import os
import subprocess
import sys

import pytest
import torch

from fura_rl import FuraConfig
from fura_rl.adapter.basis import block_basis, closest_block_size
from fura_rl.adapter.blocks import FuraBlocks
from fura_rl.adapter.triton_launch import Kernel
from fura_rl.rollout.multiplier import multiplier
from fura_rl.rollout.payload import Adapter
from fura_rl.rollout.warm_up import warm_up

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SIDES = [("input", "trainable"), ("input", "merged"), ("input", "frozen"), ("output", "trainable")]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_with_kernels_in_the_interpreter():
    """Triton's interpreter has to be chosen before Triton is imported."""
    environment = dict(os.environ, TRITON_INTERPRET="1", FURA_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_is_the or kernels_of",
        __file__,
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert f"{2 * len(SIDES) + 1} passed" in run.stdout


def made(side, singular_values, folded, weight):
    """An adapter of one layer as tensors, and `D` in float64 by the blocks themselves."""
    generator = torch.Generator().manual_seed(0)
    b, width = 16, weight.shape[1 if side == "input" else 0]
    basis, sigma, _ = block_basis(weight if side == "input" else weight.T, b)
    tensors = {"core": 0.05 * torch.randn(width // b, b, b, generator=generator), "basis": basis.float()}
    tensors["sigma"] = sigma.float()
    if singular_values == "trainable":
        tensors["scale"] = 0.05 * torch.randn(width // b, b, generator=generator)
    if folded:
        tensors["fold"] = 0.05 * torch.randn(width // b, b, b, generator=generator)
    family = {"side": side, "singular_values": singular_values, "basis": "svd"}
    blocks = FuraBlocks.from_tensors(FuraConfig(**family), {key: value.double() for key, value in tensors.items()})
    return Adapter(family, {"layer": tensors}), blocks


@torch.no_grad()
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("side, singular_values", SIDES)
def test_is_the_float64_merge_rounded_once(side, singular_values, folded):
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    adapter, blocks = made(side, singular_values, folded, weight.float())
    found = adapter.multipliers(torch.device(DEVICE))["layer"]
    torch.testing.assert_close(found.delta.cpu().double(), blocks(), rtol=0, atol=2e-6)
    exact = blocks.multiply(weight.double(), blocks())
    fused = torch.full((130, 64), float("nan"), dtype=torch.float16, device=DEVICE)  # the interpreter cuts bfloat16 off
    found.merge_into(weight.to(DEVICE), fused[20:116])
    assert ((fused[20:116].cpu().double() - exact).abs() <= 2.0**-11 * 1.01 * exact.abs() + 2.0**-15).all()
    assert fused[:20].isnan().all() and fused[116:].isnan().all()


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="there are no kernels: see the process above")
@torch.no_grad()
def test_the_kernels_of_a_first_swap_are_compiled_before(monkeypatch):
    """Warming up calls the kernels with every constant, dtype and alignment that an adapter in full or as its delta
    calls them with, for rows that lie somewhere in a fused weight."""
    called = set()
    call = Kernel.__call__

    def record(self, grid, tensors, size, *rest, num_warps):
        kinds = [None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors]
        called.add((self.function.__name__, rest, num_warps, *kinds))
        call(self, grid, tensors, size, *rest, num_warps=num_warps)

    monkeypatch.setattr(Kernel, "__call__", record)
    widths = [64, 96]
    warm_up(widths, torch.float16, torch.device(DEVICE))
    warm = set(called)
    assert {name for name, *_ in warm} == {"_delta_kernel", "_merge_kernel"}
    called.clear()
    for width in widths:
        family = {"side": "input", "singular_values": "trainable", "basis": "svd"}
        weight = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
        b = closest_block_size(width)
        basis, sigma, _ = block_basis(weight, b)
        core, scale = torch.randn(width // b, b, b), torch.randn(width // b, b)
        full = {"core": core, "scale": scale, "basis": basis.float(), "sigma": sigma.float()}
        delta = {"side": "input", "singular_values": "merged", "basis": "identity"}
        fused = torch.zeros(50, width, dtype=torch.float16, device=DEVICE)
        for options, tensors in ((family, full), (delta, {"core": core})):
            both = Adapter(options, {"a": tensors, "b": tensors})
            for multiplier_of_one in both.multipliers(torch.device(DEVICE)).values():
                multiplier_of_one.merge_into(weight.half().to(DEVICE), fused[10:30])
    assert called == warm


def test_modules_of_one_shape_do_not_share_their_numbers():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    adapter, blocks = made("input", "trainable", False, weight)
    tensors = adapter.modules["layer"]
    other = {**tensors, "core": -tensors["core"], "bias": torch.ones(3)}
    both = Adapter(adapter.family, {"a": tensors, "b": other, "c": tensors}).multipliers(torch.device("cpu"))
    assert torch.equal(both["a"].delta, both["c"].delta) and not torch.equal(both["a"].delta, both["b"].delta)
    assert both["a"].bias is None and torch.equal(both["b"].bias, torch.ones(3))
    blocks.load_state_dict({"core": other["core"].double()}, strict=False)
    torch.testing.assert_close(both["b"].delta.double(), blocks(), rtol=0, atol=2e-6)
    assert torch.equal(multiplier(blocks.float(), tensors).delta, both["a"].delta)
