"""Adapters that have moved, and log-probs to compare: shared by the tests of swapping and serving."""

from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from fura_rl import FuraConfig
from fura_rl.adapter import save_adapter

TEXTS = ["Sam has 3 apples and buys 4 more.", "A box holds 12 pens. How many in 5 boxes?", "17 + 25 ="]


def make_adapter(model: Path, folder: Path, seed: int, std: float = 0.05, **config) -> Path:
    """An adapter of the model at `model` that has moved at random, saved to `folder`."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = get_peft_model(base, FuraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    return save_adapter(policy, folder)


def prompt_logprobs(llm, sequences) -> list[list[float]]:
    """Log-probs (natural) of tokens 1.. of each sequence, as the engine computes them for a prompt."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in sequences],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        use_tqdm=False,
    )
    return [
        [entry[token].logprob for token, entry in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
        for ids, out in zip(sequences, outputs, strict=True)
    ]


def reference_logprobs(model: Path, adapter: Path | None, sequences) -> list[list[float]]:
    """The same from transformers and PEFT's own merge."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    merged = base if adapter is None else PeftModel.from_pretrained(base, adapter).merge_and_unload()
    with torch.no_grad():
        logits = [merged(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in sequences]
    return [row[range(len(ids) - 1), ids[1:]].tolist() for row, ids in zip(logits, sequences, strict=True)]


def max_gap(found, expected) -> float:
    return max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
