"""The benchmark of quantised bases runs on a CPU, a step and a short fine-tuning alike."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from torch import nn

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quantized.py"


def run(*options: object) -> list[dict]:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    process = forked.run(SCRIPT, *options, "--tiny")
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])["results"]


@pytest.mark.slow
def test_a_step_of_every_method():
    (result,) = run("step", "--steps", 2)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["floor", "qfura", "qfura_aligned", "qlora_r32", "qlora_r64", "qdora_r32"]
    assert all(row["failed"] is None and row["ms"] > 0 for row in rows.values())
    assert rows["qlora_r32"]["ms_to_qlora"] == 1
    assert rows["qlora_r64"]["trainable"] == 2 * rows["qlora_r32"]["trainable"] < 2 * rows["qdora_r32"]["trainable"]
    assert rows["floor"]["trainable"] == 0 < rows["qfura"]["trainable"]
    assert 0 < result["nf4_error"] < 0.5


@pytest.mark.slow
def test_both_methods_learn(tmp_path, tiny_model, tiny_problems):
    lines = [json.loads(line) for line in (tiny_problems / "train.jsonl").read_text().splitlines()[:24]]
    data = tmp_path / "solutions.jsonl"
    solved = [{"problem": line["problem"], "solution": f"It is \\boxed{{{line['answer']}}}."} for line in lines]
    data.write_text("".join(json.dumps(line) + "\n" for line in solved))
    options = ["--model", tiny_model, "--train", data, "--test", data, "--batch", 4, "--held-out", 8]
    (result,) = run("loss", *options, "--steps", 6, "--rates", 3e-3, 1e38, "--seeds", 1, 1)
    learnt = [row for row in result["rows"] if row["rate"] < 1]
    first, lora, second, _ = learnt
    assert [row["method"] for row in learnt] == ["qfura", "qlora_r32"] * 2
    broken = [row for row in result["rows"] if row["rate"] > 1]
    assert len(broken) == 4 and all("not finite" in row["failed"] and "held_out" not in row for row in broken)
    assert first["held_out"] == second["held_out"]  # a seed is a run
    assert first["held_out"] < result["before"] - 0.1 and lora["held_out"] < result["before"] - 0.1
    assert 0.08 < result["nf4_error"] < 0.11 and first["update"] > 0 and first["merged"] > 0


class Scaled(nn.Module):
    """Its loss is finite, the gradient of all that lies before the square root is not."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.root, self.above = (nn.Parameter(torch.tensor(value)) for value in (1.0, 0.0, 2.0))

    def forward(self, **batch: torch.Tensor) -> SimpleNamespace:
        self.cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        return SimpleNamespace(loss=((self.below * self.root).sqrt() + 1) * self.above)


def test_a_gradient_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    solutions = importlib.import_module("solutions")
    model, options = Scaled(), dict(steps=3, batch=2, seed=1)
    with pytest.raises(FloatingPointError, match=r"^step 0, 2 x 3 tokens: the gradient of root is not finite$"):
        solutions.fine_tune(model, [([1, 2, 3], 1)], lambda step: 0.1, strict=True, **options)
    assert model.above.item() == 2.0  # stopped before the optimiser's step
    assert not model.cudnn  # whose attention gives NaN gradients at some lengths
    solutions.fine_tune(model, [([1, 2, 3], 1)], lambda step: 0.1, **options)
    assert solutions.not_finite(model, torch.tensor(float("nan")), torch.tensor(1.0)) == "the loss is not finite"
