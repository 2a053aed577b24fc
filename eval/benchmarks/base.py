"""Problems, benchmarks, and how a benchmark is read from the hub or from a JSONL file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem: `subject` and `level` are None where the benchmark has none."""

    id: str
    problem: str
    answer: str
    subject: str | None = None
    level: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """Problems in a fixed order.

    Args:
        name: As in tables and in `samples.jsonl`.
        problems: In the order of the source.
        sha256: Of every problem's text and answer, in order, after `limit`.
        source: Where it came from: a hub repository with revision, or a file.
    """

    name: str
    problems: tuple[Problem, ...]
    sha256: str
    source: str


@dataclass(frozen=True)
class Spec:
    """A named benchmark: where it lives and what must be in it.

    Args:
        name: The name users type.
        repo, config, split, revision: The hub data set; `revision` is a commit.
        rows: Number of problems.
        files: File names looked for in a local data directory, first match wins.
        to_row: Turns a row of the hub and its position into one with `problem`, `answer` and, if known, `unique_id`,
            `subject`, `level`.
        hub_sha256, file_sha256: Content hash of the problems from the hub and from a local file. They differ where
            the two editions typeset some problems differently; None where no trusted copy was at hand, then the
            revision and the row count are the check.
    """

    name: str
    repo: str
    split: str
    revision: str
    rows: int
    config: str | None = None
    files: tuple[str, ...] = ()
    to_row: Callable[[Row, int], Row] = lambda row, index: row
    hub_sha256: str | None = None
    file_sha256: str | None = None

    def load(self, data_dir: str | Path | None = None) -> Benchmark:
        """From `data_dir` if it holds the benchmark, else from the hub.

        Raises:
            FuraError: It is in neither place, or its content is not what the name promises.
        """
        names = self.files or (f"{self.name}.jsonl",)
        if data_dir is not None:
            if not Path(data_dir).is_dir():
                raise FuraError(f"The data directory {data_dir} does not exist.")
            for path in (Path(data_dir) / name for name in names):
                if path.is_file():
                    return self._checked(read_jsonl(path, self.name), self.file_sha256, str(path))
        looked = f"not in {data_dir} (looked for {', '.join(names)}), and " if data_dir is not None else ""
        rows = (self.to_row(row, index) for index, row in enumerate(self._hub_rows(looked)))
        source = f"{self.repo}@{self.revision}"
        return self._checked(from_rows(rows, self.name, source), self.hub_sha256, source)

    def _hub_rows(self, looked: str) -> Iterable[Row]:
        # `datasets` takes a second to import and reaches for the network: only when the hub is really asked.
        import datasets
        import huggingface_hub.errors

        try:
            return datasets.load_dataset(self.repo, self.config, split=self.split, revision=self.revision)
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            # ConnectionError and FileNotFoundError are OSErrors; `datasets` raises ValueError for an unknown config.
            file = (self.files or (f"{self.name}.jsonl",))[0]
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise FuraError(
                f"Benchmark {self.name} is {looked}not to be had from the hub ({self.repo}): {first_line} "
                f"Without a network, put {file} into a directory and name that with --data-dir."
            ) from error

    def _checked(self, benchmark: Benchmark, sha256: str | None, source: str) -> Benchmark:
        if len(benchmark.problems) != self.rows:
            raise FuraError(f"{self.name} has {self.rows} problems, but {source} holds {len(benchmark.problems)}.")
        if sha256 is not None and benchmark.sha256 != sha256:
            raise FuraError(
                f"The problems in {source} are not those of {self.name} (content hash {benchmark.sha256[:12]}, "
                f"expected {sha256[:12]}); to run them as they are, pass the file's path as the benchmark."
            )
        return benchmark


def read_jsonl(path: Path, name: str) -> Benchmark:
    """A benchmark from a file with one JSON object a line, at least with `problem` and `answer`."""
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise FuraError(f"Line {number} of {path} is not valid JSON: {error.msg}.") from error
            if not isinstance(row, dict):
                raise FuraError(f"Line {number} of {path} is not a JSON object.")
            rows.append(row)
    return from_rows(rows, name, str(path))


def from_rows(rows: Iterable[Row], name: str, source: str) -> Benchmark:
    """A benchmark from rows with `problem` and `answer`; ids come from `unique_id` or `id`, else from the position.

    Raises:
        FuraError: No rows, a missing or empty problem or answer, or an id twice.
    """
    problems = [_problem(row, index, name, source) for index, row in enumerate(rows)]
    if not problems:
        raise FuraError(f"The benchmark {name} is empty: {source} holds no problem.")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise FuraError(f"The id {problem.id!r} occurs twice in {source}: ids must be unique.")
        seen.add(problem.id)
    return Benchmark(name, tuple(problems), content_hash(problems), source)


def _problem(row: Row, index: int, name: str, source: str) -> Problem:
    for column in ("problem", "answer"):
        if row.get(column) is None:
            columns = ", ".join(sorted(row)) or "none"
            raise FuraError(f"Row {index + 1} of {source} has no {column!r} (its columns: {columns}).")
        if not str(row[column]).strip():
            raise FuraError(f"Row {index + 1} of {source} has an empty {column!r}.")
    identifier = row.get("unique_id", row.get("id"))
    return Problem(
        id=f"{name}-{index}" if identifier is None else str(identifier),
        problem=str(row["problem"]),
        answer=str(row["answer"]),
        subject=_text(row.get("subject")),
        level=_text(row.get("level")),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def content_hash(problems: Iterable[Problem]) -> str:
    """SHA-256 over (problem, answer) in order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.problem, problem.answer], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def limited(benchmark: Benchmark, limit: int | None) -> Benchmark:
    """The first `limit` problems; the content hash follows."""
    if limit is None or limit >= len(benchmark.problems):
        return benchmark
    if limit < 1:
        raise FuraError(f"A limit of {limit} leaves no problem to evaluate.")
    problems = benchmark.problems[:limit]
    return replace(benchmark, problems=problems, sha256=content_hash(problems))
