"""`FuraBlocks`: the tensors of one adapter on one layer, and their `D`."""

from collections.abc import Callable

import torch
from torch import nn

from .config import Basis, Side, SingularValues
from .transform import block_delta, compose_deltas


class FuraBlocks(nn.Module):
    """Trained and frozen blocks of one adapter on one layer; calling it gives `D = M - I` (n, b, b).

    A module of its own, with a forward, so that DeepSpeed ZeRO-3 and FSDP gather its parameters before use.

    Attributes:
        core: dR (n, b, b), trained, starts at zero.
        scale: ds (n, b), trained, starts at zero; None unless singular values are "trainable".
        bias: the trained difference of the layer's bias (out), starts at zero; None unless biases are trained.
        basis: V (n, b, b), a buffer; None for the identity. On the output side the left singular vectors.
        sigma: singular values (n, b), a buffer; None for bases other than "svd".
        fold: the difference of the multiplier folded away by `refresh` (n, b, b), a buffer; None before the first one.

    Parameters and buffers keep float32 (or more) whatever dtype the surrounding model is cast to: a change of `D` of
    bf16's size would be lost in bf16.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        side: Side = "input",
        singular_values: SingularValues = "trainable",
        basis: Basis = "svd",
        bias_features: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.side = side
        self.singular_values = singular_values
        self.basis_kind = basis
        n, b = num_blocks, block_size

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        self.core = zeros(n, b, b)
        self.scale = zeros(n, b) if singular_values == "trainable" else None
        self.bias = zeros(bias_features) if bias_features is not None else None
        # PEFT loads with parameters on the meta device (low_cpu_mem_usage); buffers then follow the core there.
        self.basis: torch.Tensor | None
        self.sigma: torch.Tensor | None
        self.fold: torch.Tensor | None
        self.register_buffer("basis", None if basis == "identity" else torch.empty_like(self.core.data))
        self.register_buffer("sigma", torch.empty_like(self.core.data[:, 0]) if basis == "svd" else None)
        self.register_buffer("fold", None)

    @property
    def num_blocks(self) -> int:
        return self.core.shape[0]

    @property
    def block_size(self) -> int:
        return self.core.shape[1]

    def forward(self) -> torch.Tensor:
        """`D` (n, b, b) in float32 (float64 for a float64 base), differentiable."""
        with torch.autocast(self.core.device.type, enabled=False):
            core = self.core if self.side == "input" else self.core.mT
            delta = block_delta(self.basis, self.sigma, core, self.scale, merged=self.singular_values == "merged")
            if self.fold is not None:  # on the transposed problem of the output side the order is the same
                fold = self.fold if self.side == "input" else self.fold.mT
                delta = compose_deltas(fold, delta)
            return delta if self.side == "input" else delta.mT

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or torch.finfo(moved.dtype).bits >= 32:
                return moved
            return tensor.to(moved.device, dtype=torch.promote_types(tensor.dtype, torch.float32))

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return (
            f"{self.num_blocks} blocks of {self.block_size}, side={self.side}, "
            f"singular_values={self.singular_values}, basis={self.basis_kind}"
        )
