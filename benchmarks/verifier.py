r"""Speed and bounds of the verifier, side by side with TRL's `accuracy_reward` and plain math-verify.

    python benchmarks/verifier.py [--seconds 60] [--workers 2]

Three batches, all generated here from a seed:

- `ordinary`: 256 completions of 500 tokens (2,000 characters), `long`: 1,024 of 4,000 tokens. Prose with formulas and a
  boxed answer; right answers in various spellings, wrong ones of the same kind as the reference. Half are wrong.
- `degenerate`: 256 completions as a collapsed policy writes them; none is right.

`MathVerifier` grades every batch with warm workers and an empty cache. The other two run in a process of their own that
is killed after `--seconds`; then the table says how many completions they got through. TRL and plain math-verify get
references wrapped in `$...$`, which they need. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fura_rl.rewards import MathVerifier

CHARS_PER_TOKEN = 4


@dataclass
class Batch:
    """Completions, reference answers, and whether each completion is right."""

    name: str
    completions: list[str]
    answers: list[str]
    labels: list[bool]


@dataclass
class Result:
    """One grader on one batch; `graded` falls short of the batch if the grader was stopped."""

    batch: str
    grader: str
    graded: int
    size: int
    seconds: float
    per_second: float
    accuracy: float
    peak_mib: float


def _fraction(rng: random.Random) -> tuple[str, list[str], str]:
    a, b = rng.randrange(1, 60, 2), rng.choice([2, 4, 8, 16])
    return rf"\frac{{{a}}}{{{b}}}", [f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}", str(a / b)], rf"\frac{{{a + 2}}}{{{b}}}"


def _integer(rng: random.Random) -> tuple[str, list[str], str]:
    n = rng.randrange(-50, 5000)
    return str(n), [str(n), f"x = {n}", rf"{n}\text{{ cm}}", f"{n:,}"], str(n + rng.choice([-2, 1, 3, 10]))


def _radical(rng: random.Random) -> tuple[str, list[str], str]:
    k, p = rng.randrange(2, 12), rng.choice([2, 3, 5, 7, 13])
    return rf"{k}\sqrt{{{p}}}", [rf"{k} \sqrt {p}", rf"\sqrt{{{k * k * p}}}"], rf"{k + 1}\sqrt{{{p}}}"


def _polynomial(rng: random.Random) -> tuple[str, list[str], str]:
    a, b = rng.randrange(1, 9), rng.randrange(2, 9)
    return f"x^2+{a + b}x+{a * b}", [f"(x+{a})(x+{b})", f"{a * b}+{a + b}x+x^2"], f"x^2+{a + b}x+{a * b + 1}"


def _point(rng: random.Random) -> tuple[str, list[str], str]:
    a, b = rng.randrange(-9, 9), rng.randrange(1, 9)
    return f"({a},{b})", [rf"\left( {a}, {b} \right)", f"(x, y) = ({a}, {b})"], f"({b + 20},{a})"


def _interval(rng: random.Random) -> tuple[str, list[str], str]:
    a, b = rng.randrange(-9, 0), rng.randrange(1, 9)
    return f"[{a},{b})", [rf"\left[{a}, {b}\right)", rf"{a} \leq x < {b}"], f"({a},{b}]"


_KINDS: list[Callable[[random.Random], tuple[str, list[str], str]]] = [
    # About the mix of MATH's reference answers: two thirds are integers.
    *[_integer] * 13,
    *[_fraction] * 3,
    _radical,
    _polynomial,
    _point,
    _interval,
]
_SENTENCES = [
    r"Let $x = {a}$ and consider $\frac{{{a}}}{{{b}}} + \sqrt{{{b}}}$, which simplifies as before. ",
    r"By the previous step, \[ {a}x^2 - {b}x + 1 = 0, \] so the discriminant is ${b}^2 - 4 \cdot {a}$. ",
    "We check the case where the number of terms is {a}, and the remaining {b} terms cancel. ",
    r"Therefore we multiply both sides by ${a}$ and obtain $y = {a}z + {b}$. ",
    "Wait, let me double-check this computation before going on to the next case. ",
]


def ordinary(name: str, count: int, tokens: int, seed: int) -> Batch:
    """`count` completions of about `tokens` tokens, every second one wrong."""
    rng = random.Random(seed)
    batch = Batch(name, [], [], [])
    for i in range(count):
        answer, spellings, wrong = rng.choice(_KINDS)(rng)
        right = i % 2 == 0
        text = ""
        while len(text) < tokens * CHARS_PER_TOKEN - 60:
            text += rng.choice(_SENTENCES).format(a=rng.randrange(2, 99), b=rng.randrange(2, 99))
        given = rng.choice(spellings) if right else wrong
        batch.completions.append(rf"{text}The final answer is $\boxed{{{given}}}$.")
        batch.answers.append(answer)
        batch.labels.append(right)
    return batch


def _degenerate_kinds(i: int) -> Iterator[tuple[str, str]]:
    """(kind, completion) of everything a collapsed policy is known to write; `i` varies it."""
    n = 1000 + i
    yield "repetition", f"wait, let me check {i} again. " * 4000
    yield "repeated box", rf"the answer is \boxed{{1{i}}} " * 4000
    yield "unclosed boxes", r"\boxed{" * 20_000 + str(i)
    yield "unclosed braces", rf"\boxed{{{i}+" + "{" * 50_000
    yield "long number", rf"\boxed{{{i}{'7' * 10_000}}}"
    yield "long decimal", rf"\boxed{{0.{'3' * 10_000}{i}}}"
    yield "tower", rf"\boxed{{9^{{9^{{9^{{{9 + i}}}}}}}}}"
    yield "short tower", rf"\boxed{{{9 + i}^{{9^9}}}}"
    yield "factorial", rf"\boxed{{(({9 + i}!)!)!}}"
    yield "sum", rf"\boxed{{\sum_{{k=1}}^{{10^{{{9 + i}}}}} \frac{{1}}{{k}}}}"  # this and the next pass the limits
    yield "binomial", rf"\boxed{{\binom{{10^{{9}}+{i}}}{{10^8}}}}"
    yield "nested fractions", r"\boxed{" + r"\frac{1}{" * n + "2" + "}" * n + "}"
    yield "nested brackets", rf"\boxed{{{'(' * n}x{')' * n}}}"
    rows = r"\\".join(["&".join("1" * 300)] * (100 + i))
    yield "matrix", rf"\boxed{{\begin{{pmatrix}}{rows}\end{{pmatrix}}}}"
    yield "power of a sum", rf"\boxed{{(x+y+z+w)^{{{200 + i}}}}}"
    yield "control characters", rf"\boxed{{{''.join(map(chr, range(1, 32))) * 10}{i}}}"
    yield "one megabyte", "x" * 1_000_000 + rf"\boxed{{{'y' * 1000}{i}}}"
    yield "one megabyte boxed", rf"\boxed{{{'1+' * 500_000}{i}}}"
    yield "dollars", "$" * (5000 + i)
    yield "no text", " " * i


def degenerate(count: int) -> Batch:
    """`count` completions of every degenerate kind in turn; the reference answers are ordinary."""
    batch = Batch("degenerate", [], [], [])
    references = ["-3", r"\frac{1}{2}", r"2\sqrt{3}", "x^2+1", "(1,2)"]
    i = 0
    while len(batch.completions) < count:
        for _, text in _degenerate_kinds(i):
            batch.completions.append(text)
            batch.answers.append(references[len(batch.answers) % len(references)])
            batch.labels.append(False)
        i += 1
    return Batch(batch.name, batch.completions[:count], batch.answers[:count], batch.labels[:count])


def resident_mib(pid: int) -> float:
    """Memory of a process in MiB, as Linux counts it."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def run_verifier(batch: Batch, verifier: MathVerifier) -> Result:
    """Grade with the verifier, whose cache must not know the batch."""
    started = time.perf_counter()
    grades = verifier.grade(batch.completions, batch.answers)
    seconds = time.perf_counter() - started
    right = sum((grade.correct is True) == label for grade, label in zip(grades, batch.labels, strict=True))
    peak = max((resident_mib(pid) for pid in verifier.worker_pids), default=0.0)
    return _result(batch, "fura_rl MathVerifier", len(grades), seconds, right, peak)


