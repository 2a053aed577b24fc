"""The recipes of the paper's RL table: read by the real parser, alike in all but the method, and planned for."""

from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen3Config
from typer.testing import CliRunner

from fura_rl.cli import app
from fura_rl.eval import Sampling
from fura_rl.train_grpo import parse
from fura_rl.trainer.benchmarks import benchmark_sampling
from fura_rl.trainer.methods import adapter_config

RECIPES = sorted((Path(__file__).parents[1] / "configs" / "paper").glob("*.yaml"))
RATES = {"fura": 9e-5, "lora": 9e-5, "randlora": 9e-5, "full": 1e-5}
SHAPES = {
    "qwen3-1.7b": Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152_064, tie_word_embeddings=False,
    ),
}  # fmt: skip


def test_every_method_of_both_models():
    assert [path.stem for path in RECIPES] == sorted(f"{model}-{method}" for model in SHAPES for method in RATES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_says_what_was_published(path):
    model_name, method = path.stem.rsplit("-", 1)
    data, training, model, adapter = parse(["--config", str(path)])
    assert model.model_name_or_path.lower() == f"qwen/{model_name}" and data.dataset_name.endswith("MATH-lighteval")
    assert adapter.method == method and training.learning_rate == RATES[method]
    assert (adapter_config(adapter) is None) == (method == "full")
    processes = 8 if path.stem == "qwen2.5-7b-full" else 1
    rollouts = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
    assert (rollouts, training.num_generations, training.max_steps) == (32 * 8, 8, 50)
    assert training.lr_scheduler_type == "constant" and training.warmup_steps == 0 and training.weight_decay == 0
    assert (training.temperature, training.max_completion_length, training.max_grad_norm) == (1, 1024, 1)
    assert (training.loss_type, training.scale_rewards, training.beta) == ("grpo", "none", 0)
    greedy = benchmark_sampling(training, "math500")
    assert (greedy.temperature, greedy.max_tokens, greedy.n) == (0, 2048, 1)
    assert benchmark_sampling(training, "amc23") == greedy
    expected = Sampling(temperature=0.6, top_p=0.95, max_tokens=2048, n=8, seed=training.seed)
    assert benchmark_sampling(training, "aime25") == expected


@pytest.mark.parametrize("path", [path for path in RECIPES if "randlora" not in path.stem], ids=lambda path: path.stem)
def test_it_fits_its_gpus(path, tmp_path):
    """RandLoRA's memory is not planned for."""
    SHAPES[path.stem.rsplit("-", 1)[0]].save_pretrained(tmp_path)
    options = ["--config", str(path), "--gpu-memory", "80", "--model_name_or_path", str(tmp_path)]
    if path.stem == "qwen2.5-7b-full":
        options += ["--gpus", "8", "--strategy", "fsdp2"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0, result.output
