"""From which folders a server may read adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from fura_rl.errors import FuraError

FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


@dataclass
class AllowedAdapters:
    """Named adapters, and folders below which any adapter may be loaded.

    Attributes:
        named: Name -> folder of an adapter.
        folders: Roots. Relative paths are looked up in them, in order.
    """

    named: dict[str, Path] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.named = {name: Path(path).resolve() for name, path in self.named.items()}
        self.folders = [Path(folder).resolve() for folder in self.folders]

    def find(self, adapter: str) -> Path:
        """The folder of an adapter given by name or path, without links.

        Raises:
            FuraError: it is outside of what was allowed at start, by itself, through `..` or through a link, or there
                is no adapter.
        """
        if adapter in self.named:
            return self._checked(self.named[adapter], self.named[adapter])
        path = Path(adapter)
        if ".." in path.parts:
            raise FuraError(f"{adapter} contains '..': give the adapter's path as it is.")
        for root in self.folders:
            candidate = root / path  # an absolute path stays as it is
            if candidate.resolve().is_relative_to(root) and candidate.is_dir():
                return self._checked(candidate.resolve(), root)
        raise FuraError(
            f"{adapter} is no adapter that this server may load: neither a name given with --adapter nor a folder "
            "below an --adapter-dir."
        )

    @staticmethod
    def _checked(folder: Path, root: Path) -> Path:
        for name in FILES:
            file = folder / name
            if not file.exists():
                raise FuraError(f"{folder} holds no {name}.")
            if not _inside(file, root):
                raise FuraError(f"{file} is a link out of {root}.")
        return folder

    def list(self) -> dict[str, str]:
        """Name -> folder of every adapter that may be loaded; those in folders go by their relative path."""
        found = {name: str(path) for name, path in self.named.items()}
        for root in self.folders:
            for config in sorted(root.rglob(CONFIG_NAME)):  # follows no links
                folder = config.parent
                if all((folder / name).exists() and _inside(folder / name, root) for name in FILES):
                    found.setdefault(str(folder.relative_to(root)), str(folder))
        return found


def _inside(file: Path, root: Path) -> bool:
    return file.resolve().is_relative_to(root)


def named_paths(values: list[str]) -> dict[str, str]:
    """NAME=PATH, ... of `--adapter` as a dict.

    Raises:
        FuraError: a value is none, or a name occurs twice.
    """
    named: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise FuraError(f"--adapter {value}: write NAME=PATH.")
        if name in named:
            raise FuraError(f"--adapter {value}: the name {name} is given twice.")
        named[name] = path
    return named
