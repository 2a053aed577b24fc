"""`fura-rl plan`: a run's memory by part, bytes over the network and the largest batch that fits."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fura_rl.errors import FuraError
from fura_rl.memory import STRATEGIES, ModelSizes
from fura_rl.plan import GIB, LARGEST_BATCH, Run, misfit, strategy_of


def plan_command(
    context: typer.Context,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of one, in GiB.")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(help="Length of a prompt.")] = 256,
    strategy: Annotated[
        str | None, typer.Option(help=f"How it is spread: {', '.join(STRATEGIES)}; as the recipe says if left out.")
    ] = None,
) -> None:
    """Memory by part, bytes over the network and the largest batch that fits: --config RECIPE [--option value ...].

    Exit status 1 if the recipe does not fit.
    """
    from fura_rl.train_grpo import parse

    _, training, model, adapter = parse(context.args)
    assert model.model_name_or_path is not None  # checked by parse
    if strategy is not None and strategy not in STRATEGIES:
        raise FuraError(f"Unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}.")
    if training.use_vllm and training.vllm_mode == "colocate" and gpus % training.vllm_tensor_parallel_size:
        raise FuraError(f"vllm_tensor_parallel_size={training.vllm_tensor_parallel_size} does not divide {gpus} GPUs.")
    spread = STRATEGIES[strategy] if strategy else strategy_of(training)
    sizes = ModelSizes.of(model.model_name_or_path, adapter, model.model_revision)
    run = Run(sizes, training, model, adapter, spread, gpus, gpu_memory * GIB, prompt_tokens)
    console = Console()
    console.print(table(run))
    for line in remarks(run):
        console.print(line, soft_wrap=True)
    if reason := misfit(run):
        console.print(reason, soft_wrap=True)
        raise typer.Exit(1)


def table(run: Run) -> Table:
    """GiB of one GPU by part and phase."""
    training, generating = run.parts()
    made = Table("part", "training, GiB", "generating, GiB")
    rows = [(name, training.get(name), generating.get(name)) for name in {**training, **generating}]
    for name, *values in [*rows, ("total", sum(training.values()), sum(generating.values()))]:
        made.add_row(name, *("-" if value is None else f"{value / GIB:.2f}" for value in values))
    return made


def remarks(run: Run) -> list[str]:
    """What a plan says beside its table: the engine, the network, the largest batch."""
    lines = []
    if run.colocated:
        cache = run.engine_share - run.engine_weights
        token = 4 * run.sizes.layers * run.sizes.key_value / run.training.vllm_tensor_parallel_size
        leave = "beside its weights the engine has" if run.engine_cache else "of the engine's share, weights leave"
        lines.append(f"{leave} {cache / GIB:.1f} GiB: {max(cache, 0) / token:,.0f} tokens of cache")
        if run.training.vllm_enable_sleep_mode:
            kept = run.engine_weights if run.training.vllm_sleep_level == 1 else 0.0
            lines.append(
                f"asleep while training (level {run.training.vllm_sleep_level}): the engine keeps {kept / GIB:.1f} GiB "
                "of weights in main memory"
            )
    elif not run.training.use_vllm:
        lines.append("what transformers needs for sampling is not planned for")
    network = run.network()
    lines += [f"sent by a GPU in a step, {reason}: {sent / 2**20:,.0f} MiB" for reason, sent in network.items()]
    lines.append(f"sent by a GPU in a step: {sum(network.values()) / 2**20:,.0f} MiB")
    batch = run.largest_batch()
    more = " or more" if batch == LARGEST_BATCH else ""
    lines.append(f"largest per_device_train_batch_size that fits: {batch}{more}")
    if not run.training.gradient_checkpointing:
        lines.append(f"with gradient_checkpointing: {run.largest_batch(checkpointing=True)}")
    return lines
