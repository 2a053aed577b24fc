"""`samples.jsonl`: every completion, written as it finishes and reused after an interruption.

While a run goes on, finished completions are appended ungraded, a line each, by a thread that writes what there is at
once, so that sampling waits for no disk; a kill loses the lines on their way, usually none. At the end the file is
replaced by the same completions in the order of the benchmarks, with their grades. A line is reused only under the same
key: a hash of the model's identity, the prompt's token ids, the sampling and the seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
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
            # Unbuffered: a line is with the operating system once written, and a failed write leaves nothing behind to
            # fail again at close.
            self._file = self.path.open("ab", buffering=0)
        self._queue: SimpleQueue[Mapping[str, Any] | threading.Event | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._writer = threading.Thread(target=self._write_queue, name="journal", daemon=True)
        self._writer.start()

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
        """Hands one finished completion to the writing thread; `flush` says when it survives the process.

        Raises:
            FuraError: An earlier one could not be written.
        """
        self._check()
        self._queue.put(line)

    def flush(self) -> None:
        """Returns when everything appended is with the operating system; raises as `append` does."""
        written = threading.Event()
        self._queue.put(written)
        written.wait()
        self._check()

    def finish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Replaces the file by the graded completions, in order."""
        self.flush()
        self.close()
        with writing(self.directory):
            write_atomically(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def close(self) -> None:
        """Writes what is still waiting, as far as the disk takes it; a second call does nothing."""
        if not self._file.closed:
            self._queue.put(None)
            self._writer.join()
            self._file.close()

    def _check(self) -> None:
        if self._failure is not None:
            with writing(self.directory):
                raise self._failure

    def _write_queue(self) -> None:
        """The thread: lines in their order, until None."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            elif self._failure is None:  # after a failed write a torn line may be the last one
                try:
                    self._write(item)
                except Exception as error:  # raised where lines come from, which must not wait for a dead thread
                    self._failure = error

    def _write(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", LONE_SURROGATES)
        while data:
            data = data[self._file.write(data) :]


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
