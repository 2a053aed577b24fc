"""Fixtures of the evaluation tests: a small real model, benchmarks made here, and the real verifier."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fura_rl.eval import Sample
from fura_rl.rewards import MathVerifier

# For the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def verifier():
    with MathVerifier(workers=1, timeout=5) as made:
        yield made


def sums(count):
    """Addition problems as rows of a benchmark, with a subject and a level."""
    return [
        {
            "unique_id": f"sum-{i}",
            "problem": f"What is {3 * i} + {i + 7}?",
            "answer": str(4 * i + 7),
            "subject": "even" if i % 2 == 0 else "odd",
            "level": i % 3,
        }
        for i in range(count)
    ]


class Script:
    """A sampler that answers from a function of the prompt's text and the request; it keeps what it was asked for."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.requests = tokenizer, answer, []

    def sample(self, requests, on_sample=None):
        samples = []
        for index, request in enumerate(requests):
            self.requests.append(request)
            text = self.answer(self.tokenizer.decode(request.prompt_token_ids), request)
            ids = self.tokenizer(text)["input_ids"]
            limit = request.sampling.max_tokens
            samples.append(
                Sample(ids[:limit], self.tokenizer.decode(ids[:limit]), "stop" if len(ids) < limit else "length")
            )
            if on_sample is not None:
                on_sample(index, samples[-1])
        return samples


@pytest.fixture
def script():
    return Script


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def write_jsonl(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def sums_file(write_jsonl):
    return write_jsonl("sums.jsonl", sums(6))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a randomly initialised Qwen2 with 2 layers and a byte-level tokenizer, float32."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # heads of 32: the smallest that vLLM's CPU attention takes
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform logits, so that greedy decoding has no near-ties
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0.0  # sampling still ends at times, greedy decoding never
    model.save_pretrained(directory)
    return directory


def byte_tokenizer():
    """256 bytes and an end-of-sequence token, with a one-line chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    wrapped.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return wrapped


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """The tiny model and its tokenizer, loaded."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), tokenizer


@pytest.fixture(scope="session")
def smollm():
    """Directory of SmolLM2-135M next to the checkout; its weights are not part of the repository."""
    path = Path(__file__).resolve().parents[3] / "models" / "smollm2-135m"
    if not path.is_dir():
        pytest.skip(f"model not found: put SmolLM2-135M-Instruct into {path} to run this test")
    return path
