"""What a sweep says about its methods: a row and curves of each, with what its seeds allow to be said.

The best of several settings is better on the seeds that it was chosen on than on others. So beside it stands the
accuracy with the setting that was best on the *other* seeds, for each seed in turn, and methods are compared on that.
Intervals are Student's over seeds; all seeds are scored on the same problems, so they say nothing about other problems.
The comparison by problem is the other way round: a bootstrap over the problems that both methods' runs answered, which
says nothing about other seeds.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from fura_rl.eval.statistics import exact, paired_bootstrap, t_interval
from fura_rl.trainer.report_page import read_lines, read_run

if TYPE_CHECKING:
    from fura_rl.trainer.sweep import SweepRun

Scores = dict[str, dict[int, float]]  # setting -> seed -> final accuracy
Answers = dict[tuple[str, str], list[bool]]  # (benchmark, problem) -> whether each sample was correct
NEAR = 0.02  # of accuracy: learning rates that lose no more than this count as good
RATE = "learning_rate"
COLUMNS = (
    "method", "trained", "best setting", "mean accuracy", "lowest .. highest seed", "chosen on other seeds",
    "median over settings", f"rates within {NEAR} of the best", "against the first",
    "the same, by problem",
)  # fmt: skip


def summarise(runs: Sequence[SweepRun]) -> list[dict[str, Any]]:
    """One row a method, the best first; methods without a finished run have none.

    `setting` is the best by mean final accuracy, of those with the most seeds; `seeds` has its accuracies, `interval`
    that of their mean; `chosen` the accuracy of each seed with the setting that was best on the others; `good_rates`
    the lowest and the highest of the learning rates around the best one that lose at most `NEAR`, and whether the last
    tried is among them; `spectra` means over layers and seeds of FuRA's diagnostics; and `against` compares `chosen`
    with that of the sweep's first method, or both at their best where one has a single seed, on seeds that both have:
    mean difference, its interval, and how often it is positive. `by_problem` compares the runs at both methods' best.
    """
    final: dict[str, Scores] = defaultdict(lambda: defaultdict(dict))
    done = []
    for run in runs:
        if curve := run.curve():
            final[run.method][run.setting][run.seed] = curve[-1][1]
            done.append(run)
    chosen = {method: chosen_on_others(settings) for method, settings in final.items()}
    reference = runs[0].method
    best = {method: best_setting(settings) for method, settings in final.items()}
    at_best = {method: [run for run in done if (run.method, run.setting) == (method, best[method])] for method in final}
    answers = {method: {run.seed: last_answers(run.folder) for run in its_runs} for method, its_runs in at_best.items()}
    rows = []
    for method, settings in final.items():
        means = {setting: fmean(seeds.values()) for setting, seeds in settings.items()}
        setting, its_runs = best[method], at_best[method]
        seeds = dict(sorted(settings[setting].items()))
        row: dict[str, Any] = {
            "method": method,
            "setting": setting,
            "trainable_parameters": (its_runs[0].summary or {}).get("trainable_parameters"),
            "accuracy": means[setting],
            "seeds": seeds,
            "interval": _interval(list(seeds.values())),
            "chosen": chosen[method],
            "chosen_interval": _interval(list(chosen[method].values())),
            "median_over_settings": median(means.values()),
            "settings": means,
            "good_rates": good_rates([run for run in runs if run.method == method], most_seeds(settings)),
            "spectra": mean_spectra([run.folder for run in its_runs]),
        }
        if method != reference and reference in final:
            # like with like: both as other seeds chose, or, where one has a single seed, both at their best
            if chosen[method] and chosen[reference]:
                row["against"] = compare(chosen[method], chosen[reference], reference)
            else:
                row["against"] = compare(seeds, final[reference][best[reference]], reference)
            row["by_problem"] = compare_by_problem(answers[method], answers[reference])
        rows.append(row)
    return sorted(rows, key=lambda row: -row["accuracy"])


def chosen_on_others(settings: Scores) -> dict[int, float]:
    """Seed -> its accuracy with the setting whose mean over the other seeds is highest; empty for a single seed."""
    seeds = sorted({seed for by_seed in settings.values() for seed in by_seed})
    result = {}
    for seed in seeds:
        others = {
            setting: fmean(value for other, value in by_seed.items() if other != seed)
            for setting, by_seed in settings.items()
            if seed in by_seed and len(by_seed) > 1
        }
        if others:
            result[seed] = settings[max(others, key=others.__getitem__)][seed]
    return result


def most_seeds(settings: Scores) -> dict[str, float]:
    """Setting -> mean, of the settings with the most seeds: others' means are not of the same seeds."""
    most = max(map(len, settings.values()))
    return {setting: fmean(seeds.values()) for setting, seeds in settings.items() if len(seeds) == most}


