"""Adapters that have moved, and log-probs to compare: shared by the tests of swapping and serving."""

import json
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
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
        SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0),
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


# -- ways to spoil the adapter in a folder


def rewrite(folder: Path, change) -> None:
    """Saves the adapter in `folder` again with `change(tensors)` applied."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def first(tensors, suffix):
    return next(key for key in tensors if key.endswith(suffix))


def truncated(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder):
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def other_base(folder):
    rewrite(folder, lambda t: {k: torch.randn_like(v) if k.endswith("base_sample") else v for k, v in t.items()})


def other_shape(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "down_proj" not in k} | _doubled(t, "down_proj"))


def _doubled(tensors, part):
    return {
        k: v if k.endswith("base_sample") else torch.cat([v, v])
        for k, v in tensors.items()
        if part in k and "layers.0" in k
    }


def other_layers(folder):
    rewrite(folder, lambda t: {k.replace("layers.0.", "layers.7."): v for k, v in t.items()})


def without_basis(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != first(t, "basis")})


def bad_factor(folder):
    rewrite(folder, lambda t: {k: v[..., :-1].contiguous() if k == first(t, "scale") else v for k, v in t.items()})


def not_finite(folder):
    rewrite(folder, lambda t: {k: v * float("nan") if k == first(t, "core") else v for k, v in t.items()})


def extra_module(folder):
    rewrite(folder, lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(4)})


def lora(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))


def head(folder):
    rewrite(folder, lambda t: {k.replace("model.layers.0.self_attn.q_proj", "lm_head"): v for k, v in t.items()})
