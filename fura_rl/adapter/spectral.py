"""What training did to the spectra: norms, ranks, drift of singular values, and the pretrained column space.

Everything is computed block by block, since the blocks are what FuRA trains:

- `relative_norm`: `|W' - W| / |W|` (Frobenius).
- `stable_rank`: `|A|_F^2 / |A|_2^2` of the update `A` of a block, mean over the blocks that changed. Between 1 and
  `max_rank` (the block size); LoRA of rank r has at most r per layer, FuRA at most this per block.
- `singular_value_drift`: `|sigma(W'_j) - sigma(W_j)| / |sigma(W_j)|` over all blocks.
- `column_space_leak`: the share of the update's norm outside the column space of `W`. Zero by construction on the input
  side (`W' = W M`); on the output side zero only if `W` has full row rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .basis import block_gram, map_blocks
from .layer import FuraLayer


@dataclass(frozen=True)
class SpectralReport:
    """Diagnostics of one adapter on one layer; see the module's text for the definitions."""

    relative_norm: float
    stable_rank: float
    max_rank: int
    singular_value_drift: float
    column_space_leak: float | None = None


@torch.no_grad()
def block_spectra(gram: torch.Tensor, delta: torch.Tensor) -> SpectralReport:
    """Diagnostics of `W' = W blockdiag(I + D)`, for which the Gram matrices of the blocks of `W` are enough.

    Args:
        gram: `W_j^T W_j` (n, b, b) in float64; of the transposed weight for the output side.
        delta: D (n, b, b); transposed for the output side.
    """
    delta = delta.to(gram)
    merged = delta + torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    singular_nb = _singular_values(gram)
    update_nb = _singular_values(delta.mT @ gram @ delta)
    drift_nb = _singular_values(merged.mT @ gram @ merged) - singular_nb
    norms_n = update_nb.norm(dim=1)
    changed = norms_n > 0
    ranks = (norms_n[changed] / update_nb[changed].amax(dim=1)) ** 2
    scale = singular_nb.norm().clamp_min(torch.finfo(gram.dtype).tiny)
    return SpectralReport(
        relative_norm=float(update_nb.norm() / scale),
        stable_rank=float(ranks.mean()) if changed.any() else 0.0,
        max_rank=gram.shape[-1],
        singular_value_drift=float(drift_nb.norm() / scale),
    )


def _singular_values(gram_nbb: torch.Tensor) -> torch.Tensor:
    return torch.cat(map_blocks(torch.linalg.eigvalsh, gram_nbb)).to(gram_nbb.device).clamp_min(0).sqrt()


@torch.no_grad()
def column_space_leak(weight: torch.Tensor, update: torch.Tensor) -> float:
    """The share of the norm of `update` (out, in) that lies outside the column space of `weight` (out, in)."""
    left, singular, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    left = left[:, singular > 1e-6 * singular[0]]  # float32 leaves this much noise in null directions
    update = update.double()
    norm = update.norm()
    return float((update - left @ (left.mT @ update)).norm() / norm) if norm > 0 else 0.0


def spectral_report(
    model: nn.Module, adapter_name: str | None = None, *, leak: bool = False
) -> dict[str, SpectralReport]:
    """Diagnostics of each adapted layer of `model`, by its name.

    Args:
        adapter_name: the first active adapter of each layer if None.
        leak: also measure `column_space_leak` on the output side, which takes an SVD of each whole weight.
    """
    return dict(_layer_reports(model, adapter_name, leak))


def _layer_reports(model: nn.Module, adapter_name: str | None, leak: bool) -> Iterator[tuple[str, SpectralReport]]:
    for name, layer in model.named_modules():
        if not isinstance(layer, FuraLayer):
            continue
        wanted = adapter_name if adapter_name is not None else layer.active_adapters[0]
        for blocks in layer.named_blocks([wanted]):
            delta = blocks().detach()
            with layer.reading_weight() as weight:
                if blocks.side == "input":
                    report = block_spectra(block_gram(weight, blocks.block_size), delta)
                    outside: float | None = 0.0
                else:
                    report = block_spectra(block_gram(weight.T, blocks.block_size), delta.mT)
                    full = weight.to(delta.dtype)
                    outside = column_space_leak(full, blocks.multiply(full, delta) - full) if leak else None
            yield name, replace(report, column_space_leak=outside)


def summarise(reports: dict[str, SpectralReport]) -> dict[str, float]:
    """Means and extremes over layers, as flat metrics for a tracker."""
    if not reports:
        return {}
    norms = [report.relative_norm for report in reports.values()]
    metrics = {
        "fura/relative_norm": sum(norms) / len(norms),
        "fura/relative_norm_max": max(norms),
        "fura/stable_rank": sum(report.stable_rank for report in reports.values()) / len(reports),
        "fura/singular_value_drift": sum(report.singular_value_drift for report in reports.values()) / len(reports),
    }
    leaks = [report.column_space_leak for report in reports.values() if report.column_space_leak is not None]
    if leaks:
        metrics["fura/column_space_leak"] = max(leaks)
    return metrics


class SpectralCallback(TrainerCallback):
    """Adds the summary of `spectral_report` to every `every`-th log entry of a transformers or TRL trainer.

    Example:
        ```py
        >>> SpectralCallback(every=10).attach(trainer)
        ```
    """

    def __init__(self, every: int = 10, adapter_name: str | None = None) -> None:
        self.every = every
        self.adapter_name = adapter_name
        self._entries = 0

    def attach(self, trainer: Any) -> None:
        """Registers with `trainer` ahead of its trackers, which would otherwise send a log entry before it is full."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the entries of training steps, not of evaluations or the summary
            return
        self._entries += 1
        if (self._entries - 1) % self.every:
            return
        metrics = summarise(spectral_report(kwargs["model"], self.adapter_name))
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)
