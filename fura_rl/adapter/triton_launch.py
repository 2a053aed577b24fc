"""Starting Triton kernels with little work on the host.

Triton looks at every argument of every launch to find the compiled kernel, which costs several times as much as the
launch itself. A training step starts four kernels for each adapted layer, about 800 for a model of 28 decoder layers,
and with small batches or gradient checkpointing the host is what a step waits for. So compiled kernels are kept under a
short key, and started through the same call that Triton documents for precompiled kernels.
"""

import contextlib
import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


class Kernel:
    """A Triton kernel whose parameters are, in this order: pointers, one size that is not specialised, the rest.

    Decorate the Triton function with `do_not_specialize=[<the one size>]`.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.compiled: dict[tuple, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor | None, ...],
        size: int,
        *rest: int,
        num_warps: int,
    ) -> None:
        """
        Args:
            grid: programs along each axis.
            tensors: None stands for a tensor that the kernel does not read.
            size: any int below 2^31.
            rest: sizes and constants; each combination is compiled for itself.
        """
        first = tensors[0]
        assert first is not None
        with on_device(first.device):
            if INTERPRETED:
                self.function[grid](*tensors, size, *rest)
                return
            # Triton compiles for a type and for whether a pointer is a multiple of 16 bytes
            key = (
                first.device.index,
                rest,
                num_warps,
                *[None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors],
            )
            compiled = self.compiled.get(key)
            if compiled is None:
                self.compiled[key] = self.function[grid](*tensors, size, *rest, num_warps=num_warps)
            else:
                compiled[grid](*tensors, size, *rest)
