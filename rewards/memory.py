"""How much memory this process has needed. Standard library only: grading workers import it by file path."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_mib() -> float:
    """Largest resident memory of this process since it was started, in MiB.

    On Linux not from `ru_maxrss`: across `fork` and `exec` that keeps the peak of the parent, and the parent of a
    grading worker is a trainer of many gigabytes.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
