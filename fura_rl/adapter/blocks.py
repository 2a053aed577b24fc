"""`FuraBlocks`: the tensors of one adapter on one layer, and their `D`."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .base_weight import whole
from .basis import block_basis, random_basis
from .config import Basis, FuraConfig, Side, SingularValues
from .errors import AdapterError
from .fingerprint import SAMPLES
from .transform import (
    block_delta,
    block_multiply,
    block_transform,
    compose_deltas,
    merge_input_side,
    merge_output_side,
    use_kernels,
)


class FuraBlocks(nn.Module):
    """Trained and frozen blocks of one adapter on one layer; calling it gives `D = M - I` (n, b, b), or `M x`.

    A module of its own, with a forward, so that DeepSpeed ZeRO-3 and FSDP gather its parameters before use.

    Attributes:
        core: dR (n, b, b), trained, starts at zero.
        scale: ds (n, b), trained, starts at zero; None unless singular values are "trainable".
        bias: the trained difference of the layer's bias (out), starts at zero; None unless biases are trained.
        basis: V (n, b, b), a buffer; None for the identity. On the output side the left singular vectors.
        sigma: singular values (n, b), a buffer; None for bases other than "svd".
        fold: the difference of the multiplier folded away by `refresh` (n, b, b), a buffer; None before the first.
        base_sample: a few entries of the base weight, a buffer, by which an adapter recognises its base; or None.

    Parameters and buffers keep float32 (or more) whatever dtype the surrounding model is cast to: a step of training
    is below the resolution of bf16.
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
        self.base_sample: torch.Tensor | None
        self.register_buffer("basis", None if basis == "identity" else torch.empty_like(self.core.data))
        self.register_buffer("sigma", torch.empty_like(self.core.data[:, 0]) if basis == "svd" else None)
        self.register_buffer("fold", None)
        self.register_buffer("base_sample", self.core.data.new_empty(SAMPLES))

    @property
    def num_blocks(self) -> int:
        return self.core.shape[0]

    @property
    def block_size(self) -> int:
        return self.core.shape[1]

    @property
    def geometry(self) -> tuple[str, str, int]:
        """Adapters that agree in this can share a basis."""
        return self.side, self.basis_kind, self.block_size

    @property
    def is_plain(self) -> bool:
        """Whether kernels may read the tensors without this module's forward: trained, with a basis and not folded, and
        lying here, neither sharded (FSDP) nor fetched by hooks (ZeRO-3, accelerate's offloading)."""
        core = self.core
        here = type(core) is nn.Parameter and not hasattr(core, "ds_id") and "_hf_hook" not in self.__dict__
        return here and core.requires_grad and self.basis is not None and self.fold is None

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        """`x` (*, n * b) multiplied by `I + D`; without `x`, `D` (n, b, b) in float32 (float64 for a float64 base)."""
        merged, transposed = self.singular_values == "merged", self.side == "output"
        if x is not None and self.basis is not None and self.fold is None and use_kernels(x, self.block_size):
            return block_multiply(
                x, self.basis, self.sigma, self.core, self.scale, merged=merged, transposed=transposed
            )
        # On the output side M = R diag(s) P is the transpose of the input side's P diag(s) R.
        with torch.autocast("cpu" if self.core.is_meta else self.core.device.type, enabled=False):
            core, scale = whole(self.core), None if self.scale is None else whole(self.scale)
            delta = block_delta(self.basis, self.sigma, core.mT if transposed else core, scale, merged=merged)
            if transposed:
                delta = delta.mT
            if self.fold is not None:
                first, then = (delta, self.fold) if transposed else (self.fold, delta)
                delta = compose_deltas(first, then)
        return delta if x is None else block_transform(x, delta)

    def multiply(self, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """`W (I + D)` or `(I + D) W` of `weight` (out, in), as a new tensor of its dtype."""
        return (merge_input_side if self.side == "input" else merge_output_side)(weight, delta)

    @torch.no_grad()
    def set_basis(self, weight: torch.Tensor | None) -> int:
        """Takes the basis of the blocks of `weight` (out, in); returns how many singular values had to be floored.

        A basis that does not depend on the weight is drawn without it.
        """
        if self.basis is None:
            return 0
        if self.sigma is None or weight is None:
            self.basis.copy_(random_basis(self.num_blocks, self.block_size, self.basis.device))
            return 0
        basis, sigma, floored = block_basis(weight if self.side == "input" else weight.T, self.block_size)
        self.basis.copy_(basis)
        self.sigma.copy_(sigma)
        return floored

    def copy_basis(self, other: "FuraBlocks") -> None:
        """Takes the basis of blocks of the same geometry."""
        for name in ("basis", "sigma"):
            if getattr(self, name) is not None:
                getattr(self, name).copy_(getattr(other, name))

    @classmethod
    def from_tensors(cls, config: FuraConfig, tensors: Mapping[str, torch.Tensor]) -> "FuraBlocks":
        """The blocks that an adapter's file describes, without its base weight. They share the file's tensors.

        Raises:
            RuntimeError: tensors do not fit together.
        """
        num_blocks, block_size, _ = tensors["core"].shape
        blocks = cls(
            num_blocks,
            block_size,
            side=config.side,
            singular_values=config.singular_values,
            basis=config.basis,
            bias_features=len(tensors["bias"]) if "bias" in tensors else None,
            device=torch.device("meta"),
        )
        blocks.fold = tensors.get("fold")
        precise = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in tensors.items()}
        blocks.load_state_dict(precise, strict=False, assign=True)
        for name, value in [*blocks.named_parameters(), *blocks.named_buffers()]:
            if value.is_meta:  # not in the file
                zeros = torch.zeros(value.shape, dtype=value.dtype)
                setattr(blocks, name, nn.Parameter(zeros) if isinstance(value, nn.Parameter) else zeros)
        return blocks

    @torch.no_grad()
    def refresh(self, weight: torch.Tensor) -> None:
        """Folds `D` away and starts again from zero in the basis of the merged weight. `D` itself is unchanged.

        Args:
            weight: the base weight (out, in).

        Raises:
            AdapterError: if the basis does not depend on the weight.
        """
        if self.basis_kind != "svd":
            raise AdapterError(
                f'a basis of kind "{self.basis_kind}" does not depend on the weight: nothing to refresh.'
            )
        delta = self()
        self.set_basis(self.multiply(weight.to(delta.dtype), delta))
        self.fold = delta
        self.core.zero_()
        if self.scale is not None:
            self.scale.zero_()

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
