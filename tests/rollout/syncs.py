"""Many syncs in a row, on whatever way from a policy to an engine: shared by the tests of each."""

import copy
from itertools import pairwise

import torch
from peft import get_peft_model
from swapping import max_gap
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl import FuraConfig
from fura_rl.rollout.probe import probe_sequences

SYNCS = 20


def make_policy(path, **options):
    """A float32 model with FuRA on all linear layers."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return get_peft_model(base, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))


def reference_logprobs(policy, ids):
    """From PEFT's own dense merge of a copy: independent of the stream and of the engine."""
    merged = copy.deepcopy(policy).merge_and_unload()
    with torch.no_grad():
        logprobs = merged(ids).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).tolist()


def check_twenty_syncs(policy, sync, score, std=0.05, step=None):
    """After each random update, `sync()`, and `score(sequences)` is what the merged transformers model says; the
    policy's own tensors stay as they are, bit for bit. Returns the largest difference.

    Updates are drawn anew each with `std`, or, with a `step`, moved by up to that from one to the next as in training.
    """
    ids = probe_sequences(AutoTokenizer.from_pretrained(policy.name_or_path))
    generator = torch.Generator().manual_seed(0)
    gaps, answers = [], []
    for number in range(SYNCS):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad and step and number:
                    parameter.add_(step * (2 * torch.rand(parameter.shape, generator=generator) - 1))
                elif parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        sync()
        answers.append(score(ids.tolist()))
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
        gaps.append(max_gap(answers[-1], reference_logprobs(policy, ids)))
    assert max(gaps) < 1e-4, gaps
    changes = [max_gap(a, b) for a, b in pairwise(answers)]
    assert min(changes) > (10 * max(gaps) if step else 1e-2), (changes, gaps)  # each update changed the engine
    return max(gaps)
