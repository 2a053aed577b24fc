r"""Every kernel of the adapter alone: against torch, and against a copy of as many bytes.

    python benchmarks/kernel_rates.py [--groups GROUP ...] [--rows 16384] [--launches 25]

- `transform`: `x + x D^T` forward; backward (`dx`, `dD` and the sum over shares), also with `x` as its two factors, and
  from the gradient of `x = silu(gate) * up` to those of `gate` and `up` (torch: with the forward pass).
- `shared`: the same for two or three layers that read one `x` (gate/up, q/k/v).
- `delta`: the multipliers `D` of one and of three layers from their trained tensors, and the gradients of these.
- `merge`: `W (I + D)` into an engine's storage.
- `four_bit`: `W (I + D)` from NF4 codes, and for comparison bitsandbytes' `W` (needs bitsandbytes).
- `gathered`: rows of many adapters in one batch, as an engine decodes (128 rows) and reads prompts (2,048).

Each launch is timed by itself with device events, after 256 MiB have been written so that nothing is left in the L2
cache; medians. `MiB` counts what must move: each input once, each output once. `of a copy` is the time of a copy of as
many bytes over the kernel's, `GB/s` these bytes over its time. `torch` is the same function without kernels, its
backward pass through autograd. `difference` is that of the two results, relative; above 0.02 the exit status is 1.
Table, then JSON on the last line. `--cpu` runs small shapes in Triton's interpreter: only differences mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec

if "--cpu" in sys.argv:  # chosen before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "FURA_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}

import torch
from rated_kernels import (
    Case,
    Results,
    delta_cases,
    four_bit_cases,
    gathered_cases,
    merge_cases,
    shared_cases,
    transform_cases,
)
from rich.console import Console
from rich.table import Table

# (n, b) of the models in docs/performance.md, and the ends of the range; K = n * b
BLOCKS = [(128, 16), (28, 32), (32, 64), (56, 64), (64, 76), (64, 96), (16, 128), (128, 148), (148, 128), (14, 256)]
SHARED = [(28, 32, 3), (28, 32, 2), (32, 64, 3), (32, 64, 2), (56, 64, 3), (56, 64, 2)]  # with the number of layers
WEIGHTS = [(4864, 28, 32), (896, 64, 76), (2048, 32, 64), (6144, 32, 64), (2048, 64, 96)]  # out, n, b
FOUR_BIT = [(2048, 32, 64), (2048, 64, 96), (18944, 56, 64), (3584, 148, 128)]
GATHERED = [(128, 1), (128, 16), (2048, 16)]  # rows, adapters among them; of 32 x 64, q/k/v
GROUPS = ("transform", "shared", "delta", "merge", "four_bit", "gathered")
MOST_DIFFERENCE = 0.02


@dataclass(frozen=True)
class Row:
    kernel: str
    shape: str
    mib: float
    us: float
    gb_s: float
    of_a_copy: float
    torch_us: float
    difference: float


class Timer:
    """Median microseconds of a function whose launches find nothing in the cache."""

    def __init__(self, device: str, launches: int) -> None:
        self.device, self.launches = device, launches
        self.flush = torch.empty((256 if device == "cuda" else 1) * 2**20, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        for _ in range(3 if self.device == "cuda" else 0):
            function()
        return statistics.median(self.times(function))

    def times(self, function: Callable[[], object]) -> list[float]:
        if self.device == "cpu":
            times = []
            for _ in range(self.launches):
                start = time.perf_counter()
                function()
                times.append((time.perf_counter() - start) * 1e6)
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.launches)]
        for begin, end in events:
            self.flush.fill_(1)
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def difference(first: Results, second: Results) -> float:
    """The largest relative norm of the difference of two results' tensors."""
    lists = [[r] if isinstance(r, torch.Tensor) else r for r in (first, second)]
    pairs = zip(*[[tensor.detach().float() for tensor in each] for each in lists], strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measure(case: Case, timer: Timer, device: str) -> Row:
    found = difference(case.run(), case.torch())
    source = torch.randn(case.least_bytes // 4, device=device).bfloat16()  # half of the bytes are read, half written
    target = torch.empty_like(source)
    us, copy_us = timer(case.run), timer(lambda: target.copy_(source))
    torch_us, gb_s = timer(case.torch), case.least_bytes / us / 1e3
    return Row(case.kernel, case.shape, case.least_bytes / 2**20, us, gb_s, copy_us / us, torch_us, found)


def cases(args: argparse.Namespace, device: str) -> Iterator[Case]:
    """One shape's tensors live at a time."""
    blocks, shared, weights, batches, n, b = BLOCKS, SHARED, WEIGHTS, GATHERED, 32, 64
    four_bit = FOUR_BIT
    if args.cpu:
        blocks, shared, weights = [(2, 16), (2, 20), (1, 148)], [(2, 16, 3), (2, 20, 2)], [(24, 2, 16)]
        batches, four_bit, n, b = [(8, 3)], [(24, 4, 16)], 2, 16
    made = {
        "transform": [partial(transform_cases, args.rows, device, *block) for block in blocks],
        "shared": [partial(shared_cases, args.rows, device, *shape) for shape in shared],
        "delta": [
            partial(delta_cases, device, *block, count)
            for block in blocks[: 2 if args.cpu else None]
            for count in (1, 3)
        ],
        "merge": [partial(merge_cases, device, *weight) for weight in weights],
        "four_bit": [partial(four_bit_cases, device, *weight) for weight in four_bit],
        "gathered": [partial(gathered_cases, device, n, b, *batch) for batch in batches],
    }
    for group in args.groups:
        for make in made[group]:
            yield from make()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [group for group in GROUPS if group != "four_bit" or find_spec("bitsandbytes")]
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=usual, metavar="GROUP", help=f"{GROUPS}")
    parser.add_argument("--rows", type=int, default=16_384, help="tokens")
    parser.add_argument("--launches", type=int, default=25, help="timed ones of each")
    parser.add_argument("--cpu", action="store_true", help="small shapes in Triton's interpreter")
    args = parser.parse_args()
    if args.cpu:
        args.rows, args.launches = 32, 1
    device = "cpu" if args.cpu else "cuda"
    torch.manual_seed(0)
    timer, rows = Timer(device, args.launches), []
    for case in cases(args, device):
        rows.append(measure(case, timer, device))
        print(f"{rows[-1].kernel} {rows[-1].shape}: {rows[-1].us:.1f} us", file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (Triton's interpreter)"
    title = f"{args.rows:,} rows, bf16, medians of {args.launches} launches, {name}"
    table = Table(title=title, title_justify="left")
    for column in ("kernel", "shape", "MiB", "us", "GB/s", "of a copy", "torch us", "torch / kernel", "difference"):
        table.add_column(column, justify="left" if column in ("kernel", "shape") else "right")
    for row in rows:
        cells = [f"{row.mib:.1f}", f"{row.us:.1f}", f"{row.gb_s:,.0f}", f"{row.of_a_copy:.0%}", f"{row.torch_us:.0f}"]
        table.add_row(row.kernel, row.shape, *cells, f"{row.torch_us / row.us:.1f}", f"{row.difference:.1e}")
    Console(width=140).print(table)
    date, found = time.strftime("%Y-%m-%d"), [asdict(row) for row in rows]
    print(json.dumps(dict(title=title, command=shlex.join(sys.argv), date=date, rows=found)))
    if not all(row.difference < MOST_DIFFERENCE for row in rows):
        sys.exit("a kernel's result differs from torch's")


if __name__ == "__main__":
    main()
