"""Samplers over a live vLLM engine and over a transformers model. Both engines are imported only when used."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fura_rl.errors import FuraError

from .sampling import OnSample, Request, Sample, Sampling

if TYPE_CHECKING:
    import torch


class VLLMSampler:
    """Samples from a live `vllm.LLM`, a trainer's colocated engine included; all requests go in as one batch.

    Args:
        llm: The engine. It must be idle: nothing else may be queued while `sample` runs.
        tokenizer: Kept for callers that render prompts; the engine detokenises by itself.
    """

    def __init__(self, llm: Any, tokenizer: Any = None) -> None:
        self.llm = llm
        self.tokenizer = tokenizer

    def sample(self, requests: list[Request], on_sample: OnSample | None = None) -> list[Sample]:
        """One sample for each request, in order; see `Sampler`.

        Raises:
            FuraError: A prompt does not fit the engine's context.
        """
        self._check_lengths(requests)
        engine = self.llm.llm_engine
        # Own ids instead of LLM.generate's counter: outputs are handed on as they finish, and an interrupted call can
        # take its requests back out of an engine that a trainer goes on using.
        batch = uuid.uuid4().hex[:8]
        index_of = {f"eval-{batch}-{index}": index for index in range(len(requests))}
        samples: dict[int, Sample] = {}
        with _prompts_kept_whole(engine) if self._splitting_is_fatal(requests) else nullcontext():
            try:
                for request_id, index in index_of.items():
                    request = requests[index]
                    # As vLLM's own renderer gives it: the engine takes it as it is.
                    prompt = {"type": "token", "prompt_token_ids": request.prompt_token_ids}
                    engine.add_request(request_id, prompt, _vllm_params(request))
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished and output.request_id in index_of:
                            index = index_of[output.request_id]
                            samples[index] = _vllm_sample(output.outputs[0])
                            if on_sample is not None:
                                on_sample(index, samples[index])
            except BaseException:
                engine.abort_request([request_id for request_id, index in index_of.items() if index not in samples])
                raise
        return [samples[index] for index in range(len(requests))]

    def _splitting_is_fatal(self, requests: list[Request]) -> bool:
        """Whether these requests are seeded and the engine runs on a CPU: see `_prompts_kept_whole`."""
        on_cpu = self.llm.llm_engine.vllm_config.device_config.device_type == "cpu"
        return on_cpu and any(request.sampling.temperature > 0 for request in requests)

    def _check_lengths(self, requests: list[Request]) -> None:
        config = self.llm.llm_engine.vllm_config
        limit = config.model_config.max_model_len
        if self._splitting_is_fatal(requests):
            limit = min(limit, config.scheduler_config.max_num_batched_tokens + 1)
        longest = max((len(request.prompt_token_ids) for request in requests), default=0)
        if longest >= limit:
            raise FuraError(f"A prompt of {longest} tokens does not fit the engine's context of {limit} tokens.")


@contextmanager
def _prompts_kept_whole(engine: Any) -> Iterator[None]:
    """Turns chunked prefill off for a while.

    vLLM samples a token after each part of a split prompt, drops it, and rewinds the generator of a seeded request. A
    CPU's generator cannot be rewound: the engine dies with "CPU Generator does not use offset" (vLLM 0.31). The setting
    is read at each step by a scheduler in this process, which is where CPU engines have theirs.
    """
    config = engine.vllm_config.scheduler_config
    before, config.enable_chunked_prefill = config.enable_chunked_prefill, False
    try:
        yield
    finally:
        config.enable_chunked_prefill = before


def _vllm_params(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        # A seed makes the engine keep a generator for the request: useless, and slower, for greedy decoding.
        seed=request.seed if sampling.temperature > 0 else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _vllm_sample(output: Any) -> Sample:
    if output.finish_reason not in ("stop", "length"):
        raise FuraError(f"The engine ended a completion with {output.finish_reason!r} instead of finishing it.")
    return Sample(list(output.token_ids), output.text, output.finish_reason)


class TransformersSampler:
    """Samples from a transformers model in left-padded batches of like lengths: slow, but runs wherever torch does.

    Each sample has its own generator, so its randomness does not depend on the batch it shares.

    Args:
        model: A causal language model; it is put into eval mode while sampling.
        tokenizer: Detokenises, and names the padding and end-of-sequence tokens.
        batch_size: Sequences generated together.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size

    def sample(self, requests: list[Request], on_sample: OnSample | None = None) -> list[Sample]:
        """One sample for each request, in order; see `Sampler`."""
        samples: dict[int, Sample] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches(requests):
                for index, sample in zip(batch, self._generate([requests[i] for i in batch]), strict=True):
                    samples[index] = sample
                    if on_sample is not None:
                        on_sample(index, sample)
        finally:
            self.model.train(was_training)
        return [samples[index] for index in range(len(requests))]

    def _batches(self, requests: list[Request]) -> Iterable[list[int]]:
        """Indices of requests that may run together: equal settings, like prompt lengths."""
        by_settings: dict[tuple[float, float, int, int], list[int]] = {}
        for index, request in enumerate(requests):
            s = request.sampling
            by_settings.setdefault((s.temperature, s.top_p, s.top_k, s.max_tokens), []).append(index)
        for indices in by_settings.values():
            indices.sort(key=lambda i: len(requests[i].prompt_token_ids))
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _generate(self, requests: list[Request]) -> list[Sample]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList

        ends = self._end_ids()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else next(iter(ends), 0)
        width = max(len(request.prompt_token_ids) for request in requests)
        rows = [[pad] * (width - len(r.prompt_token_ids)) + r.prompt_token_ids for r in requests]
        mask = [[0] * (width - len(r.prompt_token_ids)) + [1] * len(r.prompt_token_ids) for r in requests]
        device = self.model.device
        sampling = requests[0].sampling
        # A fresh configuration: the model's own may carry sampling settings and penalties that nobody asked for here.
        config = GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_tokens, pad_token_id=pad, eos_token_id=sorted(ends) or None
        )
        with torch.no_grad():
            output = self.model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=config,
                logits_processor=LogitsProcessorList(_processors(requests, device)),
            )
        return [self._to_sample(row[width:].tolist(), ends) for row in output]

    def _end_ids(self) -> set[int]:
        declared = self.model.generation_config.eos_token_id
        ids = declared if isinstance(declared, list) else [declared]
        return {i for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    def _to_sample(self, ids: list[int], ends: set[int]) -> Sample:
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Sample(kept, text, "length" if end is None else "stop")


def _processors(requests: list[Request], device: torch.device) -> list[Any]:
    """Temperature, top-k and top-p, then Gumbel noise: the largest noisy logit is a sample of the softmax."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    sampling: Sampling = requests[0].sampling
    if sampling.temperature == 0:
        return []
    processors: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return [*processors, _SeededGumbel([request.seed for request in requests], device)]


class _SeededGumbel:
    """Adds Gumbel(0, 1) noise to the scores, one generator a row."""

    def __init__(self, seeds: list[int], device: torch.device) -> None:
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, T), (B, V) -> (B, V)
        import torch

        noise = torch.empty(scores.shape, device=scores.device, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()
