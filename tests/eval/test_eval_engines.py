"""Samplers on real engines: transformers and vLLM draw the same greedy tokens, and seeds do what they promise."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fura_rl.errors import FuraError
from fura_rl.eval import Request, Sampling, TransformersSampler, VLLMSampler

GREEDY = Sampling(temperature=0.0, max_tokens=24)
TEXTS = ["What is 1 + 1?", "Hi", "A considerably longer prompt, so that padding has something to do.", "x"]


def requests_for(tokenizer, sampling, seeds=(0,)):
    return [Request(tokenizer(text)["input_ids"], sampling, seed) for text in TEXTS for seed in seeds]


def greedy_by_hand(model, prompt, count):
    """One forward pass a token, no cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids[len(prompt) :]


def test_greedy_equals_one_forward_pass_a_token(tiny):
    model, tokenizer = tiny
    requests = requests_for(tokenizer, GREEDY)
    samples = TransformersSampler(model, tokenizer, batch_size=3).sample(requests)
    for request, sample in zip(requests, samples, strict=True):
        assert sample.token_ids == greedy_by_hand(model, request.prompt_token_ids, 24)
        assert sample.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
        ended = sample.token_ids[-1] == tokenizer.eos_token_id
        assert sample.finish_reason == ("stop" if ended else "length")


def test_end_of_sequence_stops_a_row_but_not_its_batch(tiny):
    """A token from the middle of a completion is declared the end: rows stop there, each at its own length."""
    model, tokenizer = tiny
    plain = TransformersSampler(model, tokenizer, 4).sample(requests_for(tokenizer, GREEDY))
    longest = max(range(4), key=lambda i: len(plain[i].token_ids))
    end = plain[longest].token_ids[5]
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end]
    try:
        stopped = TransformersSampler(model, tokenizer, 4).sample(requests_for(tokenizer, GREEDY))
    finally:
        model.generation_config.eos_token_id = before
    for whole, cut in zip(plain, stopped, strict=True):
        ends = [i for i, token in enumerate(whole.token_ids) if token in (end, tokenizer.eos_token_id)]
        assert cut.token_ids == (whole.token_ids[: ends[0] + 1] if ends else whole.token_ids)
        assert cut.finish_reason == ("stop" if ends else "length")
    assert stopped[longest].finish_reason == "stop" and len(stopped[longest].token_ids) <= 6


def test_samples_do_not_depend_on_batch_size_or_company(tiny):
    model, tokenizer = tiny
    sampling = Sampling(temperature=1.0, top_p=0.9, top_k=40, max_tokens=12)
    requests = requests_for(tokenizer, sampling, seeds=(1, 2))
    alone = [TransformersSampler(model, tokenizer, 1).sample([request])[0] for request in requests]
    together = TransformersSampler(model, tokenizer, 8).sample(requests)
    backwards = TransformersSampler(model, tokenizer, 3).sample(requests[::-1])[::-1]
    assert alone == together == backwards
    assert together[0] != together[1]  # another seed


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 0.7, 0), (1.0, 1.0, 5)]
)
def test_first_tokens_follow_the_model_s_distribution(tiny, temperature, top_p, top_k):
    model, tokenizer = tiny
    prompt = tokenizer("What is 1 + 1?")["input_ids"]
    draws = 4000
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_tokens=1)
    requests = [Request(prompt, sampling, seed) for seed in range(draws)]
    samples = TransformersSampler(model, tokenizer, 500).sample(requests)
    counts = np.bincount([s.token_ids[0] for s in samples], minlength=model.config.vocab_size)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double()
    expected = expected_distribution(logits / temperature, top_p, top_k)
    assert counts[expected == 0].sum() == 0
    likely = expected > 5 / draws
    chi_squared = (((counts - draws * expected) ** 2)[likely] / (draws * expected)[likely]).sum()
    degrees = likely.sum() - 1
    assert chi_squared < degrees + 5 * np.sqrt(2 * degrees) + 5


def expected_distribution(logits, top_p, top_k):
    """Probabilities after top-k or the nucleus, written out."""
    p = torch.softmax(logits, -1).numpy()
    order = np.argsort(-p)
    keep = np.ones(len(p), dtype=bool)
    if top_k:
        keep[order[top_k:]] = False
    if top_p < 1:
        before = np.concatenate([[0.0], np.cumsum(p[order])[:-1]])
        keep[order[before >= top_p]] = False
    return np.where(keep, p, 0) / p[keep].sum()


def test_mixed_settings_in_one_call_and_progress(tiny):
    model, tokenizer = tiny
    heard = []
    requests = requests_for(tokenizer, GREEDY) + requests_for(tokenizer, Sampling(temperature=1.0, max_tokens=3))
    model.train()
    samples = TransformersSampler(model, tokenizer, 2).sample(requests, lambda i, s: heard.append((i, s)))
    assert model.training
    model.eval()
    assert sorted(i for i, _ in heard) == list(range(8))
    assert all(samples[i] == s for i, s in heard)
    assert [len(s.token_ids) for s in samples[4:]] == [3] * 4


@pytest.fixture(scope="module")
def llm(tiny_model):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from fura_rl.availability import vllm_problem
    from fura_rl.eval.models import EngineOptions, _vllm

    problem = vllm_problem()
    assert problem is None, problem
    return _vllm(str(tiny_model), EngineOptions(dtype="float32", context=256, eager=True))


