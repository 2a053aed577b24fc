r"""What becomes of a training step in bf16: the published factors against float32 differences.

    python benchmarks/precision.py --model PATH --train train.jsonl --test test.jsonl [--rates 9e-5 1e-3] [--steps 100]
        [--forms published fura ...]

The published code keeps the trained core `R` and the singular values in bf16, without float32 copies. A step of AdamW
is about as large as the learning rate, and an entry of size x moves only if the step exceeds half the distance of its
neighbours in bf16, about `2^-9 x`. Forms of the same adapter, fine-tuned on solutions (JSONL with `problem` and
`solution`) in the same order under bf16 autocast:

- `published`: `W = L S R`, all in bf16, as published;
- `published, float32 R and s`: the same, with trained factors in float32;
- `fura`: this project, float32 differences beside the untouched bf16 base;
- `fura, inputs`: the same, with no weight multiplied by `M` and rounded in the forward pass. On a GPU `fura` does that
  in layers whose input has many more tokens than their weight has rows; on a CPU the two are one.

`moved` is the share of the core's entries that differ from their start at the end, `update` the mean relative norm of a
layer's update, `start` and `end` the loss of a token of held-out solutions. Table, then JSON on the last line.
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

import solutions
import step_methods
import torch
from rich.console import Console
from rich.table import Table
from solutions import held_out_loss, read
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.adapter import FuraConfig, FuraLayer, multiplied_weight

COLUMNS = {"rate": ".0e", "moved": ".1%", "update": ".2e", "start": ".4f", "end": ".4f"}
FORMS = ("published", "published, float32 R and s", "fura", "fura, inputs")


def build(base: nn.Module, form: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """The form on a copy of the model, and its cores."""
    model = copy.deepcopy(base)
    multiplied_weight.choice = "inputs" if form == "fura, inputs" else "auto"
    if form.startswith("fura"):
        model = step_methods.with_adapter(FuraConfig())(model)
        return model, [m.fura_blocks["default"].core for m in model.modules() if isinstance(m, FuraLayer)]
    step_methods.published(model.model)
    layers = [m for m in model.modules() if isinstance(m, step_methods.PublishedFura)]
    model.requires_grad_(False)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.requires_grad_()
            if form != "published":
                parameter.data = parameter.data.float()
    return model, [layer.core for layer in layers]


@torch.no_grad()
def dense(model: nn.Module) -> list[torch.Tensor]:
    """The weight of each adapted layer with its update, in float32."""
    weights = []
    for module in model.modules():
        if isinstance(module, FuraLayer):
            weights.append(module.merged_weight())
        elif isinstance(module, step_methods.PublishedFura):
            n, b, _ = module.core.shape
            left = (module.left.float() * module.s.float()).view(-1, n, b).transpose(0, 1)
            weights.append((left @ module.core.float()).transpose(0, 1).reshape(module.left.shape))
    return weights


def fine_tune(base: nn.Module, form: str, rate: float, data: tuple, args: argparse.Namespace) -> dict:
    train, test = data
    torch.manual_seed(args.seed)
    model, cores = build(base, form)
    model.train()
    cores_before, before = [core.detach().clone() for core in cores], dense(model)
    start = held_out_loss(model, test, args.batch)
    solutions.fine_tune(model, train, lambda step: rate, steps=args.steps, batch=args.batch, seed=args.seed)
    moved = sum(int((core != old).sum()) for core, old in zip(cores, cores_before, strict=True))
    update = statistics.fmean(
        float((new - old).norm() / old.norm()) for new, old in zip(dense(model), before, strict=True)
    )
    end = held_out_loss(model, test, args.batch)
    share = moved / sum(core.numel() for core in cores)
    result = dict(form=form, rate=rate, moved=share, update=update, start=start, end=end)
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint with layers like Llama's, without biases")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[9e-5, 1e-3], help="9e-5 is the published one")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=int, default=192, help="longest example, in tokens")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS[:3], metavar="FORM", help=", ".join(FORMS))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    data = read(args.train, tokenizer, None, args.limit), read(args.test, tokenizer, args.held_out, args.limit)
    rows = [fine_tune(base, form, rate, data, args) for rate in args.rates for form in args.forms]
    title = f"{Path(args.model).name}, {args.steps} steps of {args.batch} examples"
    table = Table("form", *COLUMNS, title=title, title_justify="left")
    for row in rows:
        cells = [format(row[key], spec) for key, spec in COLUMNS.items()]
        table.add_row(row["form"], *cells)
    Console(width=120).print(table)
    print(json.dumps(dict(title=title, command=shlex.join(sys.argv), date=time.strftime("%Y-%m-%d"), rows=rows)))


if __name__ == "__main__":
    main()
