"""Finished checkpoints of a training run that goes on."""

from __future__ import annotations

from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

STATE = "trainer_state.json"  # transformers writes it last, so the adapter beside it is whole


def newest_checkpoint(run: str | Path) -> Path | None:
    """The finished `checkpoint-N` with the highest N, or None if there is none yet."""
    best: tuple[int, Path] | None = None
    for folder in Path(run).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if not step.isdigit() or not all(
            (folder / name).is_file() for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, STATE)
        ):
            continue
        if best is None or int(step) > best[0]:
            best = int(step), folder
    return None if best is None else best[1]