def best_setting(settings: Scores) -> str:
    """The best by mean, of those with the most seeds."""
    means = most_seeds(settings)
    return max(means, key=means.__getitem__)


def compare(ours: dict[int, float], theirs: dict[int, float], reference: str) -> dict[str, Any] | None:
    """Ours minus theirs on the seeds that both have; None without any."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    wins = sum(difference > 0 for difference in differences)
    return {
        "method": reference,
        "difference": fmean(differences),
        "interval": _interval(differences),
        "wins": [wins, len(differences), *exact(wins, len(differences))],
    }


def compare_by_problem(ours: dict[int, Answers], theirs: dict[int, Answers]) -> dict[str, Any] | None:
    """Accuracy of a problem in our runs minus that in theirs, over seeds that both have: mean over problems, and its
    interval; None where no seed's last evaluations have a problem in common."""
    our_shares: dict[tuple[str, str], list[float]] = defaultdict(list)  # one number for each seed
    their_shares: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in sorted(ours.keys() & theirs.keys()):
        mine, its = ours[seed], theirs[seed]
        for problem in sorted(mine.keys() & its.keys()):
            our_shares[problem].append(fmean(mine[problem]))
            their_shares[problem].append(fmean(its[problem]))
    if not our_shares:
        return None
    a, b = ([fmean(values) for values in shares.values()] for shares in (our_shares, their_shares))
    return {"difference": fmean(a) - fmean(b), "interval": list(paired_bootstrap(b, a)), "problems": len(a)}


def last_answers(folder: Path) -> Answers:
    """Of a run's last evaluation."""
    answers: Answers = defaultdict(list)
    for path in sorted((folder / "evaluations").glob("step_*.jsonl"))[-1:]:
        for row in read_lines(path):
            answers[row["benchmark"], row["id"]].append(row["correct"] is True)
    return answers


def good_rates(runs: Sequence[SweepRun], means: dict[str, float]) -> dict[str, Any] | None:
    """The learning rates next to a method's best that lose at most `NEAR`; None where the sweep varies others too."""
    rates = {run.setting: float(run.options.get(RATE, 0.0)) for run in runs}
    tried = sorted((rates[setting], mean) for setting, mean in means.items())
    if any(setting.split("=")[0] != RATE or "," in setting for setting in means) or len(tried) < 2:
        return None
    best = max(range(len(tried)), key=lambda index: tried[index][1])
    low = high = best
    while low > 0 and tried[low - 1][1] >= tried[best][1] - NEAR:
        low -= 1
    while high + 1 < len(tried) and tried[high + 1][1] >= tried[best][1] - NEAR:
        high += 1
    return {"low": tried[low][0], "high": tried[high][0], "to_the_edge": low == 0 or high == len(tried) - 1}


def mean_spectra(folders: Sequence[Path]) -> dict[str, float] | None:
    """`drift`, `norm` and `rank` of the reports' `spectra.json`, over all layers and runs; None for other methods."""
    files = [folder / "spectra.json" for folder in folders]
    layers = [layer for file in files if file.is_file() for layer in json.loads(file.read_text(encoding="utf-8"))]
    return {key: fmean(layer[key] for layer in layers) for key in ("drift", "norm", "rank")} if layers else None


def _interval(values: list[float]) -> list[float] | None:
    return list(t_interval(values)) if len(values) > 1 else None


