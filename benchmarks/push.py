"""What a push to a server carries, and where the time of a push and of a swap goes.

    python benchmarks/push.py [--shape qwen3-1.7b qwen2.5-0.5b]      bytes: needs no GPU, no vLLM and no weights
    python benchmarks/push.py --model DIR [--rounds 5]               seconds by phase, of a real server
    python benchmarks/push.py --model DIR --gap TEXTS.jsonl          what int8 does to log-probs; needs no vLLM

`first` is the whole adapter with its basis; `exact` what is trained, in float32; `int8` its change after a step in
which each number moves by up to a learning rate of 1e-4. Shares are of the merged weights in bfloat16, which transport
`merged` sends.

With `--model`, a policy of this process and `fura-rl serve` share the device. Phases of a push: what is trained is
collected from the device and packed, sent, and on the server read, copied to its device, checked and made into `D`;
then requests in flight are waited for and weights are merged. Of a swap: an adapter saved in full is read instead.
"to the engine and back" is what the server's process needs to hand bytes to the engine's; checksums are computed beside
the rest, so their phases are what is left to wait for. Medians in milliseconds.

With `--gap`, an adapter is trained for 8 steps of AdamW on 40 of the file's texts, 64 tokens each. After each step its
change goes as int8 to a copy; in the end the adapter, exact or as the copy has it, is merged in float32 and rounded to
the engine's dtype, and log-probs on 12 other texts are compared with those of the adapter itself. Last comes JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.adapter import FuraLayer, save_adapter
from fura_rl.adapter.basis import closest_block_size
from fura_rl.rollout.change import LARGEST_ERROR
from fura_rl.rollout.merged import checkpoint_name
from fura_rl.rollout.payload import Adapter, pack_update

SHAPES: dict[str, PretrainedConfig] = {
    "qwen3-1.7b": Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip
FAMILY = {"side": "input", "singular_values": "trainable", "basis": "svd"}


def sizes(config: PretrainedConfig) -> dict[str, int]:
    """Bytes of the merged weights, of the first push, and of later ones in either form."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    modules = {}
    for name, module in linear.items():
        b = closest_block_size(module.in_features)
        n = module.in_features // b
        modules[name] = {"core": torch.zeros(n, b, b), "scale": torch.zeros(n, b)}
    held = Adapter(FAMILY, modules)
    generator = torch.Generator().manual_seed(0)
    step = held.with_trained(1e-4 * (2 * torch.rand(held.trained.shape, generator=generator) - 1))
    pushes = {
        form: pack_update(step, held, error)[1] for form, error in (("exact", 0.0), ("int8", LARGEST_ERROR["bfloat16"]))
    }
    return {
        "merged": sum(p.nbytes for p in model.parameters()),
        "first": 2 * held.trained.nbytes,  # basis and singular values have the shapes of core and scale
        **{form: len(data) for form, data in pushes.items()},
    }


