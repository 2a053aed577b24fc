"""What multiplies the weight of one layer of an engine, and how a merge writes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.func import functional_call

from fura_rl.adapter.blocks import FuraBlocks
from fura_rl.adapter.config import FuraConfig, Side
from fura_rl.adapter.loading import Tensors
from fura_rl.adapter.transform import HAVE_KERNELS, have_kernels, merge_input_side, merge_output_side
from fura_rl.errors import FuraError

if HAVE_KERNELS:
    from fura_rl.adapter.delta_kernels import run_delta
    from fura_rl.rollout import merge_kernel


@dataclass(frozen=True)
class Multiplier:
    """Of one layer.

    Attributes:
        side: Of the weight, on which `I + D` stands.
        delta: `D` (n, b, b), in float32 or more.
        bias: The trained difference of the layer's bias, or None.
    """

    side: Side
    delta: torch.Tensor
    bias: torch.Tensor | None

    @property
    def width(self) -> int:
        """Features of the adapted side."""
        return self.delta.shape[0] * self.delta.shape[1]

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """`W (I + D)`, or `(I + D) W`, of `weight` (out, in), in float32 or more."""
        weight = weight.to(self.delta.dtype)
        return (merge_input_side if self.side == "input" else merge_output_side)(weight, self.delta)

    def merge_into(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `merged(weight)`, rounded once, to `out` (out, in), in one pass where there is a kernel for it."""
        if self.side == "input" and HAVE_KERNELS and merge_kernel.supports(weight, self.delta.shape[1], out):
            merge_kernel.merge_into(weight, self.delta, out)
        else:
            out.copy_(self.merged(weight))


def empty_blocks(module: str, config: FuraConfig, tensors: Tensors) -> FuraBlocks:
    """Blocks for tensors of these shapes.

    Raises:
        FuraError: one is missing, or has another shape than the core asks for.
    """
    try:
        blocks = FuraBlocks.from_tensors(config, {key: value.to("meta") for key, value in tensors.items()})
    except RuntimeError as error:  # torch names the tensor and both shapes
        raise FuraError(f"The adapter's tensors of {module} do not fit together: {error}") from error
    missing = sorted(blocks.state_dict().keys() - tensors.keys() - {"base_sample"})
    if missing:
        raise FuraError(f"The adapter lacks {missing[0]} of {module}: its file is incomplete.")
    return blocks


def multiplier(blocks: FuraBlocks, tensors: Tensors) -> Multiplier:
    """Of `tensors` in place of those of `blocks`, which have the same shapes.

    `D` takes one launch where there is a kernel for it, and nothing where the core is `D`: in the delta form.
    """
    tensors = {key: value for key, value in tensors.items() if key != "base_sample"}
    precise = {key: value.to(torch.promote_types(value.dtype, torch.float32)) for key, value in tensors.items()}
    core = precise["core"]
    if blocks.basis_kind == "identity" and blocks.singular_values == "merged" and "fold" not in precise:
        delta = core
    elif (
        have_kernels(core)
        and core.dtype == torch.float32
        and core.shape[1] <= merge_kernel.LARGEST_BLOCK
        and blocks.side == "input"
        and "basis" in precise
        and "fold" not in precise
    ):
        factors = (precise["basis"], precise.get("sigma"), core, precise.get("scale"))
        delta = run_delta(factors, blocks.singular_values == "merged", False)
    else:
        delta = functional_call(blocks, precise, strict=False)
    return Multiplier(blocks.side, delta, precise.get("bias"))
