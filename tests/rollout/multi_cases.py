"""An ordinary LoRA, merged models, and sampling of mixed batches: shared by the tests of adapters per request."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from swapping import max_gap
from transformers import AutoModelForCausalLM


def make_lora(model: Path, folder: Path) -> Path:
    """A LoRA of the model at `model` that has moved, saved to `folder`."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    policy.save_pretrained(folder)
    return folder


def merged_model(model: Path, folder: Path | None):
    """transformers' model with the adapter in `folder` merged by PEFT; None for the base."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return base if folder is None else PeftModel.from_pretrained(base, folder).merge_and_unload()


def sample(llm, sequences, requests, max_tokens=12):
    """Greedy tokens after each sequence, each with its own adapter, all in one batch; and their log-probs."""
    from vllm import SamplingParams

    options = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    outputs = llm.generate(prompts, options, lora_request=requests, use_tqdm=False)
    return [
        (list(out.outputs[0].token_ids), [next(iter(e.values())).logprob for e in out.outputs[0].logprobs])
        for out in outputs
    ]


@torch.no_grad()
def gap(model, sequence, sampled) -> float:
    """Between sampled log-probs and those that a model gives the same tokens: how well prompt and tokens were read."""
    tokens, logprobs = sampled
    logits = model(torch.tensor([[*sequence, *tokens]])).logits[0, -len(tokens) - 1 : -1].log_softmax(-1)
    return max_gap([logprobs], [logits[range(len(tokens)), tokens].tolist()])


def scored(server, model, ids, headers=None):
    """Log-probs of tokens 1.. as the server's `model` computes them."""
    response = server.complete(ids, headers, model=model, max_tokens=1, prompt_logprobs=0)
    assert response.status_code == 200, response.text
    entries = response.json()["choices"][0]["prompt_logprobs"]
    return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries[1:], strict=True)]
