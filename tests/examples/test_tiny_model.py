"""The checkpoint that the repository ships for the demo."""

import random
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).parents[2] / "examples" / "tiny"
sys.path.insert(0, str(TINY))

from flaws import RATES, attempt  # noqa: E402
from pretrain import PROMPT, accuracy  # noqa: E402
from problems import problems  # noqa: E402

MODEL = TINY / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_is_small_and_bf16_safetensors():
    files = [file for file in MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 10**6
    assert AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").dtype == torch.bfloat16
    assert [file.name for file in files if file.suffix == ".safetensors"] == ["model.safetensors"]


def test_shape_suits_the_engine(model, tokenizer):
    assert model.config.model_type == "qwen3"
    assert model.config.head_dim in (32, 64, 128)
    assert model.config.vocab_size == len(tokenizer)
    assert model.num_parameters() < 3.5e6


def test_special_tokens_end_a_turn(model, tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token not in (None, tokenizer.eos_token)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_chat_template_round_trip(tokenizer):
    messages = [{"role": "user", "content": "Mia has 23 apples."}, {"role": "assistant", "content": "\\boxed{23}"}]
    expected = "<|im_start|>user\nMia has 23 apples.<|im_end|>\n<|im_start|>assistant\n\\boxed{23}<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == expected
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert expected.startswith(prompt)
    prompt_ids = PROMPT.token_ids("Mia has 23 apples.", tokenizer)
    assert tokenizer.decode(prompt_ids) == prompt
    assert ids[: len(prompt_ids)] == prompt_ids


@pytest.mark.parametrize(
    "text", ["12 + 345 = 357.", "naïve café — 北京 🙂", "  two  spaces\n\tand 7 tabs ", "\\frac{1}{2}"]
)
def test_any_text_survives_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_tokens_and_texts_fit_the_demo(tokenizer):
    rng = random.Random(0)
    for problem in islice(problems("test", 4), 300):
        assert len(PROMPT.token_ids(problem.text, tokenizer)) < 96
        for kind in RATES:
            text = attempt(problem, kind, rng)
            tokens = tokenizer.tokenize(text)
            assert len(tokens) < 96
            assert sum(token.isdigit() for token in tokens) == sum(character.isdigit() for character in text)


@pytest.mark.slow
def test_solves_between_30_and_50_percent_of_held_out_problems(model, tokenizer):
    torch.manual_seed(0)
    todo = list(islice(problems("test", 0), 512))
    assert 0.30 <= accuracy(model, tokenizer, todo, sample=True) <= 0.50
