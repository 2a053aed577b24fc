"""`report.html` of a run: one file that needs nothing else, made from what lies in the run's directory.

    fura-rl report runs/demo

The page holds its data as JSON and draws it with the script of `report_page.html`. Whatever a model wrote is data:
it reaches the page escaped, is shown as text, and a content security policy admits no script but that one.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fura_rl.adapter.inspect import info
from fura_rl.errors import FuraError
from fura_rl.eval.journal import write_atomically
from fura_rl.rewards.messages import text_of

TEMPLATE = Path(__file__).with_suffix(".html")
RUN_FACTS = "run.json"
MAX_TEXT = 12_000_000  # bytes of completions in a page: a browser stays quick; the files hold all of them
LIVE_TEXT = 500_000  # while the run goes on: the trainer's memory must not grow with the run
SCORES = ("accuracy", "low", "high", "truncated", "no_answer", "mean_tokens")


@dataclass
class Run:
    """What a run's directory says so far.

    Attributes:
        path: The directory.
        facts: `run.json`: options, versions, devices, steps to make; empty for a run without one.
        steps: Log entries of training steps, one for each step, in order.
        evaluations: `{"step": ..., "scores": {benchmark: {"accuracy": ..., ...}}}`, in order.
        layers: Lines of `layers.jsonl`.
        summary: `summary.json`, or None while the run goes on.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None


def read_run(path: str | Path) -> Run:
    """Read a run's directory, at any time: a line that is being written is left out.

    Raises:
        FuraError: There is no run in it.
    """
    folder = Path(path)
    if not (folder / "metrics.jsonl").is_file():
        raise FuraError(
            f"{folder} has no metrics.jsonl: it is not the output_dir of a training run. "
            "Start one with: fura-rl train --config demo.yaml"
        )
    run = Run(folder)
    if (folder / RUN_FACTS).is_file():
        run.facts = json.loads((folder / RUN_FACTS).read_text(encoding="utf-8"))
    elif (folder / "config.yaml").is_file():
        run.facts = {"config": yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))}
    started = run.facts.get("started", 0.0)
    steps: dict[int, dict[str, Any]] = {}
    scores: dict[int, dict[str, Any]] = {}
    for row in read_lines(folder / "metrics.jsonl"):
        if "reward" in row:
            steps[row["step"]] = row
        if found := _scores(row):
            scores[row["step"]] = found
    run.steps = [steps[step] for step in sorted(steps)]
    run.evaluations = [{"step": step, "scores": scores[step]} for step in sorted(scores)]
    run.layers = list({line["step"]: line for line in read_lines(folder / "layers.jsonl")}.values())
    summary = folder / "summary.json"
    if summary.is_file() and summary.stat().st_mtime >= started:  # an earlier run in this directory had one too
        run.summary = json.loads(summary.read_text(encoding="utf-8"))
    return run


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; none if there is no such file."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # U+2028 and others end no line
    return [json.loads(line) for line in lines if line.strip()]


def _scores(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """`eval_<benchmark>_<score>` of a log entry, by benchmark."""
    names = [match[1] for key in row if (match := re.fullmatch("eval_(.+)_accuracy", key))]
    return {name: {key: row[f"eval_{name}_{key}"] for key in SCORES} for name in names if f"eval_{name}_low" in row}


# --- completions ------------------------------------------------------------------------------------------------------


def save_answers(output: str | Path, step: int, benchmarks: list[Any], samples: dict[str, Any]) -> None:
    """Write the completions of an evaluation to `evaluations/step_NNNNNN.jsonl`, so that two steps can be compared.

    Args:
        output: The run's directory.
        step: The step after which the benchmarks were run.
        benchmarks: `fura_rl.eval.Benchmark`s.
        samples: `Evaluation.samples`: graded samples (N, K) by benchmark.
    """
    rows = [
        {
            "step": step, "benchmark": benchmark.name, "id": problem.id, "sample": number, "prompt": problem.problem,
            "completion": sample.completion.text, "answer": problem.answer, "extracted": sample.extracted,
            "correct": sample.correct, "reason": sample.reason, "tokens": sample.completion.tokens,
            "truncated": sample.completion.finish_reason == "length",
        }
        for benchmark in benchmarks
        for problem, drawn in zip(benchmark.problems, samples[benchmark.name], strict=True)
        for number, sample in enumerate(drawn)
    ]  # fmt: skip
    folder = Path(output) / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / f"step_{step:06d}.jsonl", lines)


