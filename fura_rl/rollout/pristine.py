"""The base weights of an engine, as its checkpoint has them: what every merge starts from, so that nothing drifts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from fura_rl.errors import FuraError

Keep = Literal["cpu", "device", "checkpoint"]


def check_keep(keep: str) -> Keep:
    """Raises FuraError unless `keep` is one of the places where base weights can be kept."""
    if keep not in get_args(Keep):
        raise FuraError(f"Base weights can be kept in {', '.join(get_args(Keep))}, not in {keep!r}.")
    return keep  # type: ignore[return-value]


class PristineWeights:
    """Base tensors by checkpoint name.

    Args:
        model: A folder, or the name of a model in the local Hugging Face cache.
        keep: Where tensors stay once they have been read: "cpu" memory (pinned beside a GPU), the engine's "device", or
            nowhere: "checkpoint" reads the file again each time. Only what an adapter has touched is ever kept.
        device: The engine's.

    Raises:
        FuraError: The checkpoint has no safetensors files.
    """

    def __init__(
        self, model: str, *, revision: str | None = None, keep: Keep = "cpu", device: torch.device | None = None
    ) -> None:
        self.keep = check_keep(keep)
        self.device = device or torch.device("cpu")
        self._kept: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        folder = Path(model)
        if not folder.is_dir():
            patterns = ["*.safetensors", "*.safetensors.index.json"]
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        self._files = _tensor_files(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        if name not in self._shapes:
            with safe_open(self._files[name], framework="pt") as file:  # opening costs more than reading the header
                names = file.keys()
                self._shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in names}
        return self._shapes[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor on the engine's device, in the checkpoint's dtype. Not to be written to."""
        if name not in self._kept:
            with safe_open(self._files[name], framework="pt") as file:
                tensor = file.get_tensor(name)
            if self.keep == "checkpoint":
                return tensor.to(self.device)
            if self.keep == "device":
                tensor = tensor.to(self.device)
            elif self.device.type == "cuda":
                tensor = tensor.pin_memory()
            self._kept[name] = tensor
        return self._kept[name].to(self.device, non_blocking=True)

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = folder / "model.safetensors"
    if not single.exists():
        raise FuraError(f"{folder} holds no model.safetensors: adapters are merged from the base's safetensors files.")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