@pytest.mark.vllm
def test_vllm_greedy_equals_transformers(tiny, llm):
    model, tokenizer = tiny
    requests = requests_for(tokenizer, GREEDY)
    ours, theirs = VLLMSampler(llm).sample(requests), TransformersSampler(model, tokenizer, 4).sample(requests)
    # Not the texts: a random model's bytes may end inside a character, which vLLM leaves out.
    assert [(s.token_ids, s.finish_reason) for s in ours] == [(s.token_ids, s.finish_reason) for s in theirs]


@pytest.mark.vllm
def test_vllm_seeds(tiny, llm):
    _, tokenizer = tiny
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=50, max_tokens=16)
    requests = requests_for(tokenizer, sampling, seeds=(1, 2, 3))
    sampler = VLLMSampler(llm)
    first = sampler.sample(requests)
    assert sampler.sample(requests) == first
    assert sampler.sample(requests[::-1])[::-1] == first
    assert len({tuple(s.token_ids) for s in first[:3]}) == 3


@pytest.mark.vllm
def test_vllm_seeded_prompts_that_do_not_fit_one_step(tiny, llm):
    """A prompt split over two steps and a seed kill vLLM 0.31 on a CPU; unseeded and greedy requests may be split."""
    config = llm.llm_engine.vllm_config.scheduler_config
    sampling = Sampling(temperature=1.0, max_tokens=3)
    count = 2 * config.max_num_batched_tokens // 200
    prompts = [[i % 256, *range(200)] for i in range(count)]
    requests = [Request(prompt, sampling, i) for i, prompt in enumerate(prompts)]
    together = VLLMSampler(llm).sample(requests)
    assert [VLLMSampler(llm).sample([request])[0] for request in requests[:3]] == together[:3]
    assert config.enable_chunked_prefill


@pytest.mark.vllm
def test_vllm_reports_samples_as_they_finish(tiny, llm):
    _, tokenizer = tiny
    prompt = tokenizer("What is 1 + 1?")["input_ids"]
    lengths = [24, 3, 12]
    heard = []
    requests = [Request(prompt, Sampling(max_tokens=n), 0) for n in lengths]
    samples = VLLMSampler(llm).sample(requests, lambda i, s: heard.append(i))
    assert [len(s.token_ids) for s in samples] == lengths
    assert heard == [1, 2, 0]


@pytest.mark.vllm
def test_vllm_is_idle_again_after_an_error(tiny, llm):
    _, tokenizer = tiny

    def fails(index, sample):
        raise RuntimeError("disk full")

    requests = requests_for(tokenizer, GREEDY, seeds=(0, 1))
    with pytest.raises(RuntimeError, match="disk full"):
        VLLMSampler(llm).sample(requests, fails)
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(VLLMSampler(llm).sample(requests)) == 8


@pytest.mark.vllm
def test_vllm_prompt_beyond_the_context(tiny, llm):
    with pytest.raises(FuraError, match="prompt of 300 tokens does not fit the engine's context of 256"):
        VLLMSampler(llm).sample([Request([5] * 300, GREEDY, 0)])


@pytest.mark.vllm
def test_vllm_does_no_more_steps_than_generate(tiny, llm):
    """Scheduling costs nothing: the engine takes as many steps as for a bare `llm.generate` of the same prompts."""
    from vllm import SamplingParams

    _, tokenizer = tiny
    requests = requests_for(tokenizer, GREEDY, seeds=tuple(range(4)))
    steps = []
    step = llm.llm_engine.step

    def counted():
        steps.append(1)
        return step()

    llm.llm_engine.step = counted
    try:
        VLLMSampler(llm).sample(requests)
        ours = len(steps)
        steps.clear()
        prompts = [{"prompt_token_ids": r.prompt_token_ids} for r in requests]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert ours == len(steps)
    finally:
        llm.llm_engine.step = step


@pytest.mark.slow
@pytest.mark.vllm
def test_an_engine_in_a_process_of_its_own_ends_with_the_evaluation(tiny_model, tmp_path):
    """As on a GPU: once the sampler is closed, no process is left for Python to wait for at its exit."""
    script = tmp_path / "sample.py"
    script.write_text(
        f"""
import multiprocessing
from pathlib import Path
from fura_rl.eval import Request, Sampling
from fura_rl.eval.models import EngineOptions, load_tokenizer, open_sampler

if __name__ == "__main__":
    tokenizer = load_tokenizer({str(tiny_model)!r})
    options = EngineOptions(engine="vllm", context=64)
    with open_sampler({str(tiny_model)!r}, None, tokenizer, options, Path({str(tmp_path)!r})) as (sampler, _):
        samples = sampler.sample([Request(tokenizer("1+1=")["input_ids"], Sampling(temperature=0.0, max_tokens=4), 0)])
        engines = multiprocessing.active_children()
        print(len(engines), len(samples[0].token_ids))
    for engine in engines:  # vLLM kills one that takes longer than 5 s to end, and does not wait for that
        engine.join(30)
    print(len(multiprocessing.active_children()))
"""
    )
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    (during, tokens), (after,) = [[int(word) for word in line.split()] for line in run.stdout.splitlines()[-2:]]
    assert during >= 1 and tokens >= 1
    assert after == 0
