"""`samples.jsonl`: every completion, written as it finishes and reused after an interruption.

While a run goes on, finished completions are appended ungraded, a line each, so that a kill loses at most the line
being written. At the end the file is replaced by the same completions in the order of the benchmarks, with their
grades. A line is reused only under the same key: a hash of the model's identity, the prompt's token ids, the sampling
and the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError

from .grading import Completion
from .sampling import Request

SAMPLES = "samples.jsonl"
OTHERS = "samples.other.jsonl"
# UTF-8 has no lone surrogates, but a server's text may; written as \\udXXX they are still valid JSON.
LONE_SURROGATES = "backslashreplace"


def sample_key(identity: str, request: Request) -> str:
    """What must be equal for a finished completion to stand for a request."""
    s = request.sampling
    parts = [identity, request.prompt_token_ids, s.temperature, s.top_p, s.top_k, s.max_tokens, request.seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class Journal:
    """The finished completions of a run's directory.

    Args:
        directory: Made if missing.
        keys: The keys of this run. Lines of other runs are moved to `samples.other.jsonl`, never dropped.

    Attributes:
        finished: Reusable completions by key.
        damaged: Line numbers that could not be read; their completions are drawn again.
    """

    def __init__(self, directory: str | Path, keys: Iterable[str]) -> None:
        self.directory = Path(directory)
        self.path = self.directory / SAMPLES
        self.finished: dict[str, Completion] = {}
        self.damaged: list[int] = []
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._read(set(keys))
            # Unbuffered: a line is with the operating system when `append` returns, and a failed write leaves nothing
            # behind to fail again at close.
            self._file = self.path.open("ab", buffering=0)

    def _read(self, keys: set[str]) -> None:
        if not self.path.exists():
            return
        own: list[str] = []
        others: list[str] = []
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            entry = _parse(line)
            if entry is None:
                self.damaged.append(number)
                continue
            key, completion = entry
            (own if key in keys else others).append(line.decode())
            if key in keys:
                self.finished[key] = completion
        if self.damaged:
            warnings.warn(
                f"{self.path}: {len(self.damaged)} damaged line(s) ({_abbreviated(self.damaged)}); "
                "their completions are drawn again.",
                stacklevel=4,
            )
        if others:
            warnings.warn(
                f"{self.path}: {len(others)} completion(s) of another model, prompt or sampling moved to {OTHERS}.",
                stacklevel=4,
            )
            with (self.directory / OTHERS).open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in others)
        if self.damaged or others:
            write_atomically(self.path, "".join(line + "\n" for line in own))
        elif own and not self.path.read_bytes().endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one finished completion; it survives the process from here on."""
        with writing(self.directory):
            data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", LONE_SURROGATES)
            while data:
                data = data[self._file.write(data) :]

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the file by the graded completions, in order."""
        self._file.close()
        with writing(self.directory):
            write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def close(self) -> None:
        self._file.close()


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns a full disk or a read-only directory into one sentence that says what is safe."""
    try:
        yield
    except OSError as error:
        raise FuraError(
            f"Cannot write to {directory}: {error.strerror}. Completions that had finished are kept in "
            f"{directory / SAMPLES}; the same command goes on from there."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Writes beside, then renames: readers see the old file or the new one, and a full disk leaves the old one."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8", errors=LONE_SURROGATES, newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _parse(line: bytes) -> tuple[str, Completion] | None:
    """Key and completion of a line, or None if it is damaged."""
    try:
        row = json.loads(line)
        completion = Completion(row["completion"], row["tokens"], row["finish_reason"], row["seed"])
        key = row["key"]
    except (ValueError, KeyError, TypeError):  # torn, not UTF-8, not an object, or fields missing
        return None
    types = (str, int, str, int)
    values = (completion.text, completion.tokens, completion.finish_reason, completion.seed)
    whole = isinstance(key, str) and all(isinstance(value, kind) for value, kind in zip(values, types, strict=True))
    return (key, completion) if whole else None


def _abbreviated(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return shown + (", ..." if len(numbers) > 10 else "")
