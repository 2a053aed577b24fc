"""`FuraLayer`: a frozen linear layer whose input (or output) is multiplied by trained diagonal blocks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .basis import block_basis, fit_block_size, random_basis, resolve_block_size
from .blocks import FuraBlocks
from .config import AdapterError, FuraConfig
from .snapshot import BaseSnapshot
from .transform import block_transform, merge_input_side, merge_output_side

logger = logging.getLogger(__name__)

INIT_NOISE = 0.2  # of init_weights=False, which tests use to get an adapter that is not the identity


class FuraLayer(nn.Module, BaseTunerLayer):
    """A linear layer (`nn.Linear`, `Conv1D` or a quantised one) with FuRA adapters.

    Input side: `y = W (M x) + bias`; output side: `y = M (W x) + bias`. Several active adapters act as if merged one
    after the other in their order.

    Attributes:
        fura_blocks: adapter name -> `FuraBlocks`.
        block_size: adapter name -> b.
    """

    adapter_layer_names: tuple[str, ...] = ("fura_blocks",)
    other_param_names: tuple[str, ...] = ("block_size",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: FuraConfig,
        *,
        block_rule: int | str = "closest",
        head_dim: int | None = None,
        name: str = "",
        **quantization_kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.fura_blocks = nn.ModuleDict({})
        self.block_size: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._snapshot: BaseSnapshot | None = None  # of the unmerged base layer, while adapters are merged
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.name = name
        self.update_layer(adapter_name, config, block_rule=block_rule, head_dim=head_dim)

    @property
    def transposed(self) -> bool:
        """Whether the base layer stores its weight as (in, out), as GPT-2's `Conv1D` does."""
        return isinstance(self.get_base_layer(), Conv1D)

    # -- building ---------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: FuraConfig,
        *,
        block_rule: int | str = "closest",
        head_dim: int | None = None,
    ) -> None:
        """Adds the adapter `adapter_name` to this layer, with a basis of the unmerged base weight.

        Raises:
            AdapterError: if the block size does not divide the layer's width, or the weight cannot be read.
        """
        base = self.get_base_layer()
        width, other = (self.in_features, self.out_features)
        if config.side == "output":
            width, other = other, width
        wanted = resolve_block_size(block_rule, width, head_dim)
        block_size = fit_block_size(wanted, width, other)
        if block_size != wanted:
            logger.info(
                "%s: block size %d does not fit a %dx%d weight, shrunk to %d.",
                self.name,
                wanted,
                self.out_features,
                self.in_features,
                block_size,
            )
        device, base_dtype = self._get_base_layer_device_and_dtype(base)
        blocks = FuraBlocks(
            width // block_size,
            block_size,
            side=config.side,
            singular_values=config.singular_values,
            basis=config.basis,
            bias_features=self.out_features if config.train_bias and getattr(base, "bias", None) is not None else None,
            device=device,
            dtype=torch.float64 if base_dtype == torch.float64 else torch.float32,
        )
        if not blocks.core.is_meta:
            self._fill_basis(blocks)
            if not config.init_weights:
                nn.init.normal_(blocks.core, std=INIT_NOISE)
        self.fura_blocks[adapter_name] = blocks
        self.block_size[adapter_name] = block_size
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _fill_basis(self, blocks: FuraBlocks) -> None:
        """Sets the basis of `blocks`: the one of an adapter of the same geometry if there is one, else a new one."""
        if blocks.basis is None:
            return
        n, b = blocks.num_blocks, blocks.block_size
        if blocks.basis_kind == "random":
            blocks.basis.copy_(random_basis(n, b, blocks.basis.device))
            return
        assert blocks.sigma is not None
        for twin in self.fura_blocks.values():
            same = (twin.side, twin.basis_kind, twin.block_size) == (blocks.side, blocks.basis_kind, b)
            if same and twin.fold is None and not twin.core.is_meta:
                blocks.basis.copy_(twin.basis)
                blocks.sigma.copy_(twin.sigma)
                return
        with self._weight() as weight:
            basis, sigma, floored = block_basis(weight if blocks.side == "input" else weight.mT, b)
        if floored:
            logger.info(
                "%s: %d of %d directions carry (almost) no weight; their singular values were raised to the floor.",
                self.name,
                floored,
                n * b,
            )
        blocks.basis.copy_(basis)
        blocks.sigma.copy_(sigma)

    @property
    def _unmerged_base(self) -> Any:
        """The base layer, or while adapters are merged a view of what it was before."""
        return self.get_base_layer() if self._snapshot is None else self._snapshot.view

    @contextmanager
    def _weight(self) -> Iterator[torch.Tensor]:
        """The unmerged base weight as (out, in), dequantised, gathered under ZeRO-3, loaded if offloaded."""
        base = self.get_base_layer()
        hook = getattr(base, "_hf_hook", None)
        offloaded = isinstance(hook, AlignDevicesHook) and hook.offload
        if offloaded:
            hook.pre_forward(base)
        try:
            if self.quantization_backend is not None:
                yield self._dequantised_weight()
            else:
                weight = self._unmerged_base.weight
                with gather_params_ctx(weight, modifier_rank=None):
                    yield weight.data.T if self.transposed else weight.data
        finally:
            if offloaded:
                hook.post_forward(base, torch.tensor([]))

    def _dequantised_weight(self) -> torch.Tensor:
        assert self.quantization_backend is not None
        try:
            return self.quantization_backend.get_base_weight(self._unmerged_base)
        except (TypeError, NotImplementedError) as error:
            raise AdapterError(
                f"{self.name}: a {self.quantization_backend.backend_name} layer cannot be dequantised, so it has no "
                'singular vectors and cannot be merged; use basis="identity" or "random", or an unquantised base.'
            ) from error

    # -- reading ----------------------------------------------------------------------------------------------------

    def delta(self, adapter_name: str) -> torch.Tensor:
        """`D = M - I` (n, b, b) of one adapter in float32, differentiable."""
        return self.fura_blocks[adapter_name]()

    @torch.no_grad()
    def merged_weight(self, adapter_names: list[str] | None = None, rows: slice | None = None) -> torch.Tensor:
        """The dense weight with adapters applied, as a float32 temporary (float64 for a float64 base).

        The base weight is never written to, and the result does not depend on whether adapters are merged or disabled.

        Args:
            adapter_names: in the order of merging; the active adapters if None. Names unknown to this layer are
                skipped.
            rows: output rows to compute, all if None.

        Returns:
            (rows, in), in the layout of the base layer's own weight ((in, rows) for `Conv1D`).
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        blocks = [self.fura_blocks[name] for name in names if name in self.fura_blocks]
        with self._weight() as weight:
            # an output-side multiplier mixes rows, so it needs all of them
            early = rows is not None and all(block.side == "input" for block in blocks)
            weight = weight[rows] if early else weight
            merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=not blocks)
            for block in blocks:
                merge = merge_input_side if block.side == "input" else merge_output_side
                merged = merge(merged, block())
        if rows is not None and not early:
            merged = merged[rows]
        return merged.T.contiguous() if self.transposed else merged

    @torch.no_grad()
    def merged_bias(self, adapter_names: list[str] | None = None) -> torch.Tensor | None:
        """The bias with the trained differences of the adapters added, in float32; None if the layer has no bias."""
        base_bias = getattr(self._unmerged_base, "bias", None)
        if base_bias is None:
            return None
        bias = base_bias.to(torch.promote_types(base_bias.dtype, torch.float32), copy=True)
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.fura_blocks and self.fura_blocks[name].bias is not None:
                bias += self.fura_blocks[name].bias
        return bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The dense update `W' - W` of one adapter in float32, in the layout of the base layer's weight."""
        return self.merged_weight([adapter_name]) - self.merged_weight([])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA can approximate the update of the weight, not a trained bias."""
        return adapter_name not in self.fura_blocks or self.fura_blocks[adapter_name].bias is None

    # -- merging ----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replaces the base weight by the merged one; a reference to the old weight is kept for `unmerge`.

        Args:
            safe_merge: raise ValueError, and leave the base alone, if the merged weight is not finite.
            adapter_names: which adapters to merge, after those merged already; the active ones if None.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.fura_blocks]
        if not names:
            return
        all_names = self.merged_adapters + names
        weight, bias = self.merged_weight(all_names), self.merged_bias(all_names)
        if safe_merge and not torch.isfinite(weight).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        snapshot = self._snapshot or BaseSnapshot(self)
        base = self.get_base_layer()
        if self.quantization_backend is None:
            # a new parameter, not new data: a tied weight elsewhere keeps its values
            base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        else:
            with self._weight() as unmerged:
                dtype = unmerged.dtype
            self.set_base_weight(weight.to(dtype))
            base = self.get_base_layer()
        if bias is not None and any(self.fura_blocks[name].bias is not None for name in all_names):
            base.bias = nn.Parameter(bias.to(base.bias.dtype), requires_grad=False)
        self._snapshot = snapshot
        self.merged_adapters = all_names

    def unmerge(self) -> None:
        """Puts the unmerged base weight back, bit for bit."""
        if self._snapshot is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._snapshot.restore(self)
        self._snapshot = None
        self.merged_adapters = []

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The adapted layer.

        Args:
            x: (*, in).
            adapter_names: one adapter for each entry of the first dimension of `x`, "__base__" for none.

        Raises:
            ValueError: if `adapter_names` has the wrong length or adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # the base layer would do it; so M acts on what W sees
        y = self.base_layer(self._multiply(x, "input", adapter_names), *args, **kwargs)
        return self._multiply(y, "output", adapter_names)

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _multiply(self, x: torch.Tensor, side: str, adapter_names: list[str] | None) -> torch.Tensor:
        """Applies the blocks of one side, and the trained biases after the output side."""
        if adapter_names is None:
            return self._multiply_rows(x, side, self.active_adapters)
        for name in sorted(set(adapter_names) & set(self.fura_blocks)):
            rows = torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            x = x.index_copy(0, rows, self._multiply_rows(x[rows], side, [name]))
        return x

    def _multiply_rows(self, x: torch.Tensor, side: str, names: list[str]) -> torch.Tensor:
        active = [self.fura_blocks[name] for name in names if name in self.fura_blocks]
        if side == "input":
            for blocks in reversed(active):  # W M_a M_b x: the adapter that is merged last acts first
                if blocks.side == "input":
                    x = block_transform(x, blocks())
            return x
        base_bias = self.bias
        for blocks in active:
            if blocks.side == "output":
                delta = blocks()
                x = block_transform(x, delta)
                if base_bias is not None:  # M multiplies W x only: take M's share of the bias out again
                    shift = delta @ base_bias.to(delta.dtype).view(blocks.num_blocks, blocks.block_size, 1)
                    x = x - shift.flatten().to(x.dtype)
        for blocks in active:
            if blocks.bias is not None:
                x = x + blocks.bias.to(x.dtype)
        return x

    def __repr__(self) -> str:
        return "fura." + super().__repr__()
