"""The tables and files that a run leaves behind."""

import json
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.trainer.report import adapter_table, changed_options, plot_curves, score_table, write_summary


def score(accuracy):
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1, "truncated": 0.0}


def test_changed_options_are_what_differs():
    @dataclass
    class Options:
        a: int = 1
        b: list = field(default_factory=lambda: ["x"])
        c: str | None = None

    assert changed_options(Options(a=2, b=["x"], c="y")) == {"a": 2, "c": "y"}


def test_adapter_table_counts_blocks_and_parameters():
    config = Qwen3Config(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_config(config), FuraConfig(target_modules=["q_proj", "down_proj"]))
    table = adapter_table(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 3 * (8 * 8 * 8 + 64) + 3 * (8 * 12 * 12 + 96)  # cores and scales of 64 = 8 x 8, 96 = 8 x 12
    assert f"{trainable:,} of" in table
    assert "8 x 12" in table and "64 x 96" in table


def test_score_table_and_curves(tmp_path):
    evaluations = [
        {"step": 0, "scores": {"math500": score(0.3)}},
        {"step": 4, "scores": {"math500": score(0.5)}},
    ]
    assert "0.300 [0.200, 0.400]" in score_table(evaluations) and "step 4" in score_table(evaluations)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, "reward": i / 4}) + "\n" for i in range(4)))
    plot_curves(metrics, evaluations, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_summary_is_written_whole(tmp_path):
    write_summary(tmp_path / "summary.json", seed=1, dtype=torch.float32, path=tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "seed": 1, "dtype": "torch.float32", "path": str(tmp_path),
    }  # fmt: skip
    assert not (tmp_path / "summary.tmp").exists()
