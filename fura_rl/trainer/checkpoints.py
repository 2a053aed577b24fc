"""Checkpoints on disk: written in one piece, checked before they are read, and few.

A checkpoint is a folder `checkpoint-<step>` in the run's directory. It is written inside `.checkpoint-<step>.partial`,
gets a `manifest.json` with the size and SHA-256 of every file, is flushed to the disk and then renamed: under its name
a checkpoint is whole, whenever the process, the disk or the power gave up. The hashes find damage, not malice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fura_rl.errors import FuraError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"\.checkpoint-\d+\.partial")


class DamagedCheckpoint(FuraError):
    """A checkpoint that is not what its manifest says."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / f"checkpoint-{step}"


def partial_path(run: Path, step: int) -> Path:
    """The folder in which it is written."""
    return run / f".checkpoint-{step}.partial"


def step_of(checkpoint: Path) -> int:
    """The number of finished steps, from the folder's name."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise FuraError(f"{checkpoint} is not named like a checkpoint (checkpoint-<step>).")
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's directory, oldest step first, good or damaged."""
    if not run.is_dir():
        return []
    return sorted((path for path in run.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def remove_partial(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for path in run.iterdir() if run.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path)


def seal(partial: Path, final: Path, **facts: Any) -> None:
    """Give a written folder its manifest, flush it to the disk and put it in its place.

    Args:
        partial: The folder as it was written.
        final: Its name from now on; a folder of this name (a damaged one) is replaced.
        **facts: What else the manifest shall say, as JSON.
    """
    files = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": 1, **facts, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in sorted(partial.rglob("*"), reverse=True):  # files before the folders that hold them
        _flush(path)
    _flush(partial)
    if final.exists():
        replaced = partial.with_name(f".{final.name}.replaced.partial")
        final.rename(replaced)
        shutil.rmtree(replaced)
    partial.rename(final)
    _flush(final.parent)


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        DamagedCheckpoint: A file is missing, has another size or hash, or there is no readable manifest.
    """
    manifest = _read_manifest(checkpoint)
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"The checkpoint {checkpoint} lacks {name}.")
        if path.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(
                f"The checkpoint {checkpoint} is damaged: {name} has {path.stat().st_size} bytes instead of "
                f"{expected['bytes']}."
            )
        if _sha256(path) != expected["sha256"]:
            raise DamagedCheckpoint(f"The checkpoint {checkpoint} is damaged: {name} has changed since it was written.")
    return manifest


def newest_good(run: Path, before: int | None = None) -> Path | None:
    """The newest checkpoint that passes `verify`; each damaged one is skipped with a warning.

    Args:
        run: The run's directory.
        before: Only checkpoints of fewer steps count.
    """
    for checkpoint in reversed(list_checkpoints(run)):
        if before is not None and step_of(checkpoint) >= before:
            continue
        try:
            verify(checkpoint)
        except DamagedCheckpoint as error:
            logger.warning("%s It is skipped for the one before it.", error)
            continue
        return checkpoint
    return None


def find_checkpoint(wanted: str | bool, run: Path) -> Path | None:
    """What `resume_from_checkpoint` names: a path, or `latest` for the newest good checkpoint of the run.

    Returns:
        The checkpoint; None if `latest` was asked for and the run has none yet.

    Raises:
        FuraError: The path does not exist, or it is damaged, or all checkpoints of the run are.
    """
    if wanted is True or str(wanted).lower() in ("latest", "true"):
        found = newest_good(run)
        if found is None and list_checkpoints(run):
            raise FuraError(f"All checkpoints in {run} are damaged: start again with another output_dir.")
        return found
    path = Path(str(wanted))
    if not path.is_dir():
        raise FuraError(f"The checkpoint {path} does not exist: give a checkpoint's folder, or `latest`.")
    step_of(path)
    verify(path)
    return path


def best_checkpoint(run: Path, metric: str, greater_is_better: bool) -> Path | None:
    """The checkpoint with the best value of a metric; of equal ones the oldest."""
    scored: list[tuple[float, Path]] = []
    for checkpoint in list_checkpoints(run):
        try:
            value = _read_manifest(checkpoint).get("metrics", {}).get(metric)
        except DamagedCheckpoint:
            continue
        if value is not None:
            scored.append((value if greater_is_better else -value, checkpoint))
    return max(scored, key=lambda entry: entry[0])[1] if scored else None


def prune(run: Path, keep: int | None, best: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one; None keeps all."""
    if not keep or keep < 0:
        return
    for checkpoint in list_checkpoints(run)[:-keep]:
        if checkpoint != best:
            shutil.rmtree(checkpoint)


@contextmanager
def cleaned_up(partial: Path) -> Iterator[None]:
    """Removes a half-written checkpoint after an error, and says in one sentence that the disk is full, if it is.

    Raises:
        FuraError: The disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = out_of_space(error, partial.parent)
        shutil.rmtree(partial, ignore_errors=True)
        if not full:
            raise
        last = list_checkpoints(partial.parent)
        kept = f"{last[-1]} is whole" if last else "there is no earlier one"
        raise FuraError(
            f"The disk is full: the checkpoint at {partial.parent} could not be written ({kept}). Make room and go on "
            "with --resume_from_checkpoint latest."
        ) from error


def out_of_space(error: BaseException, folder: Path | None = None) -> bool:
    """Whether an error says that the disk is full (safetensors and `torch.save` have exceptions of their own)."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        return True
    # torch.save reports only that its writer failed
    return folder is not None and isinstance(error, RuntimeError) and shutil.disk_usage(folder).free < 2**20


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        assert all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DamagedCheckpoint(f"The checkpoint {checkpoint} has no readable {MANIFEST}.") from error
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
