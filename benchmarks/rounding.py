r"""What of an adapter's update is left after rounding to bf16: of the input, `W (M x)`, or of the weight, `(W M) x`.

    python benchmarks/rounding.py MODEL --text train.jsonl [--sizes 1e-5 1e-4 1e-3 1e-2]

Entries of `M x` and of `W M` are bf16 numbers. Where the update changes one by less than half the distance to its
neighbour, it is lost. Each layer of the model's decoder gets an adapter whose core has entries of +size and -size, as
AdamW leaves them after `size / learning rate` steps in one direction, and the inputs that it has for `--lines` texts
(JSONL with `problem` and `solution`). With `y` the base layer's output and `y + dy` the exact one, both computed in
float64 from bf16 weights and inputs, and `z` that with a rounded product:

- `kept`: `<z - y, dy> / |dy|^2`, how much of the update is there;
- `error`: `|z - y - dy| / |dy|`;
- `output`: `|round(z) - y - dy| / |y + dy|`, when the output is rounded to bf16 too, as it always is.

Medians over layers. Table, then JSON on the last line. Runs on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.adapter.basis import block_basis, closest_block_size, fit_block_size

MEASURES = {"kept": ".3f", "error": ".3f", "output": ".2e"}
COLUMNS = [(measure, form) for measure in MEASURES for form in ("input", "weight")]


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16).double()


def measure(weight: torch.Tensor, x: torch.Tensor, size: float) -> dict[str, float]:
    """The measures for one layer: `weight` (out, in) and `x` (tokens, in) in float64, of values that bf16 has."""
    width = weight.shape[1]
    b = fit_block_size(closest_block_size(width), width, weight.shape[0])
    basis, _, _ = block_basis(weight.float(), b)
    core = size * torch.sign(torch.randn(width // b, b, b)).double()
    delta = torch.block_diag(*(basis.double() @ core))
    y = x @ weight.T
    dy = (x @ delta.T) @ weight.T
    delta = rounded(delta)
    forms = {"input": rounded(x + x @ delta.T) @ weight.T, "weight": x @ rounded(weight + weight @ delta).T}
    result = {}
    for form, z in forms.items():
        result[f"kept {form}"] = float(((z - y) * dy).sum() / dy.square().sum())
        result[f"error {form}"] = float((z - y - dy).norm() / dy.norm())
        result[f"output {form}"] = float((rounded(z) - y - dy).norm() / (y + dy).norm())
    return result


@torch.no_grad()
def inputs_of(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear layer of the decoder reads (tokens, in)."""
    inputs, hooks = {}, []
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            keep = lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(keep))
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint with layers like Llama's")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="at most")
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    rows = [json.loads(line) for line in args.text.read_bytes().splitlines()[: args.lines]]
    text = "\n".join(f"{row['problem']}\n{row['solution']}" for row in rows)
    ids = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt")["input_ids"][:, : args.tokens]
    inputs = inputs_of(model, ids)
    results = []
    for size in args.sizes:
        of_layers = [
            measure(model.model.layers.get_submodule(name).weight.double(), x.double(), size)
            for name, x in inputs.items()
        ]
        results.append(
            {key: statistics.median(each[key] for each in of_layers) for key in of_layers[0]} | {"size": size}
        )
    title = f"{Path(args.model).name}, {len(inputs)} layers, {ids.shape[1]} tokens"
    table = Table("entries of the core", *(f"{measure}: {form}" for measure, form in COLUMNS), title=title)
    for row in results:
        table.add_row(f"{row['size']:.0e}", *(format(row[f"{m} {form}"], MEASURES[m]) for m, form in COLUMNS))
    Console(width=120).print(table)
    print(json.dumps(dict(title=title, command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), rows=results)))


if __name__ == "__main__":
    with torch.no_grad():
        main()
