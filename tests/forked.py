"""Processes that begin with the slow imports done, forked from one server that has paid for them.

What a user would start as `python -m fura_rl.cli` or `python script.py` runs here as it does there, seconds earlier.
"""

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# One list for all: a test process has one such server, which imports what its first user asks for.
IMPORTS = ["fura_rl.train_grpo", "fura_rl.cli", "fura_rl.eval.commands", "deepspeed"]


def forking():
    """A context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    return context


def free_port() -> int:
    """A TCP port that nobody listens on.

    It lies below those that Linux gives to whoever asks for any, so that nobody has taken it when the process that it
    is meant for begins; and it is a random one, for several runs of the tests may share a machine.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def begin(environment: dict[str, str], out: Path, err: Path) -> None:
    """Makes a forked process one of its own: its environment, and files for stdout and stderr, which may be one."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for number, path in ((1, out), (2, err)):
        with open(path, "a", buffering=1) as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable()  # a crash leaves its stack there too


def _execute(words: list[str], environment: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    begin(environment, out, err)
    os.chdir(folder)
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.exit(importlib.import_module(words[1]).main())
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


class Forked:
    """`python WORDS...` in a process that has begun: a script, or `-m` and a module with a `main`."""

    def __init__(self, *words: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()
        self.out, self.err = Path(self.folder.name) / "out", Path(self.folder.name) / "err"
        given = dict(os.environ if environment is None else environment, HF_HUB_OFFLINE="1")
        arguments = (self.words, given, cwd or Path.cwd(), self.out, self.err)
        self.process = forking().Process(target=_execute, args=arguments)
        self.process.start()

    def wait(self, timeout_s: float = 500) -> subprocess.CompletedProcess:
        """To its end, as `subprocess.run` would return it."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"{self.words} goes on: {self.err.read_text()[-3000:]}"
        return subprocess.CompletedProcess(
            self.words, self.process.exitcode, self.out.read_text(), self.err.read_text(errors="replace")
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run(*words: object, **options) -> subprocess.CompletedProcess:
    """`python WORDS...` to its end."""
    process = Forked(*words, **options)
    try:
        return process.wait()
    finally:
        process.kill()
