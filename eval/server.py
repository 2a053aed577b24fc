"""A sampler over an OpenAI-compatible completions server, for example `vllm serve`."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx

from fura_rl.errors import FuraError

from .sampling import OnSample, Request, Sample

RETRIED = (408, 429, 500, 502, 503, 504)


class ServerSampler:
    """Samples through `POST <url>/v1/completions` with prompts as token ids, many requests at a time.

    Args:
        url: The server's address, with or without `/v1`.
        model: Name under which it serves the model; by default the only one it has.
        tokenizer: Counts tokens for servers that do not return token ids (vLLM does).
        api_key: By default the environment's OPENAI_API_KEY.
        concurrency: Requests in flight.
        timeout: Seconds to wait for one completion.
        retries: Further tries after a lost connection or a busy server, with growing pauses.

    Raises:
        FuraError: The server cannot be reached, does not have the model, or refuses a request.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        tokenizer: Any = None,
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float = 3600.0,
        retries: int = 4,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.tokenizer = tokenizer
        self.concurrency = concurrency
        self.retries = retries
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout, connect=10.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self.model = self._served(model)

    def _served(self, model: str | None) -> str:
        names = [entry["id"] for entry in self._call("GET", "/models")["data"]]
        if model is None and len(names) == 1:
            return names[0]
        if model is None or model not in names:
            asked = f"does not serve {model!r}" if model else "serves several models: name one of them"
            raise FuraError(f"The server at {self.url} {asked} (it has {', '.join(names) or 'none'}).")
        return model

    def sample(self, requests: list[Request], on_sample: OnSample | None = None) -> list[Sample]:
        """One sample for each request, in order; see `Sampler`."""
        samples: dict[int, Sample] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        futures = {pool.submit(self._draw, request): index for index, request in enumerate(requests)}
        try:
            for future in as_completed(futures):
                index = futures[future]
                samples[index] = future.result()
                if on_sample is not None:
                    on_sample(index, samples[index])
        finally:
            # After an error nothing more is asked for; what is in flight may end unheard.
            pool.shutdown(wait=len(samples) == len(requests), cancel_futures=True)
        return [samples[index] for index in range(len(requests))]

    def _draw(self, request: Request) -> Sample:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request.prompt_token_ids,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": request.seed,
            "return_token_ids": True,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        choice = self._call("POST", "/completions", body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise FuraError(f"The server ended a completion with {choice['finish_reason']!r} instead of finishing it.")
        return Sample(self._token_ids(choice), choice["text"], choice["finish_reason"])

    def _token_ids(self, choice: dict[str, Any]) -> list[int]:
        if choice.get("token_ids") is not None:
            return choice["token_ids"]
        if self.tokenizer is None:
            raise FuraError(f"The server at {self.url} returns no token ids: give ServerSampler a tokenizer.")
        return list(self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"])

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                response = self._client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                if last:
                    reason = str(error) or type(error).__name__
                    raise FuraError(f"The server at {self.url} cannot be reached: {reason}.") from error
            else:
                if response.is_success:
                    return response.json()
                if last or response.status_code not in RETRIED:
                    text = " ".join(response.text.split())[:300]
                    raise FuraError(f"The server at {self.url} answered {response.status_code} to {path}: {text}")
            time.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._client.close()
