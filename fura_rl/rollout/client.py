"""`FuraClient` and `fura-rl swap`: adapters of a running `fura-rl serve`, from outside."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from fura_rl.errors import FuraError
from fura_rl.rollout.payload import StaleUpdateError
from fura_rl.rollout.server_adapters import WATCH_SECONDS
from fura_rl.rollout.watch import newest_checkpoint

KEY_VARIABLE = "VLLM_API_KEY"
VERSION_HEADER = "x-fura-version"  # of each response: the weights that all of it was computed with
READ_TIMEOUT_S = 60.0  # of what needs no change of weights
REQUIRE_HEADER = "x-fura-require-version"  # of a request: refuse it on other weights


class ServerLostError(FuraError):
    """A server that cannot be reached, or answers no more."""


class Tries:
    """Bounded retries with growing pauses: 0.5, 1, 2, 4, 8, 8, ... seconds."""

    def __init__(self, url: str, patience: float) -> None:
        self.url, self.patience = url, patience
        self.count = 1
        self._pause = 0.5

    def again(self, reason: object) -> None:
        """Pauses before the next try.

        Raises:
            ServerLostError: the pauses together would exceed the patience.
        """
        if self.patience < self._pause:
            raise ServerLostError(f"The server at {self.url} cannot be reached ({reason}; tried {self.count} times).")
        time.sleep(self._pause)
        self.patience -= self._pause
        self.count += 1
        self._pause = min(2 * self._pause, 8.0)


class FuraClient:
    """Manages the adapters of a server that `fura-rl serve` started.

    Args:
        url: The server's address, with or without `/v1`.
        api_key: The server's key; `VLLM_API_KEY` of the environment if None.
        timeout: Seconds that one call may take; a swap waits for the server's requests in flight.
        patience: Seconds for which a lost connection is tried again, with pauses of 0.5, 1, 2, ... (at most 8).

    Every method raises FuraError with the server's own sentence if it refuses, or one that says it cannot be reached.
    """

    def __init__(self, url: str, api_key: str | None = None, *, timeout: float = 900.0, patience: float = 4.0) -> None:
        url = url if "://" in url else f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        self.patience = patience
        self.timeout = timeout
        key = api_key or os.environ.get(KEY_VARIABLE)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout)

    def swap(self, adapter: str | Path, name: str | None = None) -> dict[str, Any]:
        """Merges an adapter, given by the server's name for it or its path on the server's machine.

        Returns:
            The new status, as `version`.
        """
        return self._call("POST", "swap", json={"adapter": str(adapter), "name": name})

    def off(self) -> dict[str, Any]:
        """Puts the base weights back. Returns the new status."""
        return self._call("POST", "off", json={})

    def version(self) -> dict[str, Any]:
        """The status: version, name, path, checksum, base, dtype, logprobs_mode, and seconds of the last change."""
        return self._call("GET", "version")

    def list(self) -> dict[str, Any]:
        """`active`: the merged adapter's name or None; `adapters`: name -> path of what may be swapped in."""
        return self._call("GET", "adapters")

    def push(self, data: bytes, name: str = "pushed") -> dict[str, Any]:
        """Sends an adapter as bytes (`payload.pack`) to a server with --for-training. Returns the new status.

        Raises:
            StaleUpdateError: these update another adapter than the one that the server was sent last.
        """
        headers = {"content-type": "application/octet-stream"}
        return self._call("POST", "push", content=data, params={"name": name}, headers=headers)

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, action: str, **kwargs: Any) -> dict[str, Any]:
        tries = Tries(self.url, self.patience)
        timeout = self.timeout if method == "POST" else min(self.timeout, READ_TIMEOUT_S)
        while True:
            try:
                response = self._http.request(method, f"/fura/{action}", timeout=timeout, **kwargs)
                break
            except httpx.ReadTimeout as error:
                raise ServerLostError(f"The server at {self.url} did not answer within {timeout:g} s.") from error
            except httpx.TransportError as error:
                tries.again(error)
        if response.status_code == 404:
            raise FuraError(f"The server at {self.url} does not manage adapters: start it with `fura-rl serve`.")
        try:
            body = response.json()
        except ValueError as error:
            raise FuraError(f"The server at {self.url} answered {response.status_code} without a reason.") from error
        if response.status_code != 200:
            raise (StaleUpdateError if response.status_code == 409 else FuraError)(str(body.get("error", body)))
        return body


def swap_command(
    url: Annotated[str, typer.Argument(help="Address of a server that `fura-rl serve` started.")],
    path: Annotated[str | None, typer.Argument(help="The adapter: its name or path on the server's machine.")] = None,
    name: Annotated[str | None, typer.Option(help="What the server calls it from now on.")] = None,
    off: Annotated[bool, typer.Option("--off", help="Put the base weights back.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show what may be swapped in.")] = False,
    watch: Annotated[Path | None, typer.Option(help="Swap in each new checkpoint of this run, until stopped.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=KEY_VARIABLE, help="The server's API key.")] = None,
) -> None:
    """Change the adapter of a running server."""
    if sum([path is not None, off, list_, watch is not None]) != 1:
        raise FuraError("Give one of: an adapter's name or path, --off, --list, --watch RUN_DIR.")
    client = FuraClient(url, api_key)
    if list_:
        known = client.list()
        for adapter, folder in known["adapters"].items():
            print(f"{'*' if adapter == known['active'] else ' '} {adapter}\t{folder}")
    elif watch is not None:
        _watch(client, watch)
    else:
        _print_status(client.off() if path is None else client.swap(path, name))


def _watch(client: FuraClient, run: Path) -> None:
    seen: Path | None = None
    while True:
        newest = newest_checkpoint(run)
        if newest is not None and newest != seen:
            seen = newest
            _print_status(client.swap(newest.resolve()))
        time.sleep(WATCH_SECONDS)


def _print_status(status: dict[str, Any]) -> None:
    print(f"{status['version']}\t{status['name'] or 'base'}\t{status['checksum'][:12]}", flush=True)
