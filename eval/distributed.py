"""Sampling sharded over the ranks of a training job, each with its own engine."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fura_rl.errors import FuraError

from .sampling import OnSample, Request, Sample, Sampler


class ShardedSampler:
    """Splits requests over ranks; rank 0 evaluates, the other ranks serve.

        with ShardedSampler(VLLMSampler(llm), group_size=tensor_parallel_size) as sampler:
            if dist.get_rank() == 0:
                result = evaluate(sampler, ...)
            else:
                sampler.serve()

    Args:
        sampler: This rank's own.
        group_size: Consecutive ranks that form one engine (tensor parallelism) and sample the same share together.

    Raises:
        FuraError: A rank failed; its error is named.
    """

    def __init__(self, sampler: Sampler, group_size: int = 1) -> None:
        self.sampler = sampler
        self.group_size = group_size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def __enter__(self) -> ShardedSampler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.rank == 0:
            dist.broadcast_object_list([None], src=0)  # releases the ranks that serve, also after an error

    def sample(self, requests: list[Request], on_sample: OnSample | None = None) -> list[Sample]:
        """On rank 0: one sample for each request, in order. `on_sample` hears of a share when that share is done."""
        dist.broadcast_object_list([requests], src=0)
        samples: dict[int, Sample] = {}
        for indices, drawn in zip(self._shares(requests), self._draw_share(requests), strict=True):
            if isinstance(drawn, Exception):
                raise FuraError(f"Sampling failed on another rank: {type(drawn).__name__}: {drawn}") from drawn
            for index, sample in zip(indices, drawn, strict=True):
                samples[index] = sample
                if on_sample is not None:
                    on_sample(index, sample)
        return [samples[index] for index in range(len(requests))]

    def serve(self) -> None:
        """On the other ranks: samples this rank's share of every batch until rank 0 leaves its `with` block."""
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0)
            if message[0] is None:
                return
            self._draw_share(message[0])

    def _shares(self, requests: list[Request]) -> list[list[int]]:
        """Request indices by engine. Samples of one prompt stay together: they share its prefill."""
        shares: list[list[int]] = [[] for _ in range(self.world // self.group_size)]
        prompts = -1
        for index, request in enumerate(requests):
            if index == 0 or request.prompt_token_ids != requests[index - 1].prompt_token_ids:
                prompts += 1
            shares[prompts % len(shares)].append(index)
        return shares

    def _draw_share(self, requests: list[Request]) -> list[Any]:
        """Samples this rank's share; on rank 0 returns every engine's samples, or the exception in their place."""
        mine = self._shares(requests)[self.rank // self.group_size]
        drawn: list[Sample] | Exception
        try:
            drawn = self.sampler.sample([requests[index] for index in mine])
        except Exception as error:  # any failure must reach rank 0, which would wait for ever
            drawn = error
        gathered: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(drawn, gathered, dst=0)
        return [] if gathered is None else gathered[:: self.group_size]