def _result(batch: Batch, grader: str, graded: int, seconds: float, right: int, peak: float) -> Result:
    rate, accuracy = graded / seconds, right / max(1, graded)
    return Result(batch.name, grader, graded, len(batch.labels), seconds, rate, accuracy, peak)


def _plain(completions: list[str], answers: list[str]) -> list[bool]:
    from math_verify import parse, verify

    return [verify(parse(f"${a}$"), parse(c)) for c, a in zip(completions, answers, strict=True)]


def _trl(completions: list[str], answers: list[str]) -> list[bool]:
    from trl.rewards import accuracy_reward

    messages = [[{"role": "assistant", "content": text}] for text in completions]
    return [reward == 1.0 for reward in accuracy_reward(messages, [f"${a}$" for a in answers])]


def _serve(grade: Callable[[list[str], list[str]], list[bool]], batch: Batch, connection: Any) -> None:
    import logging

    logging.disable(logging.WARNING)
    grade([r"\boxed{1}"], ["1"])  # imports and first-use tables are not part of the measurement
    connection.send("ready")
    for text, answer in zip(batch.completions, batch.answers, strict=True):
        connection.send(grade([text], [answer])[0])


def run_other(name: str, grade: Callable[[list[str], list[str]], list[bool]], batch: Batch, limit: float) -> Result:
    """Grade one by one in a process that is killed after `limit` seconds."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(grade, batch, sender))
    process.start()
    sender.close()
    receiver.recv()
    started = time.perf_counter()
    verdicts: list[bool] = []
    peak = 0.0
    while len(verdicts) < len(batch.labels) and receiver.poll(max(0.0, started + limit - time.perf_counter())):
        try:
            verdicts.append(receiver.recv())
        except EOFError:  # the process died, of memory for instance
            break
        peak = max(peak, resident_mib(process.pid or 0))
    seconds = time.perf_counter() - started
    if process.is_alive():
        peak = max(peak, resident_mib(process.pid or 0))
    process.kill()
    process.join()
    right = sum(verdict == label for verdict, label in zip(verdicts, batch.labels, strict=False))
    return _result(batch, name, len(verdicts), seconds, right, peak)


def main() -> None:
    """Run every grader on every batch, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="limit for the other graders on each batch")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    batches = [
        ordinary("ordinary", 256, 500, seed=1),
        ordinary("long", 1024, 4000, seed=2),
        degenerate(256),
        ordinary("ordinary, after degenerate", 256, 500, seed=3),
    ]
    results: list[Result] = []
    with MathVerifier(workers=options.workers) as verifier:
        verifier.start()
        results += [run_verifier(batch, verifier) for batch in batches]
    for batch in batches[:3]:
        results.append(run_other("trl accuracy_reward", _trl, batch, options.seconds))
        results.append(run_other("plain math-verify", _plain, batch, options.seconds))

    table = Table(title=f"{options.workers} workers; other graders stopped after {options.seconds:.0f} s")
    for column in ("batch", "grader", "graded", "seconds", "per second", "right verdicts", "memory MiB"):
        table.add_column(column, justify="left" if column in ("batch", "grader") else "right")
    for r in sorted(results, key=lambda r: [batch.name for batch in batches].index(r.batch)):
        graded = f"{r.graded}/{r.size}"
        numbers = (f"{r.seconds:.2f}", f"{r.per_second:.0f}", f"{r.accuracy:.1%}", f"{r.peak_mib:.0f}")
        table.add_row(r.batch, r.grader, graded, *numbers)
    Console(width=120).print(table)
    print(json.dumps({"workers": options.workers, "results": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
