"""`fura-rl serve BASE --multi`: vLLM's own server, with FuRA adapters where it has LoRA."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from starlette.requests import Request

from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.allowed import AllowedAdapters, named_paths
from fura_rl.rollout.middleware import access_problem
from fura_rl.rollout.multi import is_fura
from fura_rl.rollout.multi_settings import MultiSettings, common_block_sizes
from fura_rl.rollout.payload import Adapter, read_folder

PLUGIN = "fura_rl"
MIDDLEWARE = "fura_rl.rollout.multi_serve.LocalManagement"
MANAGED = {
    "load_lora_adapter",
    "unload_lora_adapter",
    "adapters",
}  # parts of paths; the last is SageMaker's name for both
FEWEST_SLOTS = 4


def server(base: str, adapters: list[str], folders: list[Path], options: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line of vLLM's server and what it needs in its environment.

    Args:
        base: Name or path of the base model.
        adapters: NAME=PATH, ... of adapters to load at the start.
        folders: Below which further ones may be loaded while it runs.
        options: vLLM's, which win. `--enable-lora` among them asks for ordinary LoRA adapters beside those of FuRA.

    Raises:
        FuraError: an adapter cannot be served, or vLLM would not find this package's plugin.
    """
    _check_plugin()
    given = {option.partition("=")[0].replace("_", "-") for option in options}  # as vLLM reads them
    if "--lora-modules" in given:
        raise FuraError("Name LoRA adapters as those of FuRA are named: --adapter NAME=PATH.")
    with_lora = "--enable-lora" in given
    named, readable = _named(adapters, with_lora)
    settings = MultiSettings(
        folders=[str(folder.resolve()) for folder in folders] + list(named.values()),
        with_lora=with_lora,
        block_sizes=common_block_sizes(readable),
    )
    command = [sys.executable, "-m", vllm_names.server_module(), "--model", base, "--host", "127.0.0.1"]
    command += ["--enable-lora", "--max-loras", str(max(FEWEST_SLOTS, len(named))), "--middleware", MIDDLEWARE]
    if not with_lora:
        command += ["--max-lora-rank", "1"]  # of buffers that nothing uses
    if named:
        command += ["--lora-modules", *(f"{name}={path}" for name, path in named.items())]
    environment = settings.to_environment()
    if folders:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return command + options, environment


def _named(values: list[str], with_lora: bool) -> tuple[dict[str, str], list[Adapter]]:
    named: dict[str, str] = {}
    readable = []
    for name, path in named_paths(values).items():
        folder = AllowedAdapters({name: Path(path)}).find(name)
        if is_fura(folder):
            readable.append(read_folder(folder))
        elif not with_lora:
            raise FuraError(f"{path} is no FuRA adapter: add --enable-lora to serve LoRA beside FuRA.")
        named[name] = str(folder)
    return named, readable


def _check_plugin() -> None:
    if not entry_points(group="vllm.general_plugins", name=PLUGIN):
        raise FuraError("This installation of fura-rl has not registered its vLLM plugin: install fura-rl again.")
    chosen = os.environ.get("VLLM_PLUGINS")
    if chosen is not None and PLUGIN not in chosen.split(","):
        raise FuraError(f"VLLM_PLUGINS leaves out {PLUGIN}, which --multi needs: add it.")


class LocalManagement:
    """An ASGI layer of the server: adapters are loaded and unloaded with its API key, or without one from its machine.

    vLLM asks for the key on paths below /v1 only, and has these routes below /adapters too. Whatever `--root-path` puts
    in front of them does not matter here.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "http" and not MANAGED.isdisjoint(scope["path"].split("/")):
            refusal = access_problem(Request(scope, receive))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)
