"""What the tests of the Triton kernels share: devices, tolerances, inputs and their results in float64."""

import os
import subprocess
import sys

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = (["cpu"] if INTERPRETED else []) + [pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])]
kernels = pytest.mark.parametrize("device", DEVICES)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# of a sum in float32 rounded once; the interpreter truncates to bf16, D too
ROUNDING = {torch.bfloat16: 2.0**-6 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}


def run_in_interpreter(path: str) -> None:
    """The tests of a file in a process whose kernels run in Triton's interpreter."""
    environment = dict(os.environ, TRITON_INTERPRET="1", FURA_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", path]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Of the whole tensor; NaN if any element is. Where the reference is zero or empty, the norm itself."""
    assert out.shape == reference.shape
    error, norm = (out.detach().double().cpu() - reference).norm(), reference.norm()
    return float(error if norm == 0 else error / norm)


def inputs(device, dtype, n, b, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n * b, generator=generator).to(device, dtype)
    g = torch.randn(rows, n * b, generator=generator).to(device, dtype)
    delta = torch.randn(n, b, b, generator=generator).to(device) / b**0.5
    return x, g, delta


def reference(x, g, delta, dtype):
    """y, dx and dD in float64 on the CPU, of the values that the kernel multiplies: D rounded to the dtype of x."""
    x, delta = x.detach().double().cpu(), delta.detach().to(dtype).double().cpu()
    x.requires_grad_(), delta.requires_grad_()
    y = x + x @ torch.block_diag(*delta).T
    dx, d_delta = torch.autograd.grad(y, (x, delta), g.double().cpu())
    return y.detach(), dx, d_delta
