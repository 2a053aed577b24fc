r"""Arithmetic of a GRPO step at sizes that have not been run: the tables of docs/scale.md.

    python benchmarks/scale.py

Constants that were measured are marked as such in `Constants`; all else is shapes, bytes and assumptions that
docs/scale.md names. Nothing here measures anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fura_rl.adapter.basis import closest_block_size, fit_block_size


@dataclass(frozen=True)
class Shape:
    """A Llama-like model.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head, vocabulary: As in its configuration.
        tied: Whether embedding and head are one matrix.
        engine_gpus: GPUs of one engine (tensor parallelism), so that its weights take less than half of 80 GiB.
        shards: Over how many GPUs the trainer's base weights are split (FSDP2 inside a host); 1 is DDP.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    engine_gpus: int
    shards: int
    head: int = 128

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(out, in) of a layer's matrices."""
        query, kv = self.heads * self.head, self.kv_heads * self.head
        attention = [(query, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, query)]
        return [*attention, *[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)]

    @property
    def weights(self) -> int:
        """Parameters of the base, but for norms and biases."""
        embedding = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * sum(out * width for out, width in self.projections) + embedding

    @property
    def trained(self) -> int:
        """Parameters of a FuRA adapter on all linear layers: b (b + 1) for each block."""
        blocks = [(width, fit_block_size(closest_block_size(width), width, out)) for out, width in self.projections]
        return self.layers * sum(width * (b + 1) for width, b in blocks)

    @property
    def cache_bytes(self) -> int:
        """Of a token in the engine's cache."""
        return 2 * 2 * self.layers * self.kv_heads * self.head


SHAPES = {
    "Qwen3-1.7B": Shape(28, 2048, 6144, 16, 8, 151_936, True, 1, 1),
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 152_064, False, 1, 1),
    "Qwen2.5-14B": Shape(48, 5120, 13824, 40, 8, 152_064, False, 1, 8),
    "Qwen2.5-32B": Shape(64, 5120, 27648, 40, 8, 152_064, False, 2, 8),
    "Llama-3-70B": Shape(80, 8192, 28672, 64, 8, 128_256, False, 4, 8),
}


@dataclass(frozen=True)
class Constants:
    """What goes in. docs/performance.md and README.md hold the measured ones; the links' rates are data sheets'."""

    train_rate: float = 6 * 1.409426432e9 * 16_384 / 0.5879  # measured, H100: FLOP/s of a checkpointed FuRA step
    forward_rate: float = 4 * 1.409426432e9 * 16_384 / 0.4376  # measured, H100: FLOP/s without checkpointing
    copy_rate: float = 2.78e12  # measured, H100: bytes/s of a copy on the device
    product_rate: float = 781e12  # measured, H200: FLOP/s of a large bf16 product
    decode_overhead: float = 162.3 / 32 / 512 - 2 * 0.507e9 / 2.78e12  # measured, H100, 0.5B: s a token of a batch
    sync_in_place: float = 33e-6  # measured, H100: s a matrix, from the syncs of two models in the same process
    sync_by_name: float = 0.0684 / 196  # measured, H100: s a matrix through vLLM's loader, which sharded models need
    reward_seconds: float = 1.6 / 32 / 256  # measured: s a rollout, one host
    inside_host: float = 450e9  # bytes/s of NVLink 4, one direction
    between_hosts: float = 50e9  # bytes/s a GPU of a 400 Gb/s link


@dataclass(frozen=True)
class Work:
    """A step: 256 problems x 16 rollouts of 1,024 tokens on average and 2,048 at most, after 256 tokens of prompt."""

    rollouts: int = 256 * 16
    prompt: int = 256
    mean: int = 1024
    longest: int = 2048
    running: int = 256  # sequences that an engine samples at a time
    micro_batch: int = 16_384  # tokens


def predict(shape: Shape, gpus: int, work: Work | None = None, constants: Constants | None = None) -> dict[str, float]:
    """Seconds of a step by phase, colocated, on `gpus` GPUs of hosts with eight; `total` is their sum."""
    work, of = work or Work(), constants or Constants()
    p, tokens = shape.weights, work.rollouts * (work.prompt + work.mean) / gpus
    engines = gpus // shape.engine_gpus
    each = work.rollouts / engines
    running = min(work.running, each)
    steps = max(work.longest, each * work.mean / running)
    read = (2 * p + running * (work.prompt + work.mean) * shape.cache_bytes) / shape.engine_gpus / of.copy_rate
    multiply = 2 * p * running / shape.engine_gpus / of.product_rate
    gathers = 3 * math.ceil(tokens / work.micro_batch) if shape.shards > 1 else 0  # forward, backward, log-probs
    gather = 2 * p * (shape.shards - 1) / shape.shards / of.inside_host
    each_matrix = of.sync_by_name if shape.shards > 1 else of.sync_in_place
    passes = 3 * 2 * p / shape.engine_gpus / of.copy_rate
    phases = {
        "generate": steps * (of.decode_overhead + max(read, multiply)),
        "logprobs": 2 * p * tokens / of.forward_rate,
        "train": 6 * p * tokens / of.train_rate,
        "gather": gathers * gather,  # as if nothing overlapped
        "gradients": 2 * 4 * shape.trained * (gpus - 1) / gpus / of.between_hosts,
        "sync": 7 * shape.layers * each_matrix + passes + (gather if gathers else 0),
        "reward": work.rollouts * of.reward_seconds / math.ceil(gpus / 8),
    }
    return {**phases, "total": sum(phases.values())}


def bytes_table() -> list[str]:
    lines = ["| model | weights, G | trained, M | share | merged sync, GB | adapter sync, GB | at 50 GB/s, s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        merged, adapter = 2 * shape.weights / 1e9, 4 * shape.trained / 1e9
        lines.append(
            f"| {name} | {shape.weights / 1e9:.2f} | {shape.trained / 1e6:.0f} | {shape.trained / shape.weights:.2%} "
            f"| {merged:.1f} | {adapter:.2f} | {merged / 50:.2f} / {adapter / 50:.3f} |"
        )
    return lines


def step_table(gpu_counts: tuple[int, ...] = (8, 64, 256, 1024), price: float = 2.5) -> list[str]:
    names = ["generate", "logprobs", "train", "gather", "gradients", "sync", "reward", "total"]
    lines = ["| model | GPUs | " + " | ".join(names) + " | efficiency | GPU hours, 100 steps | at $2.50 |"]
    lines.append("|" + "---|" * (len(names) + 5))
    for name, shape in SHAPES.items():
        first = predict(shape, gpu_counts[0])["total"] * gpu_counts[0]
        for gpus in gpu_counts:
            phases = predict(shape, gpus)
            hours = phases["total"] * gpus * 100 / 3600
            cells = " | ".join(
                f"{phases[phase]:.1f}" if phase == "total" else f"{phases[phase]:.2f}" for phase in names
            )
            lines.append(
                f"| {name} | {gpus:,} | {cells} | {first / (phases['total'] * gpus):.2f} | {hours:,.0f} "
                f"| ${hours * price:,.0f} |"
            )
    return lines


def main() -> None:
    print("\n\n".join("\n".join(table) for table in (bytes_table(), step_table())))


if __name__ == "__main__":
    main()
