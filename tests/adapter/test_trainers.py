"""FuRA under stock trainers of TRL: supervised fine-tuning beside LoRA, GRPO, gradient checkpointing, references."""

import copy
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_nets import adapted_llama, base_weights, fura_layers, perturb, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from fura_rl.adapter import FuraConfig
from fura_rl.prompts import load_prompt

TINY = Path(__file__).parents[2] / "examples" / "tiny"
STEPS, BATCH = 60, 8
LEARNING_RATES = [3e-3, 1e-2]


@pytest.fixture(scope="module")
def tokenizer():
    if not (TINY / "model").exists():
        pytest.skip("the tiny model is not there: make it with examples/tiny/pretrain.py --out examples/tiny/model")
    return AutoTokenizer.from_pretrained(TINY / "model")


def tiny_model():
    return AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def right_solutions() -> Dataset:
    """Problems with right solutions, which the tiny model was taught to write only some of the time."""
    spec = importlib.util.spec_from_file_location("tiny_problems", TINY / "problems.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    prompt = load_prompt("plain")
    rows = [
        {
            "prompt": prompt.messages(problem.text),
            "completion": [{"role": "assistant", "content": problem.solution(module.STYLES[i % 2])}],
        }
        for i, problem in enumerate(itertools.islice(module.problems("train", 0), STEPS * BATCH))
    ]
    return Dataset.from_list(rows)


def sft_fall(config, learning_rate, data, tokenizer, folder) -> float:
    """How far the loss falls, from the first step to the mean of the last ten."""
    arguments = SFTConfig(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(
        tiny_model(), args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    return losses[0] - sum(losses[-10:]) / 10


@pytest.mark.slow
def test_sft_loss_falls_at_least_as_far_as_with_lora(tokenizer, right_solutions, tmp_path):
    # about as many trained parameters each: blocks of 16 x 16 against rank 8 on layers of width 256
    methods = {
        "fura": FuraConfig(target_modules="all-linear"),
        "lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    }
    falls = {
        name: max(
            sft_fall(copy.deepcopy(config), rate, right_solutions, tokenizer, tmp_path) for rate in LEARNING_RATES
        )
        for name, config in methods.items()
    }
    assert falls["fura"] > 0.2
    assert falls["fura"] >= 0.99 * falls["lora"]  # what machines and batches make of rounding is less than this


# -- GRPO -------------------------------------------------------------------------------------------------------------


def reward_length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def grpo_trainer(model, tokenizer, folder, peft_config=None, **options) -> GRPOTrainer:
    arguments = GRPOConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **{"gradient_checkpointing": False, **options},
    )
    data = Dataset.from_list([{"prompt": "How many apples are 3 and 4?"}] * 8)
    return GRPOTrainer(
        model, reward_length, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_grpo_trains_the_adapter_and_nothing_else(tokenizer, tmp_path, gradient_checkpointing):
    config = FuraConfig(target_modules="all-linear")
    trainer = grpo_trainer(tiny_model(), tokenizer, tmp_path, config, gradient_checkpointing=gradient_checkpointing)
    before = base_weights(trainer.model)
    trainer.train()
    after = base_weights(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    moved = [layer.delta("default").abs().max() > 0 for layer in fura_layers(trainer.model).values()]
    assert moved and all(moved)


def test_grpo_reference_is_a_true_copy_of_a_trained_adapter(tokenizer, tmp_path):
    model = get_peft_model(tiny_model(), FuraConfig(target_modules="all-linear"))
    perturb(model)
    for layer in fura_layers(model).values():  # as if trained on a machine whose SVD gives other signs
        blocks = layer.fura_blocks["default"]
        blocks.basis.neg_()
        blocks.core.data.neg_()
    trainer = grpo_trainer(model, tokenizer, tmp_path, beta=0.1)
    assert "ref" in trainer.model.peft_config
    for layer in fura_layers(trainer.model).values():
        assert layer.delta("default").abs().max() > 0
        assert torch.equal(layer.delta("ref"), layer.delta("default"))
        assert not any(p.requires_grad for p in layer.fura_blocks["ref"].parameters())
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # before the first step


# -- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adapted_llama(train_bias=True).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
