"""`fura-rl serve BASE`: an OpenAI-compatible vLLM server with FuRA adapters, one merged at a time or one a request."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from fura_rl.errors import FuraError
from fura_rl.rollout import multi_serve, vllm_names
from fura_rl.rollout.allowed import named_paths
from fura_rl.rollout.payload import read_folder
from fura_rl.rollout.pristine import check_keep
from fura_rl.rollout.server_adapters import ServeSettings

# What TRL asks of a server: log-probs after temperature, and as many of them as it likes.
TRAINING_OPTIONS = ("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1")


def parse_named(values: list[str]) -> dict[str, str]:
    """NAME=PATH, ... as a dict.

    Raises:
        FuraError: a value is none, a name occurs twice, or there is no adapter at the path that could be served.
    """
    named = named_paths(values)
    for path in named.values():
        read_folder(path)
    return {name: str(Path(path).resolve()) for name, path in named.items()}


def server_command(base: str, options: list[str], *, for_training: bool, on_cpu: bool) -> list[str]:
    """The command line of vLLM's server, with what adapters need; options of the user come last and win."""
    command = [sys.executable, "-m", vllm_names.server_module(), "--model", base, "--host", "127.0.0.1"]
    command += ["--worker-extension-cls", vllm_names.WORKER_EXTENSION, "--middleware", vllm_names.MIDDLEWARE]
    if on_cpu:
        command.append("--enforce-eager")  # a compiled graph would keep the packed weights that a swap replaces
    if for_training:
        command += TRAINING_OPTIONS
    return command + options


def serve_command(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Name or path of the base model.")],
    adapter: Annotated[
        list[str],
        typer.Option(help="NAME=PATH of an adapter; the first is merged at start, or all are loaded (--multi)."),
    ] = [],  # noqa: B006
    adapter_dir: Annotated[list[Path], typer.Option(help="Folder below which adapters may be loaded.")] = [],  # noqa: B006
    watch: Annotated[Path | None, typer.Option(help="Swap in each new checkpoint of this training run.")] = None,
    keep: Annotated[str, typer.Option(help="Where base weights stay: cpu, device, checkpoint (read again).")] = "cpu",
    for_training: Annotated[bool, typer.Option(help="Take adapters from a trainer (vllm_transport: adapter).")] = False,
    drain_seconds: Annotated[float, typer.Option(help="How long a swap waits for requests in flight.")] = 600.0,
    multi: Annotated[
        bool, typer.Option(help="Keep all adapters loaded; each request chooses one as its model.")
    ] = False,
) -> None:
    """An OpenAI-compatible vLLM server whose FuRA adapter can be swapped while it runs. Further options are vLLM's."""
    for folder in [*adapter_dir, *([watch] if watch else [])]:
        if not folder.is_dir():
            raise FuraError(f"{folder} is no folder.")
    if multi:
        if watch or for_training:
            raise FuraError("--watch and --for-training change merged weights: leave out --multi.")
        replace_process(*multi_serve.server(base, adapter, adapter_dir, context.args))
    named = parse_named(adapter)
    settings = ServeSettings(
        named=named,
        folders=[str(folder.resolve()) for folder in adapter_dir],
        first=next(iter(named), None),
        keep=check_keep(keep),
        watch=str(watch.resolve()) if watch else None,
        push=for_training,
        drain_seconds=drain_seconds,
    )
    command = server_command(base, context.args, for_training=for_training, on_cpu=not torch.cuda.is_available())
    replace_process(command, settings.to_environment())


def replace_process(command: list[str], environment: dict[str, str]) -> NoReturn:
    """The server takes this process's place, so that its signals and exit status are the server's."""
    environment = {**os.environ, **environment}
    if environment.get("VLLM_LOGGING_LEVEL") == "ERROR":  # TRL sets it when it is imported, and hides the server's log
        del environment["VLLM_LOGGING_LEVEL"]
    os.execve(command[0], command, environment)
