"""A few fixed sequences that trainer and engine both score after a sync: the same weights give the same log-probs."""

from __future__ import annotations

from typing import Any

import torch

SEQUENCES = 4
LENGTH = 32  # tokens of each

# Prose, sums, code and symbols: about 1,000 characters, so that any tokenizer makes enough tokens of them.
TEXT = """\
Let me think step by step. A baker sells 12 loaves in the morning and three times as many in the afternoon; each loaf
costs 4 dollars, so the day brings (12 + 36) * 4 = 192 dollars. Therefore the answer is \\boxed{192}.
Let $f(x) = x^2 - 5x + 6$. Since $f(x) = (x - 2)(x - 3)$, its roots are 2 and 3, and $f$ is negative exactly for
$2 < x < 3$. The sum of the first n odd numbers, 1 + 3 + 5 + ... + (2n - 1), is $n^2$; for n = 7 this makes 49.
def gcd(a, b):
    while b:
        a, b = b, a % b
    return abs(a)
The river rises in the hills above the old town, turns twice before the stone bridge, and reaches the sea a day later.
If 3/4 of a number is 27, the number is 27 / 0.75 = 36, and a third of it is 12. Check: 12 + 12 + 12 = 36. In a group of
25 people, at least two share a birthday with a probability above one half: 1 - (365/365)(364/365)... > 0.5.
"""


def probe_sequences(tokenizer: Any, *, count: int = SEQUENCES, length: int = LENGTH) -> torch.Tensor:
    """Token ids (count, length) of fixed text, the same in every run with this tokenizer."""
    ids = tokenizer(TEXT, add_special_tokens=False, verbose=False).input_ids
    ids = ids * -(-count * length // len(ids))
    return torch.tensor(ids[: count * length]).view(count, length)


def next_token_logprobs(logits_btv: torch.Tensor, ids_bt: torch.Tensor) -> torch.Tensor:
    """Log-probs (natural, float32) of the tokens after the first of each sequence, (B, T - 1)."""
    logits = logits_btv[:, :-1].float()
    chosen = logits.gather(-1, ids_bt[:, 1:].unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def score_in_process(llm: Any, sequences: list[list[int]]) -> list[list[float]]:
    """What a `vllm.LLM` of this process thinks of the tokens after the first of each sequence, in one batch."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in sequences],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),  # greedy: draws no random number
        use_tqdm=False,
    )
    return [
        [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(sequences, outputs, strict=True)
    ]


def score_on_server(client: Any, sequences: list[list[int]]) -> list[list[float]]:
    """The same of a server, in one request of TRL's `VLLMClient` or ours."""
    body = {"model": client.model, "prompt": sequences, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    choices = client._post(f"{client.base_url}/v1/completions", json=body)["choices"]
    return [
        [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)]
        for ids, choice in zip(sequences, choices, strict=True)
    ]
