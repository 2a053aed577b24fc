r"""The process that does the algebra: reads pairs of canonical answers, says whether math-verify calls them equal.

Run by file path (`python -P worker.py PARENT_PID MEMORY_MIB`), so that it imports math-verify and sympy but not
`fura_rl`, whose import brings torch: a worker costs about 60 MiB and half a second, and never touches CUDA.

Messages are JSON behind a length of four bytes (big-endian), in both directions. The first one out says the worker is
ready; then each request `{"gold", "answer", "float_rounding", "timeout"}` gets `{"equal": bool}` or `{"error": str}`.
With `"plain": true` math-verify is asked alone. A reply with `"retire": true` asks for a fresh process in its place,
since its memory has grown.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any

_HEADER = struct.Struct(">I")
# How often an idle worker looks whether its parent is still there.
_PARENT_CHECK_S = 2.0
# The parent kills a worker that overruns; should the parent be gone, the worker's own alarm ends it this much later.
_ALARM_GRACE_S = 5.0


def _limit_resources(memory_mib: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes its workers
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # fatal, and delivered even inside a long integer power
    if sys.platform == "linux":  # elsewhere the address space cannot be limited; time still is
        import resource

        limit = memory_mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _read(stream: int, size: int, parent: int) -> bytes:
    """Exactly `size` bytes; exits when the parent has closed the pipe or died (a forked sibling may keep it open)."""
    data = b""
    while len(data) < size:
        ready, _, _ = select.select([stream], [], [], _PARENT_CHECK_S)
        if not ready:
            if os.getppid() != parent:
                sys.exit(0)
            continue
        chunk = os.read(stream, size - len(data))
        if not chunk:
            sys.exit(0)
        data += chunk
    return data


def _write(stream: int, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    data = _HEADER.pack(len(body)) + body
    while data:
        data = data[os.write(stream, data) :]


def main() -> None:
    """Serve requests until the parent closes the pipe."""
    parent, memory_mib = int(sys.argv[1]), int(sys.argv[2])
    _limit_resources(memory_mib)
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)  # whatever a library prints must not land between two messages
    os.dup2(null, 1)

    # The sibling modules, under a package name of their own: importing fura_rl would import torch.
    package = types.ModuleType("_verifier")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules["_verifier"] = package
    algebra = importlib.import_module("_verifier.algebra")
    memory = importlib.import_module("_verifier.memory")

    for gold, answer in ((r"\frac{2 x}{4}", "0.5 x"), ("x^2-1", "(x+1)(x-1)"), (r"\sqrt{8}", r"2\sqrt{2}")):
        algebra.equal(gold, answer, 6)  # first use builds tables and imports: no deadline runs yet
    _write(replies, {"ready": os.getpid()})
    while True:
        (size,) = _HEADER.unpack(_read(requests, _HEADER.size, parent))
        request = json.loads(_read(requests, size, parent))
        signal.setitimer(signal.ITIMER_REAL, request["timeout"] + _ALARM_GRACE_S)
        try:
            judge = algebra.plain_equal if request.get("plain") else algebra.equal
            reply: dict[str, Any] = {"equal": judge(request["gold"], request["answer"], request["float_rounding"])}
        except Exception as error:
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        if sys.platform == "linux" and memory.peak_mib() > memory_mib / 2:  # the next request would run into the limit
            reply["retire"] = True
        _write(replies, reply)


if __name__ == "__main__":
    main()
