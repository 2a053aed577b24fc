"""The benchmark of single kernels in Triton's interpreter: every kernel agrees with torch, bytes are right."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_rates.py"


@pytest.mark.slow
def test_every_kernel_agrees_with_torch():
    run = subprocess.run([sys.executable, SCRIPT, "--cpu"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    rows = {(row["kernel"], row["shape"]): row for row in report["rows"]}
    four_bit = {"dequantise (bitsandbytes)", "merge 4 bits"} if find_spec("bitsandbytes") else set()
    assert {kernel for kernel, _ in rows} == four_bit | {
        "forward", "backward", "backward, of factors", "backward, gated", "shared forward", "shared backward", "D",
        "gradients from D's", "merge", "gathered",
    }  # fmt: skip
    for row in rows.values():
        assert 0 < row["difference"] < 0.02  # not one function twice: the kernels round once, torch more often
        assert row["gb_s"] == pytest.approx(row["mib"] * 2**20 / row["us"] / 1e3)
    x, delta = 2 * 32 * 40, 2 * 2 * 20 * 20  # bytes of 32 rows of 2 x 20 in bf16, and of D
    assert rows["forward", "2 x 20"]["mib"] == (2 * x + delta) / 2**20
    assert rows["backward", "2 x 20"]["mib"] == (3 * x + delta + 2 * delta) / 2**20  # dD is float32
    assert rows["shared forward", "2 of 2 x 20"]["mib"] == (3 * x + 2 * delta) / 2**20
    assert rows["shared backward", "2 of 2 x 20"]["mib"] == (4 * x + 6 * delta) / 2**20
    assert rows["merge", "24 of 2 x 16"]["mib"] == (2 * 2 * 24 * 32 + 4 * 2 * 16 * 16) / 2**20
    if four_bit:
        codes = 24 * 64 // 2 + 24 * 64 // 64  # a byte for two, and one for the scale of 64
        assert rows["merge 4 bits", "24 of 4 x 16"]["mib"] == (2 * 24 * 64 + codes + 2 * 4 * 16 * 16) / 2**20