def completions(folder: Path, limit: int = MAX_TEXT) -> tuple[dict[str, Any], str]:
    """Rollouts and benchmark completions for the page, each problem's text once, and a note on what is left out.

    Every second file is left out, the first and the newest of each kind excepted, until the rest fits the limit.
    """
    kinds = [sorted((folder / kind).glob("step_*.jsonl")) for kind in ("completions", "evaluations")]
    everything = sum(len(files) for files in kinds)
    while sum(path.stat().st_size for files in kinds for path in files) > limit and any(len(f) > 2 for f in kinds):
        largest = max(kinds, key=lambda files: sum(path.stat().st_size for path in files) if len(files) > 2 else 0)
        largest[:] = [*largest[:-1:2], largest[-1]]
    problems: dict[str, int] = {}
    records = []
    for path in (path for files in kinds for path in files):
        for number, row in enumerate(read_lines(path)):
            prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
            rewards = row.get("rewards") or {"correct": float(bool(row.get("correct")))}
            records.append(
                {
                    "source": row.get("benchmark", "rollouts"),
                    "step": row["step"],
                    "problem": problems.setdefault(prompt, len(problems)),
                    "sample": row.get("sample", number),
                    "text": text_of(row["completion"]),
                    "answer": row.get("answer"),
                    "extracted": row.get("extracted"),
                    "rewards": rewards,
                    "reward": sum(value for value in rewards.values() if value is not None),
                    "advantage": row.get("advantage"),
                    "truncated": row.get("truncated"),
                }
            )
    shown = sum(len(files) for files in kinds)
    note = f"{everything - shown} of {everything} files of completions are left out here." if shown < everything else ""
    return {"problems": list(problems), "records": records}, note


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(path: str | Path, limit: int = MAX_TEXT) -> Path:
    """Write `report.html` into a run's directory and return its path.

    Args:
        path: The run's directory.
        limit: About how many bytes of completions the page may hold.

    Raises:
        FuraError: There is no run in it.
    """
    run = read_run(path)
    shown, note = completions(run.path, limit)
    data = {
        "steps": run.steps,
        "evaluations": run.evaluations,
        "layers": run.layers,
        "spectra": _spectra(run),
        **shown,
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    script = page.split("<script>")[1].split("</script>")[0]
    values = {
        "hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": html.escape(f"Run: {run.path.resolve().name}"),
        "state": html.escape(_state(run)),
        "scores": _score_rows(run.evaluations),
        "facts": _facts(run),
        "note": html.escape(note),
        # "</script>" inside a completion must not end the data; NaN is no JSON.
        "data": json.dumps(_finite(data), ensure_ascii=False).replace("<", "\\u003c"),
    }
    # In one pass: a completion that holds "@@title@@" stays as it is.
    page = re.sub("@@(" + "|".join(values) + ")@@", lambda match: values[match[1]], page)
    write_atomically(run.path / "report.html", page)
    return run.path / "report.html"


def _spectra(run: Run) -> list[dict[str, Any]]:
    """Drift and rank of each layer, from the adapter that the finished run saved in full.

    It takes eigenvalues of every block, seconds to a minute for a model of billions, so `spectra.json` keeps them.
    """
    saved, kept = run.path / "adapter_model.safetensors", run.path / "spectra.json"
    if run.summary is None or not saved.is_file() or saved.stat().st_mtime < run.facts.get("started", 0.0):
        return []
    config = json.loads((run.path / "adapter_config.json").read_text(encoding="utf-8"))
    if config["peft_type"] != "FURA":
        return []
    if kept.is_file() and kept.stat().st_mtime >= saved.stat().st_mtime:
        return json.loads(kept.read_text(encoding="utf-8"))
    layers = [
        {
            "name": layer.name,
            "drift": layer.spectra.singular_value_drift,
            "norm": layer.spectra.relative_norm,
            "rank": layer.spectra.stable_rank / layer.spectra.max_rank,
        }
        for layer in info(run.path).layers
        if layer.spectra is not None
    ]
    write_atomically(kept, json.dumps(layers) + "\n")
    return layers


def _state(run: Run) -> str:
    done = run.steps[-1]["step"] if run.steps else 0
    total = run.facts.get("max_steps", done)
    if run.summary is None:
        return f"Written after step {done} of {total}; the run had not ended."
    ended = f"{'Finished' if done >= total else 'Ended early'} after step {done} of {total}."
    return f"{ended} {run.summary['error']}" if run.summary.get("error") else ended


def _score_rows(evaluations: list[dict[str, Any]]) -> str:
    """A row for each benchmark and a column for each evaluation: accuracy, interval, truncation."""
    if not evaluations:
        return "<p>No benchmarks were run.</p>"
    head = "".join(f"<th>step {e['step']}</th>" for e in evaluations)
    rows = []
    for name in dict.fromkeys(name for e in evaluations for name in e["scores"]):
        cells = []
        for s in (e["scores"].get(name) for e in evaluations):
            text = "" if s is None else f"{s['accuracy']:.3f}<br><small>{s['low']:.3f} to {s['high']:.3f}"
            cells.append(f"<td>{text}<br>cut off {s['truncated']:.1%}</small></td>" if s else "<td></td>")
        rows.append(f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>")
    return f"<table><tr><th>accuracy, 95% interval</th>{head}</tr>{''.join(rows)}</table>"


def _facts(run: Run) -> str:
    facts = {**(run.summary or {}), **run.facts}
    rows = {f"{name}": str(value) for name, value in facts.get("config", {}).items()}
    table = {
        "devices": ", ".join(facts.get("devices", [])),
        "processes": str(facts.get("processes", "")),
        "engine": str(facts.get("engine", "")),
        "trained parameters": f"{facts.get('trainable_parameters', 0):,}",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()),
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in facts.get("seconds", {}).items()),
    }
    everything = {name: str(value) for name, value in facts.get("all_options", {}).items()}
    return (
        _table({name: value for name, value in table.items() if value})
        + f"<h3>Options that differ from defaults</h3>{_table(rows)}"
        + f"<details><summary>All options of the trainer</summary>{_table(everything)}</details>"
    )


def _table(rows: dict[str, str]) -> str:
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>"


def _finite(value: Any) -> Any:
    """A copy in which numbers that JSON does not know are null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_command(run_dir: str) -> None:
    """Write a training run's report.html again: fura-rl report runs/demo."""
    print(f"Written: {write_report(run_dir)}")
