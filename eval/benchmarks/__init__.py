"""Benchmarks by name, and any JSONL file with `problem` and `answer`."""

from __future__ import annotations

from pathlib import Path

from fura_rl.errors import FuraError

from .aime24 import AIME24
from .aime25 import AIME25
from .amc23 import AMC23
from .base import Benchmark, Problem, Spec, limited, read_jsonl
from .gsm8k import GSM8K
from .math500 import MATH500
from .minerva_math import MINERVA_MATH
from .olympiadbench import OLYMPIADBENCH

SPECS: dict[str, Spec] = {
    spec.name: spec for spec in (MATH500, AIME25, AIME24, AMC23, GSM8K, MINERVA_MATH, OLYMPIADBENCH)
}


def load_benchmark(name_or_path: str, data_dir: str | Path | None = None, limit: int | None = None) -> Benchmark:
    """A benchmark by name or from a file.

    Args:
        name_or_path: A name from `SPECS`, or a path to a JSONL file with `problem` and `answer` (and, if known,
            `unique_id` or `id`, `subject`, `level`).
        data_dir: Where named benchmarks are looked for (`<data_dir>/math500.jsonl`) before the hub is asked.
        limit: Take the first problems only; the content hash is then that of the part.

    Raises:
        FuraError: Unknown name, missing or malformed file, content that is not what the name promises.
    """
    if name_or_path in SPECS:
        return limited(SPECS[name_or_path].load(data_dir), limit)
    path = Path(name_or_path)
    if path.is_file():
        return limited(read_jsonl(path, path.stem), limit)
    raise FuraError(f"Unknown benchmark {name_or_path!r}: neither a file nor one of {', '.join(SPECS)}.")


__all__ = ["SPECS", "Benchmark", "Problem", "Spec", "load_benchmark"]
