"""vLLM's LoRA layers with a second kind of adapter: `W M` for each row's own `M`.

A layer keeps `D = M - I` of every slot in one tensor, made when the engine starts, because a captured CUDA graph reads
the same memory for ever. So the block size has to be known then: blocks of an adapter that are smaller and fit are
written into larger ones, which is exact.

Shapes: A slots, S parts of a fused layer, n blocks, b block size; under tensor parallelism those of one rank.
"""

from __future__ import annotations

from typing import Any

import torch

from fura_rl.adapter.errors import AdapterError
from fura_rl.adapter.fingerprint import is_other_weight, sample_entries
from fura_rl.adapter.gathered import gathered_linear, shard_blocks, widen_blocks
from fura_rl.errors import FuraError
from fura_rl.rollout import multi_names, vllm_names
from fura_rl.rollout.multi_rows import rows_of
from fura_rl.rollout.multi_settings import MultiSettings


class PerRequestLayer:
    """Mixed into vLLM's LoRA layers, in front of them.

    Attributes:
        fura_settings: Of the engine, as it was started.
        fura_slots: A.
        fura_delta: (A, S, n, b, b) in the engine's dtype, or None if this layer takes no FuRA adapters.
        fura_active: (A, S) int32: whether a slot's adapter changes a part.
        fura_refusal: Why it takes none.
        fura_rank: Which of `fura_ranks` shards of the input this rank has; 0 of 1 where each rank sees all of it.
        fura_dense: The weight (rows, K) where vLLM keeps it packed, from the first adapter on.
    """

    fura_settings: MultiSettings
    fura_slots: int
    fura_delta: torch.Tensor | None
    fura_active: torch.Tensor
    fura_dense: torch.Tensor | None
    fura_refusal: str
    fura_rank: int
    fura_ranks: int
    base_layer: Any
    device: torch.device
    input_size: int
    n_slices: int
    output_slices: tuple[int, ...]
    punica_wrapper: Any

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        # on a CPU vLLM's LoRA takes "none" for the last slot: one more, which stays zero
        more = 1 if self.device.type == "cpu" else 0
        super().create_lora_weights(max_loras + more, lora_config, model_config)  # type: ignore[misc]
        self.fura_settings, self.fura_slots = MultiSettings.from_environment(), max_loras
        self.fura_delta = self.fura_dense = None
        self.fura_rank, self.fura_ranks = multi_names.input_shard(self)
        b = self.fura_settings.block_size(self.input_size * self.fura_ranks)
        if not self.fura_settings.with_fura:
            self.fura_refusal = "it was started for LoRA alone"
        elif not vllm_names.is_plain_linear(self.base_layer):
            self.fura_refusal = "its weights are quantised"
        elif multi_names.traced_on_cpu(self):
            self.fura_refusal = "on a CPU it has to be started with enforce_eager (--enforce-eager)"
        elif self.input_size % b:
            self.fura_refusal = (
                f"its {self.input_size * self.fura_ranks} inputs are divided between {self.fura_ranks} ranks, and a "
                f"block of {b} would lie on two of them"
            )
        else:
            self.fura_refusal = ""
            shape = (max_loras, self.n_slices, self.input_size // b, b, b)
            dtype = vllm_names.attribute(self.base_layer, "params_dtype")
            self.fura_delta = torch.zeros(shape, dtype=dtype, device=self.device)
            self.fura_active = torch.zeros(max_loras, self.n_slices, dtype=torch.int32, device=self.device)

    def set_mapping(self, punica_wrapper: Any) -> None:
        super().set_mapping(punica_wrapper)  # type: ignore[misc]
        rows_of(punica_wrapper, self.fura_slots)

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)  # type: ignore[misc]
        if self.fura_delta is not None:
            self.fura_active[index] = 0

    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        parts = lora_a if isinstance(lora_a, list) else [lora_a]
        if not any(part is not None and part.ndim == 3 for part in parts):  # matrices: an ordinary LoRA
            super().set_lora(index, lora_a, lora_b)  # type: ignore[misc]
            return
        assert self.fura_delta is not None  # `own_blocks` came before
        self.reset_lora(index)
        if self.fura_dense is None and not self.base_layer.weight.numel():
            self.fura_dense = multi_names.dense_weight(self.base_layer)
        for number, delta in enumerate(parts):
            if delta is not None:
                self.fura_delta[index, number].copy_(delta, non_blocking=True)
                self.fura_active[index, number] = 1

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows = self.punica_wrapper.fura_rows
        weight = self.base_layer.weight if self.fura_dense is None else self.fura_dense
        if self.fura_delta is None or not weight.numel() or (self.fura_dense is not None and not rows.any_adapted):
            return super().apply(x, bias)  # type: ignore[misc]
        sizes = list(self.output_slices)
        own = self.fura_delta, self.fura_active
        y = gathered_linear(x, weight, bias, *own, rows.ids, rows.order, rows.starts, rows.counts, sizes)
        return self._apply_lora_to_output(x, y) if self.fura_settings.with_lora else y  # type: ignore[attr-defined]

    def own_blocks(self, name: str, number: int, delta: torch.Tensor, sample: torch.Tensor | None) -> torch.Tensor:
        """`D` (n, b, b) as this layer keeps it, of the checkpoint's layer `name`, which is part `number` of it.

        Args:
            delta: Of the whole layer, in blocks of any size.
            sample: 64 entries of the weight that the adapter was trained on, if it recorded them.

        Raises:
            FuraError: the adapter does not fit.
        """
        if self.fura_delta is None:
            raise FuraError(f"{name} takes no adapter per request in this engine: {self.fura_refusal}.")
        width, b = self.input_size * self.fura_ranks, self.fura_delta.shape[-1]
        covered = delta.shape[0] * delta.shape[1]
        if covered != width:
            raise FuraError(
                f"The adapter was made for another base model: its blocks of {name} cover {covered} features, this "
                f"model has {width}."
            )
        rows = multi_names.part_rows(self, number)
        if sample is not None and rows is not None:
            recorded, found = self._base_entries(number, sample, *rows)
            if is_other_weight(recorded, found):
                raise FuraError(
                    f"The adapter was made for another base model: the weight of {name} differs altogether."
                )
        try:
            delta = widen_blocks(delta, b)
        except AdapterError as error:
            raise FuraError(
                f"The adapter's block size of {name} was not known when the engine started: {error} Name the adapter "
                "at the start (--adapter), or merge it (without --multi)."
            ) from error
        return shard_blocks(delta, self.fura_rank, self.fura_ranks)

    def _base_entries(
        self, number: int, sample: torch.Tensor, all_rows: int, first_row: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the recorded entries of a whole weight, those that this rank holds: as recorded, and as they are here.

        Read by multiplying unit vectors, since the weight itself may be packed.
        """
        shape = all_rows, self.input_size * self.fura_ranks
        row = sample_entries(torch.arange(shape[0]).unsqueeze(1).expand(shape)).long() - first_row
        column = sample_entries(torch.arange(shape[1]).expand(shape)).long()
        column -= self.fura_rank * self.input_size
        own = (row >= 0) & (row < self.output_slices[number]) & (column >= 0) & (column < self.input_size)
        row, column = row[own] + sum(self.output_slices[:number]), column[own]
        dtype = vllm_names.attribute(self.base_layer, "params_dtype")
        unit = torch.zeros(len(column), self.input_size, dtype=dtype, device=self.device)
        unit[range(len(column)), column] = 1
        weights = vllm_names.attribute(self.base_layer, "quant_method").apply(self.base_layer, unit, None)
        return sample[own], weights[range(len(row)), row].float().cpu()
