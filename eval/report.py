"""`report.html`: one file that needs nothing else: scores, plots, and the completions with a filter."""

from __future__ import annotations

import html
import json
from io import StringIO
from pathlib import Path
from typing import Any

from .journal import write_atomically, writing
from .report_page import PAGE
from .results import TIMING, Results

# Longer reports make a browser slow; samples.jsonl has everything.
MAX_EMBEDDED = 20_000_000
HEAD, TAIL = 4_000, 2_000


def write_report(results: Results) -> Path:
    """Writes `report.html` beside `results.json` and returns its path."""
    path = results.directory / "report.html"
    timing = json.loads((results.directory / TIMING).read_text(encoding="utf-8"))
    shown, note = _embedded(results.samples)
    page = PAGE
    for name, value in {
        "title": html.escape(f"Evaluation: {results.label}"),
        "run": _run_table(results.data, timing),
        "scores": _score_table(results.data),
        "plot": _plot(results.data["scores"]),
        "parts": _parts_tables(results.data["scores"]),
        "note": html.escape(note),
        # "</script>" inside a completion must not end the script.
        "samples": json.dumps(shown, ensure_ascii=False).replace("<", "\\u003c"),
    }.items():
        page = page.replace(f"@@{name}@@", value)
    with writing(results.directory):
        write_atomically(path, page)
    return path


def _embedded(samples: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The samples as the page needs them; long completions lose their middle if all together are too large."""
    keep = ("benchmark", "id", "sample", "prompt", "completion", "answer", "extracted", "correct", "reason", "tokens")
    shown = [
        {**{name: line[name] for name in keep}, "truncated": line["finish_reason"] == "length"} for line in samples
    ]
    size = sum(len(line["completion"]) + len(line["prompt"]) for line in shown)
    if size <= MAX_EMBEDDED:
        return shown, ""
    cut = 0
    for line in shown:
        text = line["completion"]
        if len(text) > HEAD + TAIL:
            line["completion"] = f"{text[:HEAD]}\n[... {len(text) - HEAD - TAIL} characters ...]\n{text[-TAIL:]}"
            cut += 1
    return shown, f"The middle of {cut} long completions is left out here; samples.jsonl has them whole."


def _run_table(data: dict[str, Any], timing: dict[str, Any]) -> str:
    rows = {
        "model": data["model"]["model"] + (f" + {data['model']['adapter']}" if "adapter" in data["model"] else ""),
        "engine": ", ".join(f"{key} {value}" for key, value in data["engine"].items()),
        "prompt": f"{data['prompt']['name']}: {data['prompt']['text']}",
        "sampled": f"{timing['tokens']:,.0f} tokens in {timing['sample_seconds']:,.1f} s "
        f"({timing['tokens_per_second']:,.0f} tokens/s), {timing['reused']:.0f} completions reused",
        "versions": ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
        "command": " ".join(data["command"]),
    }
    return _table([], [[name, value] for name, value in rows.items()])


def _score_table(data: dict[str, Any]) -> str:
    head = ["benchmark", "metric", "score", "95% interval", "problems", "pass@k", "maj@k"]
    head += ["truncated", "no answer", "timeouts", "errors", "mean tokens", "sampling"]
    rows = []
    for name, s in data["scores"].items():
        k = str(s["k"])
        sampling = data["benchmarks"][name]["sampling"]
        rows.append(
            [
                name,
                "accuracy" if s["k"] == 1 else f"avg@{k}",
                f"{s['accuracy']:.3f}",
                f"{s['low']:.3f} to {s['high']:.3f}",
                str(s["problems"]),
                "" if s["k"] == 1 else f"{s['pass_at_k'][k]['value']:.3f} (k={k})",
                "" if s["k"] == 1 else f"{s['maj_at_k'][k]['value']:.3f} (k={k})",
                f"{s['truncated']:.1%}",
                f"{s['no_answer']:.1%}",
                str(s["timeouts"]),
                str(s["errors"]),
                f"{s['mean_tokens']:.0f}",
                ", ".join(f"{key}={value}" for key, value in sampling.items()),
            ]
        )
    return _table(head, rows)


def _parts_tables(scores: dict[str, Any]) -> str:
    parts = []
    for name, s in scores.items():
        for kind in ("by_subject", "by_level"):
            if len(s[kind]) > 1:
                rows = [
                    [part, f"{e['value']:.3f}", f"{e['low']:.3f} to {e['high']:.3f}", str(e["problems"])]
                    for part, e in s[kind].items()
                ]
                title = f"{html.escape(name)} {kind.replace('_', ' ')}"
                parts.append(f"<h3>{title}</h3>" + _table([kind[3:], "score", "95% interval", "problems"], rows))
    return "".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(row: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return f"<table>{cells(head, 'th') if head else ''}{''.join(cells(row, 'td') for row in rows)}</table>"


def _plot(scores: dict[str, Any]) -> str:
    """Scores with intervals, and pass@k and maj@k over k where several samples were drawn, as inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    sampled = {name: s for name, s in scores.items() if s["k"] > 1}
    figure = Figure(figsize=(5 * (1 + bool(sampled)), 1.2 + max(0.45 * len(scores), 2.0 * bool(sampled))))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, 1 + bool(sampled), squeeze=False)[0]
    for place, s in enumerate(scores.values()):
        axes[0].plot([s["low"], s["high"]], [place, place], color="tab:blue", linewidth=2)
        axes[0].plot(s["accuracy"], place, "o", color="tab:blue")
    axes[0].set_yticks(range(len(scores)), list(scores))
    axes[0].set_ylim(len(scores) - 0.5, -0.5)
    axes[0].set_xlim(0, 1)
    axes[0].set_xlabel("score, 95% interval")
    for number, (name, s) in enumerate(sampled.items()):
        for key, style in (("pass_at_k", "-"), ("maj_at_k", "--")):
            ks = [int(k) for k in s[key]]
            label = f"{name} {key.replace('_at_', '@')}"
            axes[1].plot(ks, [e["value"] for e in s[key].values()], style, color=f"C{number}", marker=".", label=label)
    if sampled:
        axes[1].set_xscale("log", base=2)
        axes[1].set_xlabel("k")
        axes[1].set_ylim(0, 1)
        axes[1].legend(fontsize="small")
    buffer = StringIO()
    with rc_context({"svg.hashsalt": "fura-rl"}):  # the same scores give the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