# --- the table --------------------------------------------------------------------------------------------------------


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `summarise` as Markdown, intervals of 95% in brackets, and the spectra of those that have them."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for row in rows:
        seeds, against, rates, trained = (
            row["seeds"].values(), row.get("against"), row["good_rates"], row["trainable_parameters"],
        )  # fmt: skip
        cells = [
            row["method"],
            f"{trained:,}" if trained else "-",
            row["setting"] or "-",
            _with_interval(row["accuracy"], row["interval"]),
            f"{min(seeds):.3f} .. {max(seeds):.3f}",
            _with_interval(fmean(row["chosen"].values()), row["chosen_interval"]) if row["chosen"] else "-",
            f"{row['median_over_settings']:.3f}",
            "-" if rates is None else f"{rates['low']:g} .. {rates['high']:g}{' (edge)' * rates['to_the_edge']}",
            "-",
            "-",
        ]
        if against:
            wins, of, low, high = against["wins"]
            difference = _with_interval(against["difference"], against["interval"], sign="+")
            cells[-2] = f"{difference}, better on {wins} of {of} [{low:.2f}, {high:.2f}]"
        if by_problem := row.get("by_problem"):
            difference = _with_interval(by_problem["difference"], by_problem["interval"], sign="+")
            cells[-1] = f"{difference}, {by_problem['problems']:,} problems"
        lines.append(_line(cells))
    with_spectra = [row for row in rows if row["spectra"]]
    if with_spectra:
        lines += ["", _line(["method", "size of the update", "its stable rank / block", "drift of singular values"])]
        lines += [_line(["---"] * 4)]
        lines += [_line([row["method"], *(f"{row['spectra'][key]:.4f}" for key in ("norm", "rank", "drift"))])
                  for row in with_spectra]  # fmt: skip
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _with_interval(value: float, interval: Sequence[float] | None, sign: str = "") -> str:
    brackets = f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]" if interval else ""
    return f"{value:{sign}.3f}{brackets}"


# --- the plots --------------------------------------------------------------------------------------------------------


def plot_sweep(runs: Sequence[SweepRun], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy and reward over steps, trained tokens and seconds, at each method's best setting, every seed;
    and final accuracy over learning rates."""
    from matplotlib.figure import Figure

    done = {run.folder: run.curve() for run in runs}
    best = {(row["method"], row["setting"]): f"C{index % 10}" for index, row in enumerate(rows)}
    figure = Figure(figsize=(18, 8), layout="constrained")
    axes = figure.subplots(2, 4)
    labels = set()
    for run in runs:
        colour = best.get((run.method, run.setting))
        if colour is None or not done[run.folder]:
            continue
        progress = _progress(run)
        label = None if run.method in labels else run.method
        labels.add(run.method)
        rewards = [(step, reward) for step, (_, _, reward) in progress.items() if reward is not None]
        for column, place in enumerate(_PLACES):
            for line, curve in enumerate((done[run.folder], rewards)):
                points = [(place(step, progress), value) for step, value in curve if step in progress]
                axes[line][column].plot(*zip(*points, strict=True), color=colour, alpha=0.7, label=label)
    for index, row in enumerate(rows):
        over_rates: dict[float, list[float]] = defaultdict(list)
        for run in runs:
            if run.method == row["method"] and done[run.folder]:
                over_rates[float(run.options.get(RATE, 1e-6))].append(done[run.folder][-1][1])
        rates = sorted(over_rates)
        axes[0][3].plot(rates, [fmean(over_rates[rate]) for rate in rates], "o-", color=f"C{index % 10}")
    for column, name in enumerate(("step", "tokens", "seconds")):
        axes[0][column].set(xlabel=name, ylabel="held-out accuracy", title="best setting, each seed")
        axes[1][column].set(xlabel=name, ylabel="reward")
    axes[0][3].set(xlabel="learning rate", xscale="log", title="final accuracy, mean over seeds")
    axes[1][3].axis("off")
    axes[1][3].legend(*axes[0][0].get_legend_handles_labels(), loc="center")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


Progress = dict[int, tuple[float, float, float | None]]  # step -> tokens, seconds, reward
_PLACES: tuple[Callable[[int, Progress], float], ...] = (
    lambda step, progress: step,
    lambda step, progress: progress[step][0],
    lambda step, progress: progress[step][1],
)


def _progress(run: SweepRun) -> Progress:
    """Tokens and seconds up to each step, evaluations left out of the seconds; a run without a log has none."""
    if not (run.folder / "metrics.jsonl").is_file():
        return {}
    progress: Progress = {0: (0.0, 0.0, None)}
    seconds = 0.0
    for row in read_run(run.folder).steps:
        seconds += row.get("step_time", 0.0)
        progress[row["step"]] = (row.get("num_tokens", 0.0), seconds, row["reward"])
    return progress
