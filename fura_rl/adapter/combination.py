"""The linear combination of adapters, as an adapter."""

from collections.abc import Sequence

import torch

from .errors import AdapterError
from .layer import FuraLayer


def check_combinable(layers: Sequence[FuraLayer], adapters: list[str]) -> None:
    """Raises AdapterError unless the adapters have the same blocks on every layer: only then is the weighted sum of
    their updates an update of the same form."""
    for layer in layers:
        parts = layer.named_blocks(adapters)
        if parts and (len(parts) < len(adapters) or len({part.geometry for part in parts}) > 1):
            raise AdapterError(
                f"the adapters {adapters} cannot be added: they differ on {layer.name}. Only updates of the same side, "
                "block size and basis have a sum of the same form."
            )


@torch.no_grad()
def combine(layer: FuraLayer, adapters: list[str], weights: list[float], adapter_name: str) -> None:
    """Sets the fresh adapter `adapter_name` of one layer to the weighted sum of others.

    `W D` is linear in `D`, so the sum of the updates has the sum of the `D`. It goes into the new adapter's `fold`, and
    the trained tensors start from zero in a basis of the resulting weight.
    """
    parts = layer.named_blocks(adapters)
    for blocks in layer.named_blocks([adapter_name]):
        blocks.fold = torch.stack([weight * part() for weight, part in zip(weights, parts, strict=True)]).sum(0)
        if blocks.bias is not None:
            biases = [weight * part.bias for weight, part in zip(weights, parts, strict=True) if part.bias is not None]
            blocks.bias.copy_(torch.stack(biases).sum(0))
        if blocks.sigma is not None:
            with layer.reading_weight() as base_weight:
                blocks.refresh(base_weight)
