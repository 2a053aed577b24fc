"""Training runs in processes of their own, forked from one that has paid for the imports."""

import pytest
import yaml
from forked import forking
from training_runs import Run


@pytest.fixture(scope="session")
def processes():
    """A context whose processes begin with `fura_rl.train_grpo` imported."""
    return forking()


@pytest.fixture
def start(processes, tmp_path):
    """`start(recipe, **changes)` begins a training run; what still runs at the end of the test is killed."""
    started = []

    def start(recipe, /, **changes):
        number = len(started)
        file = tmp_path / f"recipe_{number}.yaml"
        file.write_text(yaml.safe_dump({**recipe, **changes}))
        started.append(Run(processes, ["--config", str(file)], recipe["output_dir"], tmp_path / f"log_{number}.txt"))
        return started[-1]

    yield start
    for run in started:
        run.kill()


@pytest.fixture
def train(tmp_path, tiny_model, monkeypatch):
    """`train(reward, guards, ...)` trains the tiny model here, six steps of 8 rollouts, and returns the trainer."""
    # Not at the top: files of this folder that need no trainer should not import one.
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer

    monkeypatch.setenv("MASTER_PORT", "0")
    trainers = []

    def train(reward, guards=None, prepare=lambda trainer: None, resume=None, **options):
        defaults = dict(
            output_dir=str(tmp_path), use_vllm=False, max_steps=6, per_device_train_batch_size=8, num_generations=4,
            max_completion_length=8, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        args = FuraGRPOConfig(**{**defaults, **options}, guards=guards)
        rows = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
        trainer = FuraGRPOTrainer(
            model, [reward], args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainers.append(trainer)
        prepare(trainer)
        trainer.train(resume)
        return trainer

    yield train
    for trainer in trainers:
        trainer.close()


@pytest.fixture(scope="session")
def few_problems(tiny_problems, tmp_path_factory):
    """The first 16 training problems and the first 4 test problems, as two files: epochs are short."""
    folder = tmp_path_factory.mktemp("few")
    for name, count in (("train", 16), ("test", 4)):
        lines = (tiny_problems / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))
    return folder


@pytest.fixture
def recipe(tmp_path, tiny_model, few_problems):
    """Twelve steps: each batch of rollouts serves four, an epoch is eight, a log entry two, a checkpoint three."""
    return dict(
        model_name_or_path=str(tiny_model), dataset_name=str(few_problems / "train.jsonl"), prompt="plain",
        output_dir=str(tmp_path / "run"), use_vllm=False, max_steps=12, per_device_train_batch_size=8,
        gradient_accumulation_steps=2, num_generations=4, steps_per_generation=4, num_iterations=2,
        max_completion_length=24, learning_rate=1e-3, logging_steps=2, save_steps=3, vllm_max_model_length=256,
        benchmarks=[str(few_problems / "test.jsonl")], benchmark_steps=5, benchmark_max_tokens=24,
    )  # fmt: skip
