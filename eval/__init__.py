"""Evaluation that can be trusted: the prompt and verifier of training, intervals, and every completion kept."""

from .benchmarks import SPECS, Benchmark, Problem, load_benchmark
from .engines import TransformersSampler, VLLMSampler
from .evaluation import Evaluation, evaluate
from .sampling import PRESETS, Preset, Request, Sample, Sampler, Sampling
from .scoring import Estimate, Score

__all__ = [
    "PRESETS",
    "SPECS",
    "Benchmark",
    "Estimate",
    "Evaluation",
    "Preset",
    "Problem",
    "Request",
    "Sample",
    "Sampler",
    "Sampling",
    "Score",
    "TransformersSampler",
    "VLLMSampler",
    "evaluate",
    "load_benchmark",
]
