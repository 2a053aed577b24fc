"""Paired comparison of evaluations: differences problem by problem, with intervals and exact tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError

from . import statistics as stats
from .results import Results


@dataclass(frozen=True)
class Comparison:
    """B minus A on one benchmark.

    Args:
        a, b: Labels of the two evaluations.
        benchmark: Its name.
        problems: Problems that both have.
        accuracy_a, accuracy_b: Mean accuracy on these problems.
        difference, low, high: Mean of the per-problem differences, with its 95% interval (paired bootstrap).
        test: "McNemar" for one sample a problem, else "sign flip"; both exact.
        p_value: Two-sided.
        p_holm: Adjusted for all comparisons made together.
        gained, lost: Ids of problems that B answers better, and worse, than A.
    """

    a: str
    b: str
    benchmark: str
    problems: int
    accuracy_a: float
    accuracy_b: float
    difference: float
    low: float
    high: float
    test: str
    p_value: float
    p_holm: float
    gained: list[str]
    lost: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(results: Sequence[Results], force: bool = False, all_pairs: bool = False) -> list[Comparison]:
    """Compares evaluations on the benchmarks that they share.

    Args:
        results: Two or more; the first is the baseline.
        force: Compare although prompt, sampling or data differ.
        all_pairs: Every pair instead of each one with the first.

    Raises:
        FuraError: Fewer than two, nothing in common, or settings that differ.
    """
    if len(results) < 2:
        raise FuraError("A comparison needs at least two evaluations.")
    labels = _labels(results)
    pairs = list(combinations(range(len(results)), 2)) if all_pairs else [(0, i) for i in range(1, len(results))]
    raw = []
    for i, j in pairs:
        shared = [name for name in results[i].data["benchmarks"] if name in results[j].data["benchmarks"]]
        if not shared:
            raise FuraError(f"{labels[i]} and {labels[j]} have no benchmark in common.")
        for name in shared:
            if not force:
                _check_same_settings(results[i], results[j], labels[i], labels[j], name)
            raw.append((labels[i], labels[j], name, _counts(results[i], name), _counts(results[j], name)))
    tested = [_tested(*one) for one in raw]
    adjusted = stats.holm([one["p_value"] for one in tested])
    return [Comparison(**one, p_holm=p) for one, p in zip(tested, adjusted, strict=True)]


def _check_same_settings(a: Results, b: Results, label_a: str, label_b: str, name: str) -> None:
    """Refuses settings that change what a score means. The seed is not one of them."""
    x, y = a.data["benchmarks"][name], b.data["benchmarks"][name]
    differing = []
    if a.data["prompt"]["text"] != b.data["prompt"]["text"]:
        differing.append(f"prompt ({a.data['prompt']['name']} / {b.data['prompt']['name']})")
    for key in ("temperature", "top_p", "top_k", "max_tokens", "n"):
        if x["sampling"][key] != y["sampling"][key]:
            differing.append(f"{key} ({x['sampling'][key]} / {y['sampling'][key]})")
    if x["sha256"] != y["sha256"]:
        differing.append(f"problems (content {x['sha256'][:12]} / {y['sha256'][:12]})")
    if differing:
        raise FuraError(
            f"{label_a} and {label_b} differ on {name} in {', '.join(differing)}: their scores do not measure the "
            "same thing; use --force to compare them all the same."
        )


def _counts(results: Results, name: str) -> dict[str, tuple[int, int]]:
    """Correct samples and samples by problem id."""
    counts: dict[str, tuple[int, int]] = {}
    for line in results.samples:
        if line["benchmark"] == name:
            correct, samples = counts.get(line["id"], (0, 0))
            counts[line["id"]] = (correct + (line["correct"] is True), samples + 1)
    return counts


def _tested(
    a: str, b: str, name: str, counts_a: dict[str, tuple[int, int]], counts_b: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    ids = [i for i in counts_a if i in counts_b]
    if len(ids) < 2:
        raise FuraError(f"{a} and {b} have {len(ids)} problem(s) of {name} in common: too few to compare.")
    # Shares of correct samples, scaled to whole numbers so that the permutation test is exact.
    scale = math.lcm(*(counts[i][1] for counts in (counts_a, counts_b) for i in ids))
    scaled_a = [counts_a[i][0] * scale // counts_a[i][1] for i in ids]
    scaled_b = [counts_b[i][0] * scale // counts_b[i][1] for i in ids]
    differences = [y - x for x, y in zip(scaled_a, scaled_b, strict=True)]
    shares_a, shares_b = [x / scale for x in scaled_a], [y / scale for y in scaled_b]
    interval = stats.paired_bootstrap(shares_a, shares_b)
    gained = [i for i, d in zip(ids, differences, strict=True) if d > 0]
    lost = [i for i, d in zip(ids, differences, strict=True) if d < 0]
    return {
        "a": a,
        "b": b,
        "benchmark": name,
        "problems": len(ids),
        "accuracy_a": math.fsum(shares_a) / len(ids),
        "accuracy_b": math.fsum(shares_b) / len(ids),
        "difference": sum(differences) / scale / len(ids),
        "low": interval.low,
        "high": interval.high,
        "test": "McNemar" if scale == 1 else "sign flip",
        "p_value": stats.mcnemar(len(lost), len(gained)) if scale == 1 else stats.permutation(differences),
        "gained": gained,
        "lost": lost,
    }


def _labels(results: Sequence[Results]) -> list[str]:
    """Directory names, or whole paths where two names are equal."""
    names = [result.label for result in results]
    labels = names if len(set(names)) == len(names) else [str(result.directory) for result in results]
    if len(set(labels)) < len(labels):
        raise FuraError("The same evaluation is named twice.")
    return labels


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table, a line a comparison."""
    lines = [
        "| A | B | benchmark | problems | A | B | B - A | 95% interval | gained / lost | test | p | p (Holm) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for c in comparisons:
        lines.append(
            f"| {c.a} | {c.b} | {c.benchmark} | {c.problems} | {c.accuracy_a:.3f} | {c.accuracy_b:.3f} "
            f"| {c.difference:+.3f} | {c.low:+.3f} to {c.high:+.3f} | {len(c.gained)} / {len(c.lost)} "
            f"| {c.test} | {c.p_value:.3g} | {c.p_holm:.3g} |"
        )
    return "\n".join(lines)


def plot(comparisons: Sequence[Comparison], path: Path) -> None:
    """A forest plot of the differences with their intervals, as PNG or SVG by the path's suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.45 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    places = range(len(comparisons))
    for place, c in zip(places, comparisons, strict=True):
        colour = "tab:green" if c.low > 0 else "tab:red" if c.high < 0 else "tab:gray"
        axes.plot([c.low, c.high], [place, place], color=colour, linewidth=2)
        axes.plot(c.difference, place, "o", color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{c.benchmark}: {c.b} - {c.a}" for c in comparisons])
    axes.invert_yaxis()
    axes.set_xlabel("difference in accuracy, 95% interval (paired bootstrap over problems)")
    figure.savefig(path, dpi=150)
