r"""What to quantise under FuRA: the weight `W`, as here, or the orthonormal factor `L` of its blocks, as published.

    python benchmarks/quantized_basis.py MODEL [MODEL ...] [--text gsm8k_test.jsonl]

`W` (out, in) has column blocks `W_j = U_j diag(sigma_j) V_j^T` of width b. This project stores `NF4(W)` and trains
`W' = NF4(W) M`; the published variant stores `NF4(L)`, `L = [U_1 ... U_n]`, and trains `W' = NF4(L) diag(s) R`. At
the start of training `M = I`, `s = sigma`, `R = V^T`, and both should be `W`. Printed for each model, over all linear
layers of its decoder (median, and the worst layer): the relative error `|W' - W| / |W|` (Frobenius) of both; and the
error that remains if the small factor is not taken from `W` but fitted to it by least squares, which either form
allows. With `--text` (JSONL with `problem` and `solution`), the mean loss of a token of `--lines` texts with the
weights of each.

NF4 with blocks of 64 along rows and double quantisation (bitsandbytes), float32 otherwise; runs on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.adapter.basis import block_basis, closest_block_size, fit_block_size

FORMS = {
    "weight": "NF4(W)",
    "factor": "NF4(L) diag(sigma) V^T",
    "weight_fitted": "NF4(W) M, M fitted",
    "factor_fitted": "NF4(L) C, C fitted",
}


def nf4(tensor: torch.Tensor) -> torch.Tensor:
    """What is left of a tensor after NF4 with double quantisation, in float32."""
    stored = bnb.functional.quantize_4bit(tensor.float().contiguous(), quant_type="nf4", compress_statistics=True)
    return bnb.functional.dequantize_4bit(*stored).float()


def blocks_of(weight: torch.Tensor, b: int) -> torch.Tensor:
    """Column blocks (n, out, b) of `weight` (out, in)."""
    return weight.view(weight.shape[0], -1, b).transpose(0, 1)


def joined(blocks: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) of column blocks (n, out, b)."""
    return blocks.transpose(0, 1).reshape(blocks.shape[1], -1)


def quantised_forms(weight: torch.Tensor, b: int) -> dict[str, torch.Tensor]:
    """The weight (out, in) at the start of training in each form of `FORMS`.

    Args:
        weight: (out, in).
        b: Block size, a divisor of `in`.
    """
    weight = weight.float()
    basis, sigma, _ = block_basis(weight, b)
    basis, sigma = basis.float(), sigma.float()
    left = joined(blocks_of(weight, b) @ (basis / sigma.unsqueeze(-2)))  # U = W V / sigma
    core = sigma.unsqueeze(-1) * basis.mT  # diag(sigma) V^T
    stored = {"weight": nf4(weight), "factor": nf4(left)}
    forms = {"weight": stored["weight"], "factor": joined(blocks_of(stored["factor"], b) @ core)}
    for name, tensor in stored.items():
        blocks = blocks_of(tensor, b)
        fitted = torch.linalg.lstsq(blocks, blocks_of(weight, b)).solution
        forms[f"{name}_fitted"] = joined(blocks @ fitted)
    return forms


@torch.no_grad()
def mean_loss(model: nn.Module, tokenizer, texts: list[str]) -> float:
    """Mean loss of a token."""
    total = count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@torch.no_grad()
def compare(name: str, texts: list[str]) -> dict:
    """Errors of all layers by form, and the losses if there are texts."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    layers = {key: module for key, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    models = {form: copy.deepcopy(model) for form in FORMS} if texts else {}
    errors: dict[str, list[float]] = {form: [] for form in FORMS}
    for key, layer in layers.items():
        out, width = layer.weight.shape
        forms = quantised_forms(layer.weight, fit_block_size(closest_block_size(width), width, out))
        for form, weight in forms.items():
            errors[form].append(float((weight - layer.weight).norm() / layer.weight.norm()))
            if texts:
                models[form].model.layers.get_submodule(key).weight.copy_(weight)
    losses = {}
    if texts:
        tokenizer = AutoTokenizer.from_pretrained(name)
        losses = {form: mean_loss(changed, tokenizer, texts) for form, changed in {"none": model, **models}.items()}
    return {"model": Path(name).name, "layers": len(layers), "errors": errors, "losses": losses}


def table(result: dict) -> Table:
    losses = result["losses"]
    before = f"; loss without quantisation {losses['none']:.4f}" if losses else ""
    table = Table(title=f"{result['model']}, {result['layers']} layers{before}", title_justify="left")
    for column in ("W' at the start", "median error", "worst", "lower than NF4(W)'s in", "loss"):
        table.add_column(column, justify="left" if column.startswith("W'") else "right")
    for form, label in FORMS.items():
        errors = result["errors"][form]
        better = sum(error < other for error, other in zip(errors, result["errors"]["weight"], strict=True))
        loss = f"{losses[form]:.4f}" if losses else "-"
        table.add_row(label, f"{statistics.median(errors):.4f}", f"{max(errors):.4f}", f"{better} layers", loss)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--lines", type=int, default=32)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.text.read_bytes().splitlines()[: args.lines]] if args.text else []
    texts = [f"{row['problem']}\n{row['solution']}" for row in rows]
    results = []
    for name in args.models:
        results.append(compare(name, texts))
        Console(width=120).print(table(results[-1]))
    print(json.dumps(dict(command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), results=results)))


if __name__ == "__main__":
    main()