def measure(path: str, dtype: str, keep: str, rounds: int) -> dict[str, Any]:
    """Seconds of pushes and of swaps, by phase."""
    from sync_checks import move, policy_logprobs
    from sync_server import SyncServer
    from transformers import AutoTokenizer

    from fura_rl.rollout.probe import probe_sequences

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server = SyncServer(path, folder / "log", dtype, "--adapter-dir", temporary, "--keep", keep)
        with server:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
            model = get_peft_model(base, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
            saved = [save_adapter(move(model, 0.01), folder / name) for name in "ab"]
            ids_bt = probe_sequences(AutoTokenizer.from_pretrained(path))
            push = server.measure(model, ids_bt, policy_logprobs, rounds)
            return {"push": push, "swap": server.measure_swaps(saved, rounds)}


def measure_gap(
    path: str, texts: Path, rates: tuple[float, ...] = (1e-4, 1e-3), steps: int = 8
) -> list[dict[str, Any]]:
    """|log-prob difference| in nats between an adapter and its merged weights, exact and after int8 updates."""
    from transformers import AutoTokenizer

    from fura_rl.rollout import merged_weights
    from fura_rl.rollout.probe import next_token_logprobs
    from fura_rl.rollout.transport import adapter_of

    tokenizer = AutoTokenizer.from_pretrained(path)
    lines = [json.loads(line) for line in texts.read_bytes().splitlines()[:52]]
    tokens = [tokenizer(" ".join(map(str, line.values()))).input_ids for line in lines]
    ids = torch.stack([torch.tensor((row * 64)[:64]) for row in tokens])
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(base, FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]

    def collect() -> Adapter:
        return adapter_of(model, lambda parameters: nullcontext())

    @torch.no_grad()
    def logprobs(of: Any) -> torch.Tensor:
        return next_token_logprobs(of(input_ids=ids[40:]).logits, ids[40:])

    @torch.no_grad()
    def merge(dtype: torch.dtype) -> torch.Tensor:
        weights = merged.state_dict()
        for name, tensor in merged_weights(model):
            weights[name].copy_(tensor.to(dtype))
        return logprobs(merged)

    rows = []
    for rate in rates:
        with torch.no_grad():
            for parameter in trained:
                parameter.zero_()
        held, optimizer = collect(), torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        for step in range(steps):
            batch = ids[5 * step : 5 * step + 5]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            held, _ = pack_update(collect(), held, LARGEST_ERROR["bfloat16"])
        error, expected = held.trained - collect().trained, logprobs(model)
        for form in ("exact", "int8"):
            if form == "int8":
                load(model, held)
            for dtype in (torch.float32, torch.bfloat16):
                far = (merge(dtype) - expected).abs()
                gap = {"mean": float(far.mean()), "largest": float(far.max()), "tokens": far.numel()}
                rows.append({"rate": rate, "form": form, "engine": str(dtype), **gap})
                print(f"{rate:g} {form:>5} {dtype}: mean {gap['mean']:.2e}, largest {gap['largest']:.2e}", flush=True)
        print(f"{rate:g} error of a number: rms {error.square().mean().sqrt():.2e}, largest {error.abs().max():.2e}")
    return rows


@torch.no_grad()
def load(model: Any, adapter: Adapter) -> None:
    """Puts an adapter's trained tensors into the model that it came from."""
    for name, layer in model.named_modules():
        if isinstance(layer, FuraLayer):
            (blocks,) = layer.named_blocks(None)
            for key, parameter in blocks.named_parameters():
                parameter.copy_(adapter.modules[checkpoint_name(name)][key])


def print_phases(found: dict[str, Any]) -> None:
    for what, row in found.items():
        table = Table(
            what, "ms", title=f"{what}: {1000 * row['seconds']:.1f} ms, the first {row['first_seconds']:.2f} s"
        )
        for phase, seconds in row["phases"].items():
            table.add_row(phase, f"{1000 * seconds:.1f}")
        Console(width=120).print(table)
    print(f"bytes of a push {found['push']['bytes']:,}; mean gap of log-probs {found['push']['gap']:.2e} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--model", help="a checkpoint, for the seconds or the gap")
    parser.add_argument("--gap", type=Path, help="texts, one JSON object a line")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--keep", default="device", help="where the server keeps base weights")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.gap:
        print(json.dumps(measure_gap(arguments.model, arguments.gap)))
        return
    if arguments.model:
        phases = measure(arguments.model, arguments.dtype, arguments.keep, arguments.rounds)
        print_phases(phases)
        print(json.dumps(phases))
        return
    found = {shape: sizes(SHAPES[shape]) for shape in arguments.shape}
    table = Table("shape", "merged, bytes", *(f"{what}, bytes (share)" for what in ("first", "exact", "int8")))
    for shape, row in found.items():
        shares = [f"{row[what]:,} ({row[what] / row['merged']:.2%})" for what in ("first", "exact", "int8")]
        table.add_row(shape, f"{row['merged']:,}", *shares)
    Console(width=120).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
