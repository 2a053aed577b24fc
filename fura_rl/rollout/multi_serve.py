"""`fura-rl serve BASE --multi`: vLLM's own server, with FuRA adapters where it has LoRA."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Awaitable, Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.allowed import AllowedAdapters
from fura_rl.rollout.multi import is_fura
from fura_rl.rollout.multi_settings import MultiSettings, common_block_sizes
from fura_rl.rollout.payload import Adapter, read_folder

PLUGIN = "fura_rl"
MIDDLEWARE = "fura_rl.rollout.multi_serve.LocalManagement"
MANAGED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
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
    if "--lora-modules" in options:
        raise FuraError("Name LoRA adapters as those of FuRA are named: --adapter NAME=PATH.")
    with_lora = "--enable-lora" in options
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
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path):
            raise FuraError(f"--adapter {value}: write NAME=PATH.")
        if name in named:
            raise FuraError(f"--adapter {value}: the name {name} is given twice.")
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
    """An ASGI layer of the server: without an API key, only its own machine loads and unloads adapters."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) in MANAGED:
            request = Request(scope, receive)
            local = request.client is None or _is_loopback(request.client.host)
            if not local and not vllm_names.api_keys_of_app(request.app):
                sentence = "Without an API key, adapters are managed from the server's own machine only."
                await JSONResponse({"error": sentence}, status_code=403)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
