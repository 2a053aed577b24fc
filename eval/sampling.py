"""What is asked of a model: sampling settings, presets, requests and samples, and the protocol that samplers follow."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from fura_rl.errors import FuraError


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: 0 is greedy decoding.
        top_p: Nucleus probability; 1 keeps everything.
        top_k: Number of tokens kept; 0 keeps everything.
        max_tokens: Longest completion, in tokens.
        n: Samples a problem.
        seed: Every sample's own seed is derived from it, the benchmark, the problem and the sample's number.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 2048
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise FuraError(
                f"Sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 0, not temperature={self.temperature}, "
                f"top_p={self.top_p}, top_k={self.top_k}."
            )
        if self.max_tokens < 1 or self.n < 1:
            raise FuraError(f"Sampling needs max_tokens >= 1 and n >= 1, not {self.max_tokens} and {self.n}.")
        if self.temperature == 0 and self.n > 1:
            raise FuraError(f"Greedy decoding (temperature 0) gives {self.n} equal samples: use n=1 or a temperature.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """Sampling for every benchmark: `preset["math500"]`.

    Args:
        description: One line for `--help` and reports.
        default: For benchmarks that `special` does not name, and for a user's own files.
        special: By benchmark name.
        prompt: Name of the prompt template that belongs to the preset.
        from_model_card: Whether temperature, top_p and top_k in the model's generation_config.json take precedence.
    """

    description: str
    default: Sampling
    special: Mapping[str, Sampling] = field(default_factory=dict)
    prompt: str = "boxed"
    from_model_card: bool = False

    def __getitem__(self, benchmark: str) -> Sampling:
        return self.special.get(benchmark, self.default)


GREEDY = Sampling(temperature=0.0, max_tokens=2048)
AVG8 = Sampling(temperature=0.6, top_p=0.95, max_tokens=2048, n=8)
AVG32 = Sampling(temperature=0.6, top_p=0.95, max_tokens=2048, n=32)
LONG = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=32_768)
LONG_SMALL = Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=32_768, n=32)

PRESETS: dict[str, Preset] = {
    "paper": Preset(
        "arXiv 2605.22869: at most 2,048 tokens, greedy; AIME avg@8 at T=0.6, top_p=0.95",
        GREEDY,
        {"aime24": AVG8, "aime25": AVG8},
    ),
    "greedy": Preset("one greedy completion a problem, at most 2,048 tokens", GREEDY),
    "avg32": Preset("32 samples a problem at T=0.6, top_p=0.95, at most 2,048 tokens", AVG32),
    "long": Preset(
        "reasoning models: at most 32,768 tokens, the model card's sampling (else T=0.6, top_p=0.95, top_k=20); "
        "32 samples a problem on AIME and AMC",
        LONG,
        {"aime24": LONG_SMALL, "aime25": LONG_SMALL, "amc23": LONG_SMALL},
        prompt="qwen-boxed",
        from_model_card=True,
    ),
}


@dataclass(frozen=True)
class Request:
    """One completion to draw: `sampling.n` and `sampling.seed` are the caller's business, `seed` is this sample's."""

    prompt_token_ids: list[int]
    sampling: Sampling
    seed: int


@dataclass(frozen=True)
class Sample:
    """One completion. `token_ids` holds what was generated, the end-of-sequence token included."""

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]


OnSample = Callable[[int, Sample], None]


class Sampler(Protocol):
    """Draws completions from a model."""

    def sample(self, requests: list[Request], on_sample: OnSample | None = None) -> list[Sample]:
        """One sample for each request, in order.

        Args:
            requests: What to draw; settings may differ from request to request.
            on_sample: Called with (index, sample) as each one finishes, in any order, from the calling thread.
        """
        ...


def sample_seed(seed: int, benchmark: str, problem_id: str, index: int) -> int:
    """The seed of one sample, in [0, 2**31): independent of which other problems and benchmarks are run beside it."""
    digest = hashlib.sha256(f"{seed}\0{benchmark}\0{problem_id}\0{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
