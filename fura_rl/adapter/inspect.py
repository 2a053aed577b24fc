"""`fura-rl info PATH`: what a saved adapter holds, without its base model."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from rich.table import Table

from .blocks import FuraBlocks
from .config import FuraConfig
from .loading import Tensors
from .saving import read_adapter
from .spectral import SpectralReport, block_spectra


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a saved adapter. `spectra` needs the singular values, which only the full form holds."""

    name: str
    num_blocks: int
    block_size: int
    trained: int
    delta_norm: float | None
    spectra: SpectralReport | None


@dataclass(frozen=True)
class AdapterInfo:
    """A saved adapter: its configuration, size on disk in bytes, and layers."""

    path: Path
    config: FuraConfig
    file_bytes: int
    layers: list[LayerInfo]

    @property
    def trained(self) -> int:
        """How many numbers were trained in the adapted layers."""
        return sum(layer.trained for layer in self.layers)


def info(path: str | Path) -> AdapterInfo:
    """Reads a saved adapter.

    Raises:
        AdapterError: if there is none at `path`, or its file is truncated, pickled or holds broken values.
    """
    config, modules, _ = read_adapter(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    layers = [_layer_info(config, name, tensors) for name, tensors in modules.items()]
    return AdapterInfo(folder, config, (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size, layers)


def _layer_info(config: FuraConfig, name: str, tensors: Tensors) -> LayerInfo:
    num_blocks, block_size, _ = tensors["core"].shape
    delta = None if config.saved_form == "compact" else FuraBlocks.from_tensors(config, tensors)().detach()
    spectra = None
    if delta is not None and "sigma" in tensors and "basis" in tensors:
        spectra = block_spectra(_base_gram(config, tensors), delta if config.side == "input" else delta.mT)
        if config.side == "input":
            spectra = replace(spectra, column_space_leak=0.0)  # by construction
    return LayerInfo(
        name=name,
        num_blocks=num_blocks,
        block_size=block_size,
        trained=sum(tensors[key].numel() for key in ("core", "scale", "bias") if key in tensors),
        delta_norm=None if delta is None else float(delta.norm() / torch.tensor(num_blocks * block_size).sqrt()),
        spectra=spectra,
    )


def _base_gram(config: FuraConfig, tensors: Tensors) -> torch.Tensor:
    """Gram matrices (n, b, b) of the base weight's blocks, from their singular values and vectors."""
    basis = tensors["basis"].double()
    gram = (basis * tensors["sigma"].double().unsqueeze(-2) ** 2) @ basis.mT
    if "fold" in tensors:  # then the basis is that of W (I + F)
        fold = tensors["fold"].double()
        fold = fold if config.side == "input" else fold.mT
        unfold = torch.linalg.inv(fold + torch.eye(fold.shape[-1], dtype=fold.dtype))
        gram = unfold.mT @ gram @ unfold
    return gram


def info_command(path: str) -> None:
    """Show an adapter: configuration, file size, and for each layer its blocks and how far training has moved it.

    Norm is |W' - W| / |W| where the file holds the singular values, else |M - I| / |I|; rank is the mean stable rank of
    the blocks' updates; drift is how far their singular values moved; outside is the share of the update outside the
    base weight's column space, none on the input side.
    """
    adapter = info(path)
    config = adapter.config
    console = Console()
    console.print(
        f"[bold]{adapter.path}[/bold]: FuRA on {config.base_model_name_or_path or 'an unnamed base model'}, "
        f"form {config.saved_form}, {adapter.file_bytes / 2**20:.1f} MiB, {len(adapter.layers)} layers, "
        f"{adapter.trained:,} trained numbers"
    )
    console.print(
        f"side {config.side}, block_size {config.block_size}, singular_values {config.singular_values}, "
        f"basis {config.basis}, train_bias {config.train_bias}"
    )
    table = Table("layer", "blocks", "norm", "rank", "drift", "outside")
    for layer in adapter.layers:
        spectra = layer.spectra
        norm = spectra.relative_norm if spectra else layer.delta_norm
        table.add_row(
            layer.name,
            f"{layer.num_blocks} x {layer.block_size}",
            "-" if norm is None else f"{norm:.2e}",
            f"{spectra.stable_rank:.1f} of {spectra.max_rank}" if spectra else "-",
            f"{spectra.singular_value_drift:.2e}" if spectra else "-",
            "0" if spectra and spectra.column_space_leak == 0 else "-",
        )
    console.print(table)
