"""What a push to a server carries, and where the time of a push and of a swap goes.

    python benchmarks/push.py [--shape qwen3-1.7b qwen2.5-0.5b]      bytes: needs no GPU, no vLLM and no weights
    python benchmarks/push.py --model DIR [--rounds 5]               seconds by phase, of a real server

`first` is the whole adapter with its basis; `exact` what is trained, in float32; `int8` its change after a step in
which each number moves by up to a learning rate of 1e-4. Shares are of the merged weights in bfloat16, which transport
`merged` sends.

With `--model`, a policy of this process and `fura-rl serve` share the device. Phases of a push: what is trained is
collected from the device and packed, sent, and on the server read, copied to its device, checked and made into `D`;
then requests in flight are waited for and weights are merged. Of a swap: an adapter saved in full is read instead.
"to the engine and back" is what the server's process needs to hand bytes to the engine's; checksums are computed beside
the rest, so their phases are what is left to wait for. Medians in milliseconds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.adapter import save_adapter
from fura_rl.adapter.basis import closest_block_size
from fura_rl.rollout.change import LARGEST_ERROR
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
    parser.add_argument("--model", help="a checkpoint, for the seconds")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--keep", default="device", help="where the server keeps base weights")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
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
