"""Which adapter each row of a batch has, kept where the layers' kernels read it."""

from __future__ import annotations

from typing import Any

import torch

from fura_rl.adapter.gathered import sort_rows
from fura_rl.rollout import multi_names


class AdapterRows:
    """The slots of a batch's rows that have a FuRA adapter.

    An adapter that was not loaded as one kind or the other is one of those that vLLM makes up to warm up and to capture
    CUDA graphs: it counts as both, so that the graphs hold the work of either kind.

    Attributes:
        ids: (most rows of a batch) int32 on the device: a row's slot, or -1, beyond the batch too.
        order: As many: the batch's rows, sorted by slot; beyond the batch each row stands for itself.
        starts: (A + 1) where in `order` each slot's rows begin, and where the last ones end. The memory of these three
            never moves.
        counts: Two ints in CPU memory: how many rows of this batch have a slot, and how many it has.
        fura: The engine's numbers of the adapters that are FuRA.
        lora: Those that are LoRA.
    """

    def __init__(self, max_rows: int, slots: int, device: torch.device) -> None:
        self.ids = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.order = torch.arange(max_rows, dtype=torch.int32, device=device)
        self.starts = torch.zeros(slots + 1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64)
        self.fura: set[int] = set()
        self.lora: set[int] = set()

    def add(self, adapter: int, *, fura: bool) -> None:
        """Records of which kind an adapter is that was just loaded."""
        (self.fura if fura else self.lora).add(adapter)
        (self.lora if fura else self.fura).discard(adapter)

    @property
    def any_adapted(self) -> bool:
        return bool(self.counts[0])

    def set(self, adapters: tuple[int, ...], slot_adapters: list[int | None]) -> None:
        """The next batch: each row's adapter, 0 for none, and the adapter in each slot."""
        slots = {adapter: slot for slot, adapter in enumerate(slot_adapters) if adapter not in self.lora}
        slots[None], slots[0] = -1, -1
        rows = torch.tensor([slots.get(adapter, -1) for adapter in adapters], dtype=torch.int32)
        order, starts = sort_rows(rows, len(self.starts) - 1)
        changed = max(len(rows), int(self.counts[1]))  # what the last batch had, and this one has not, is taken back
        ids = torch.nn.functional.pad(rows, (0, changed - len(rows)), value=-1)
        order = torch.cat([order, torch.arange(len(rows), changed, dtype=torch.int32)])
        for own, new in zip((self.ids, self.order, self.starts), (ids, order, starts), strict=True):
            own[: len(new)].copy_(new.pin_memory() if own.is_cuda else new, non_blocking=True)
        self.counts.copy_(torch.tensor([int((rows >= 0).sum()), len(rows)]))


def rows_of(punica_wrapper: Any, slots: int) -> AdapterRows:
    """The rows that follow a LoRA wrapper's `update_metadata`, which says what each batch holds.

    On a device, LoRA's own kernels no longer see rows of FuRA adapters. On a CPU they do, and multiply by zero: there,
    "none" is read as the last slot.
    """
    if not hasattr(punica_wrapper, "fura_rows"):
        size, device = multi_names.row_capacity(punica_wrapper)
        rows = AdapterRows(size, slots, device)
        update = punica_wrapper.update_metadata

        def update_both(mapping: Any, slot_adapters: list[int | None], *args: Any, **kwargs: Any) -> None:
            rows.set(mapping.index_mapping, slot_adapters)
            if device.type != "cpu":
                mapping = multi_names.without_adapters(mapping, rows.fura)
            update(mapping, slot_adapters, *args, **kwargs)

        punica_wrapper.update_metadata = update_both
        punica_wrapper.fura_rows = rows
    return punica_wrapper.fura_rows
