"""`fura-rl merge`: base model and adapter as one dense checkpoint, which needs neither PEFT nor this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from fura_rl.errors import FuraError
from fura_rl.eval.models import GIB, load_tokenizer, merged_model


def merge(adapter: str | Path, out: str | Path, base: str | None = None, dtype: str = "auto") -> Path:
    """Write the checkpoint of `W M` for every adapted layer, with the tokenizer, and return its folder.

    Weights are merged in float32 and rounded once to the checkpoint's dtype; rounding to bf16 drops changes below half
    a spacing of `W`.

    Args:
        adapter: The adapter's folder.
        out: Where the checkpoint goes; must not exist or be empty. It appears in one piece.
        base: Name or path of the base model; the one that the adapter's configuration names if None.
        dtype: Of the written weights: auto (the base checkpoint's), float32, bfloat16 or float16.

    Raises:
        FuraError: There is no adapter or base model, they do not belong together, or `out` is taken or has no room.
    """
    adapter, out = Path(adapter), Path(out)
    if not (adapter / "adapter_config.json").is_file():
        raise FuraError(f"{adapter} is not an adapter: it has no adapter_config.json.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FuraError(f"{out} exists already: name a new folder with --out.")
    base = base or json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if base is None:
        raise FuraError(f"{adapter} does not name its base model: give it with --base.")
    model = merged_model(base, str(adapter), dtype)
    tokenizer = load_tokenizer(str(adapter) if (adapter / "tokenizer_config.json").is_file() else base)
    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = model.get_memory_footprint(), shutil.disk_usage(out.parent).free
    if free < needed * 1.05:
        raise FuraError(f"No space at {out}: {needed / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB free.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed merge left
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def merge_command(
    path: Annotated[Path, typer.Argument(help="The adapter's folder, such as a run's output_dir.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    base: Annotated[str | None, typer.Option(help="The base model, if not the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the base checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write base model and adapter as one dense checkpoint: fura-rl merge runs/mine --out runs/mine-merged."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise FuraError(f"--dtype {dtype!r} is unknown: choose one of auto, float32, bfloat16, float16.")
    print(f"Written: {merge(path, out, base, dtype)}. vLLM serves it: vllm serve {out}")
