"""`results.json`: what was run and what came out, readable years later.

`results.json` depends on the completions and the settings alone: an interrupted and resumed run writes the same bytes
as an uninterrupted one. Seconds and tokens/s are in `timing.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError

from .evaluation import Evaluation
from .journal import SAMPLES, write_atomically, writing

SCHEMA = "fura-rl/eval"
SCHEMA_VERSION = 1
RESULTS = "results.json"
TIMING = "timing.json"


@dataclass(frozen=True)
class Results:
    """A finished evaluation, read back: the content of `results.json` and of `samples.jsonl`."""

    directory: Path
    data: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def label(self) -> str:
        """The directory's name, for tables."""
        return self.directory.resolve().name


def write_results(directory: Path, evaluation: Evaluation, run: Mapping[str, Any]) -> None:
    """Writes `results.json` and `timing.json`.

    Args:
        directory: Where `samples.jsonl` is already.
        evaluation: What `evaluate` returned.
        run: What was run on what: model, engine, versions, command.
    """
    data = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **run, **evaluation.to_dict(timing=False)}
    timing = {
        **evaluation.timing,
        "benchmarks": {
            name: {"seconds": s.seconds, "tokens_per_second": s.tokens_per_second}
            for name, s in evaluation.scores.items()
        },
    }
    with writing(directory):
        write_atomically(directory / TIMING, json.dumps(timing, indent=2) + "\n")
        write_atomically(directory / RESULTS, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_results(directory: str | Path) -> Results:
    """Reads a finished evaluation.

    Raises:
        FuraError: Nothing finished is there, a file is damaged, or it was written by a newer version.
    """
    directory = Path(directory)
    path = directory / RESULTS
    if not path.is_file():
        unfinished = (directory / SAMPLES).is_file()
        why = "its evaluation has not finished: run the same command again" if unfinished else f"it has no {RESULTS}"
        raise FuraError(f"{directory} holds no finished evaluation ({why}).")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        samples = [json.loads(line) for line in (directory / SAMPLES).read_bytes().splitlines()]
    except (ValueError, FileNotFoundError) as error:
        raise FuraError(f"The evaluation in {directory} is damaged: {error}.") from error
    if data.get("schema") != SCHEMA or data.get("schema_version", 0) > SCHEMA_VERSION:
        found = f"{data.get('schema')} version {data.get('schema_version')}"
        raise FuraError(f"{path} is {found}; this program reads {SCHEMA} up to version {SCHEMA_VERSION}.")
    return Results(directory, data, samples)
