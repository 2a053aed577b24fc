"""The predictions of docs/scale.md are what the script computes, from shapes that are those of the models."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale  # noqa: E402


def test_the_page_holds_the_tables():
    page = (ROOT / "docs" / "scale.md").read_text()
    for table in (scale.bytes_table(), scale.step_table()):
        assert "\n".join(table) in page, "docs/scale.md differs from what python benchmarks/scale.py prints"


def test_sizes_are_those_of_the_models():
    """Parameters as published; trained ones as counted on Qwen3-1.7B's layers (docs/performance.md)."""
    published = {
        "Qwen3-1.7B": 1.72,
        "Qwen2.5-7B": 7.62,
        "Qwen2.5-14B": 14.77,
        "Qwen2.5-32B": 32.76,
        "Llama-3-70B": 70.55,
    }
    assert {name: round(shape.weights / 1e9, 2) for name, shape in scale.SHAPES.items()} == published
    assert scale.SHAPES["Qwen3-1.7B"].trained == 39_051_264


def test_prediction_of_what_was_measured():
    """0.5B on one GPU: 256 rollouts of at most 512 tokens took 5.07 s to generate; and the syncs of two models."""
    shape = scale.Shape(24, 896, 4864, 14, 2, 151_936, True, 1, 1, head=64)
    work = scale.Work(rollouts=256, prompt=100, mean=200, longest=512)
    phases = scale.predict(shape, 1, work)
    assert phases["generate"] == pytest.approx(162.3 / 32, rel=0.05)
    assert phases["sync"] == pytest.approx(0.0063, rel=0.1)
    assert scale.predict(scale.SHAPES["Qwen3-1.7B"], 1)["sync"] == pytest.approx(0.0095, rel=0.1)
    assert phases["gradients"] == phases["gather"] == 0


def test_more_gpus_share_the_work_and_not_the_longest_completion():
    shape = scale.SHAPES["Qwen2.5-7B"]
    few, many = scale.predict(shape, 8), scale.predict(shape, 1024)
    assert many["train"] == pytest.approx(few["train"] / 128)
    assert many["generate"] > 0.5 * few["generate"]
    assert sum(value for phase, value in few.items() if phase != "total") == pytest.approx(few["total"])
