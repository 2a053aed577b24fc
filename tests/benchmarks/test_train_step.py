"""The benchmark of a training step runs on a CPU and reports every method it can run there."""

import json
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


def run(*options: str) -> dict:
    run = forked.run(SCRIPT, "--tiny", *options)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_methods():
    rows = {row["method"]: row for row in run()["rows"]}
    assert list(rows) == ["floor", "full", "lora_r32", "lora_r64", "dora_r32", "oft", "published", "fura_torch"]
    for row in rows.values():
        assert row["failed"] is None
        assert row["spread_ms"][0] <= row["ms"] <= row["spread_ms"][1]
    assert rows["lora_r32"]["to_lora"] == rows["floor"]["to_floor"] == 1
    assert rows["floor"]["trainable"] == 0
    assert 2 * rows["lora_r32"]["trainable"] == rows["lora_r64"]["trainable"]
    # all of a layer but its norms, which are 2 x 32 and 2 x 8 numbers, and the final norm; adapters train less
    projections = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
    assert rows["full"]["trainable"] == projections + 2 * 32 + 2 * 8 + 32 + 8 * 32
    assert rows["published"]["trainable"] == rows["fura_torch"]["trainable"]


@pytest.mark.slow
def test_a_choice_of_methods_with_checkpointing():
    result = run("--rows", "fura_torch", "floor", "--checkpointing")
    assert [row["method"] for row in result["rows"]] == ["fura_torch", "floor"]
    assert "checkpointing" in result["title"]
    assert result["rows"][0]["to_lora"] is None
    assert result["rows"][0]["to_floor"] > 0


SHARDED_STEP = """
import argparse, copy, sys, torch
sys.path.insert(0, sys.argv[1])
import train_step
settings = dict(tiny=True, shape=None, layers=1, tokens=32, sequence=16, checkpointing=False, compile=False)
found = {}
for kind in ("plain", "fsdp", "zero2", "zero3"):
    zero = int(kind[-1]) if kind.startswith("zero") else None
    bench = train_step.Bench(argparse.Namespace(**settings, fsdp=kind == "fsdp", zero=zero))
    row = bench.build("fura_torch")
    assert (row.engine is not None) == kind.startswith("zero")
    for group in (row.engine.optimizer if zero else row.optimizer).param_groups:
        group["lr"] = 1e-2
    bench.step(row)
    trained = [p for p in row.model.parameters() if p.requires_grad]
    if zero == 3:
        import deepspeed
        with deepspeed.zero.GatheredParameters(trained):
            trained = [p.detach().clone() for p in trained]
    found[kind] = torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in trained])
assert (found["plain"] != 0).float().mean() > 0.9
for kind, values in found.items():
    same = torch.isclose(values, found["plain"], atol=1e-3).float().mean()
    print(kind, float(same))
    assert same > 0.9, kind
print("same", len(found["plain"]))
"""


@pytest.mark.slow
def test_a_sharded_step_is_the_same_step(tmp_path):
    """AdamW's first step has the size of the learning rate, so what differs is the sign of gradients near zero."""
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    (tmp_path / "step.py").write_text(SHARDED_STEP)
    process = forked.run(tmp_path / "step.py", SCRIPT.parent)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == "same 2160"
