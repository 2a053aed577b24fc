"""What an engine that takes adapters per request has to know when it starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from fura_rl.adapter.basis import closest_block_size
from fura_rl.errors import FuraError
from fura_rl.rollout.payload import Adapter

SETTINGS_VARIABLE = "FURA_MULTI"
LARGEST_BLOCK = 512  # beyond, a merge costs less than the product


@dataclass
class MultiSettings:
    """Travels to vLLM's processes as JSON in an environment variable; without it, the defaults.

    Attributes:
        folders: Below which adapters may be loaded; None for anywhere, as vLLM does.
        with_fura: Whether FuRA adapters may be loaded; without, vLLM's LoRA is as it was.
        with_lora: Whether ordinary LoRA adapters may be loaded as well; without, their kernels are left out.
        block_sizes: Features of a layer's input -> the size of its blocks, where it is not that of the closest factors.
    """

    folders: list[str] | None = None
    with_fura: bool = True
    with_lora: bool = True
    block_sizes: dict[int, int] = field(default_factory=dict)

    def block_size(self, width: int) -> int:
        return self.block_sizes.get(width, closest_block_size(width))

    def to_environment(self) -> dict[str, str]:
        return {SETTINGS_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> MultiSettings:
        values = json.loads(os.environ.get(SETTINGS_VARIABLE, "{}"))
        sizes = {int(width): size for width, size in values.pop("block_sizes", {}).items()}
        return cls(block_sizes=sizes, **values)


def common_block_sizes(adapters: Iterable[Adapter]) -> dict[int, int]:
    """Features of a layer's input -> the size of blocks into which those of all adapters fit.

    Those of a later adapter that keeps to the default block size fit as well, unless that makes blocks too large.

    Raises:
        FuraError: they only fit into blocks that are too large to be of use.
    """
    sizes: dict[int, int] = {}
    for adapter in adapters:
        for tensors in adapter.modules.values():
            n, b, _ = tensors["core"].shape
            with_default = math.lcm(closest_block_size(n * b), b)
            sizes[n * b] = math.lcm(sizes.get(n * b, with_default if with_default <= LARGEST_BLOCK else b), b)
    for width, size in sizes.items():
        if size > LARGEST_BLOCK:
            raise FuraError(
                f"Layers of {width} features have blocks of {size} in these adapters: too large to be chosen per "
                "request. Merge such an adapter (fura-rl serve without --multi)."
            )
    return sizes
