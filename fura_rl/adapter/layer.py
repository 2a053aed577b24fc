"""`FuraLayer`: a frozen linear layer whose input (or output) is multiplied by trained diagonal blocks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import nn

from .base_weight import BaseSnapshot, adapter_device, is_transposed, reading_weight, whole
from .basis import fit_block_size, resolve_block_size
from .blocks import FuraBlocks
from .config import FuraConfig
from .fingerprint import sample_entries
from .multiplied_weight import Multiplied, multiplies_weights, multiply_weights
from .product_input import forget, remember
from .shared_input import SharedInput, only_blocks
from .split_bases import set_basis
from .transform import have_kernels

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
        block_rule: int | str | None = None,
        head_dim: int | None = None,
        name: str = "",
        **quantization_kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = int(in_features or 0), int(out_features or 0)
        self.fura_blocks = nn.ModuleDict({})
        self.block_size: dict[str, int] = {}
        self.merged_adapters: list[str] = []
        self._snapshot: BaseSnapshot | None = None  # of the unmerged base layer, while adapters are merged
        self.shared_input: SharedInput | None = None  # of layers that read the same tensor, if there are any
        self.is_gate_or_up = False  # of a gated MLP whose last projection is adapted too
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, block_rule=block_rule, head_dim=head_dim)

    # -- building ---------------------------------------------------------------------------------------------------

    def update_layer(
        self,
        adapter_name: str,
        config: FuraConfig,
        *,
        block_rule: int | str | None = None,
        head_dim: int | None = None,
    ) -> None:
        """Adds the adapter `adapter_name` to this layer, with a basis of the unmerged base weight.

        Args:
            block_rule: this layer's block size or rule; that of `config`, if it is one for all layers, if None.
            head_dim: the size of an attention head, if the adapted side of this layer consists of heads.

        Raises:
            AdapterError: if the block size does not divide the layer's width, or the weight cannot be read.
        """
        base = self.get_base_layer()
        width, other = self.in_features, self.out_features
        if config.side == "output":
            width, other = other, width
        if block_rule is None:
            block_rule = "closest" if isinstance(config.block_size, dict) else config.block_size
        wanted = resolve_block_size(block_rule, width, head_dim)
        block_size = fit_block_size(wanted, width, other)
        if block_size != wanted:
            shape = f"{self.out_features} x {self.in_features}"
            logger.info("%s: blocks of %d do not fit a %s weight; using %d.", self.name, wanted, shape, block_size)
        _, base_dtype = self._get_base_layer_device_and_dtype(base)
        blocks = FuraBlocks(
            width // block_size,
            block_size,
            side=config.side,
            singular_values=config.singular_values,
            basis=config.basis,
            bias_features=self.out_features if config.train_bias and getattr(base, "bias", None) is not None else None,
            device=adapter_device(base),
            dtype=torch.float64 if base_dtype == torch.float64 else torch.float32,
        )
        if not blocks.core.is_meta:
            self._init_basis(blocks)
            if not config.init_weights:
                nn.init.normal_(blocks.core, std=INIT_NOISE)
        self.fura_blocks[adapter_name] = blocks
        self.block_size[adapter_name] = block_size
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _init_basis(self, blocks: FuraBlocks) -> None:
        """Takes over the basis of an adapter of the same geometry if there is one: any basis of `W` will do, and TRL
        copies an adapter to a second one by its parameters alone, which then must mean the same."""
        blocks.base_sample = self.sample_base()
        for twin in self.named_blocks(self.fura_blocks):
            if twin.geometry == blocks.geometry and twin.fold is None and not twin.core.is_meta:
                return blocks.copy_basis(twin)
        if blocks.sigma is None:
            set_basis(blocks, None)
            return
        with self.reading_weight() as weight:
            floored = set_basis(blocks, weight)
        if floored:
            logger.info(
                "%s: %d of %d directions carry (almost) no weight; their singular values were raised to a floor.",
                self.name,
                floored,
                blocks.num_blocks * blocks.block_size,
            )

    def sample_base(self) -> torch.Tensor | None:
        """A few entries of the unmerged base weight; None if it is on the meta device or cannot be dequantised."""
        if isinstance(self.quantization_backend, ForwardOnlyQuantizationBackend):
            return None
        with self.reading_weight() as weight:
            return None if weight.is_meta else sample_entries(weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT calls this after loading. An adapter stays where it is if its base is on the meta device."""
        device = device or adapter_device(self.get_base_layer())
        for blocks in self.named_blocks([adapter_name]):
            if device is not None and device.type != "meta" and not blocks.core.is_meta:
                blocks.to(device)

    @torch.no_grad()
    def refresh_basis(self, adapter_name: str) -> None:
        """Restarts an adapter from zero in the basis of its merged weight; the layer computes the same as before."""
        with self.reading_weight() as weight:
            for blocks in self.named_blocks([adapter_name]):
                blocks.refresh(weight)

    # -- reading ----------------------------------------------------------------------------------------------------

    def named_blocks(self, names: Iterable[str] | None) -> list[FuraBlocks]:
        """The blocks of the named (None: active) adapters, in this order; names unknown to this layer are skipped."""
        names = self.active_adapters if names is None else names
        return [cast(FuraBlocks, self.fura_blocks[name]) for name in names if name in self.fura_blocks]

    def reading_weight(self) -> AbstractContextManager[torch.Tensor]:
        return reading_weight(self.get_base_layer(), self._snapshot, self.quantization_backend, self.name)

    @property
    def _unmerged_bias(self) -> torch.Tensor | None:
        return getattr(self.get_base_layer() if self._snapshot is None else self._snapshot.view, "bias", None)

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
        blocks = self.named_blocks(adapter_names)
        # an output-side multiplier mixes rows, so it needs all of them
        select_first = rows is not None and all(block.side == "input" for block in blocks)
        with self.reading_weight() as weight:
            if rows is not None and select_first:
                weight = weight[rows]
            merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=not blocks)
            for block in blocks:
                merged = block.multiply(merged, block())
        if rows is not None and not select_first:
            merged = merged[rows]
        return merged.T.contiguous() if is_transposed(self.get_base_layer()) else merged

    @torch.no_grad()
    def merged_bias(self, adapter_names: list[str] | None = None) -> torch.Tensor | None:
        """The bias with the trained differences of the adapters added, in float32; None if the layer has no bias."""
        base_bias = self._unmerged_bias
        if base_bias is None:
            return None
        bias = whole(base_bias).to(torch.promote_types(base_bias.dtype, torch.float32), copy=True)
        for block in self.named_blocks(adapter_names):
            if block.bias is not None:
                bias += whole(block.bias)
        return bias

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The dense update `W' - W` of one adapter in float32, in the layout of the base layer's weight."""
        return self.merged_weight([adapter_name]) - self.merged_weight([])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """LoRA can approximate the update of the weight, not a trained bias."""
        return all(block.bias is None for block in self.named_blocks([adapter_name]))

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
        base: Any = self.get_base_layer()
        if self.quantization_backend is None:
            # a new parameter, not new data: a weight tied to this one keeps its values
            base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
        else:
            with self.reading_weight() as unmerged:
                dtype = unmerged.dtype
            self.set_base_weight(weight.to(dtype))
            base = self.get_base_layer()
        if bias is not None and any(block.bias is not None for block in self.named_blocks(all_names)):
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
        rows_of = None if adapter_names is None else self._rows_of(adapter_names, x)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        source, device = x, x.device.type
        if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # the base layer would do it; so M acts on what W sees
        if rows_of is None:
            if torch.compiler.is_compiling():
                return self._adapted(x, source, *args, **kwargs)
            if self.is_gate_or_up:
                y = self._adapted(x, source, *args, **kwargs)
                if have_kernels(y):
                    remember(y)
                return y
            if self._forward_hooks:  # they are given the input too, and may ask for its gradient
                forget()
            try:
                return self._adapted(x, source, *args, **kwargs)
            finally:  # activation checkpointing ends a recomputation in the middle of a layer
                forget()
        for name, rows in rows_of.items():
            x = x.index_copy(0, rows, self._multiply_input(x[rows], [name]))
        y = self.base_layer(x, *args, **kwargs)
        for name, rows in rows_of.items():
            y = y.index_copy(0, rows, self._multiply_output(y[rows], [name]))
        return y

    def _adapted(self, x: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer with its active adapters; `source` is what it was called with, of which `x` may be a copy."""
        multiplied = self._multiply(x, source)
        y = multiplied.tensor if multiplied.is_output else self.base_layer(multiplied.tensor, *args, **kwargs)
        return self._multiply_output(y, None)

    def _rows_of(self, adapter_names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Which rows of `x` each adapter of this layer takes."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when adapters are merged, call `unmerge_adapter` first.")
        return {
            name: torch.tensor([i for i, wanted in enumerate(adapter_names) if wanted == name], device=x.device)
            for name in sorted(set(adapter_names) & set(self.fura_blocks))
        }

    def _multiply(self, x: torch.Tensor, source: torch.Tensor) -> Multiplied:
        """`M x` for the base layer, or what that returns with its weight multiplied by `M` instead."""
        if self.shared_input is not None and (shared := self.shared_input.multiply(self, x, source)) is not None:
            return shared
        blocks = only_blocks(self)
        if blocks is not None and multiplies_weights([self.base_layer], x, [blocks]):
            return multiply_weights([self.base_layer], x, [blocks])[0]
        return Multiplied(self._multiply_input(x, None))

    def _multiply_input(self, x: torch.Tensor, names: list[str] | None) -> torch.Tensor:
        for blocks in reversed(self.named_blocks(names)):  # W M_a M_b x: what is merged last acts first
            if blocks.side == "input":
                x = blocks(x)
        return x

    def _multiply_output(self, y: torch.Tensor, names: list[str] | None) -> torch.Tensor:
        """Applies output-side blocks to `y = W x + bias`, of which they multiply `W x` only, then trained biases."""
        all_blocks = self.named_blocks(names)
        bias = getattr(self.get_base_layer(), "bias", None)
        for blocks in all_blocks:
            if blocks.side == "output":
                y = blocks(y)
                if bias is not None:
                    delta = blocks()
                    surplus = delta @ bias.to(delta.dtype).view(blocks.num_blocks, blocks.block_size, 1)
                    y = y - surplus.flatten().to(y.dtype)
        for blocks in all_blocks:
            if blocks.bias is not None:
                y = y + blocks.bias.to(y.dtype)
        return y

    extra_repr = quantization_extra_repr

    def __repr__(self) -> str:
        return "fura." + super().__repr__()


class FuraLinear(FuraLayer):
    """The layer that `FuraModel` creates. "all-linear" finds adapted layers again by "Linear" in their class's name."""
