"""What a vLLM server learns from `--middleware`: management under `/fura/`, and one version for each request.

    GET  /fura/version    version, name, path and checksum of the merged adapter
    GET  /fura/adapters   what may be swapped in, by name
    POST /fura/swap       {"adapter": name or path, "name": optional}
    POST /fura/off        {}
    POST /fura/push       an adapter as bytes (only with --for-training)

Every response carries `x-fura-version: <instance>-<count>`, the weights that the whole of it was computed with. A
request with `x-fura-require-version` is refused (409) if it would run on others. Management needs the server's API key
if it has one; without a key only callers on this machine are answered.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.client import REQUIRE_HEADER, VERSION_HEADER
from fura_rl.rollout.gate import Gate
from fura_rl.rollout.payload import StaleUpdateError
from fura_rl.rollout.server_adapters import ServerAdapters, ServeSettings

PREFIX = "/fura/"
PASSED_ON = ("GET", "HEAD", "OPTIONS")  # none of these generates

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class FuraMiddleware:
    """The outermost ASGI layer of the server."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.settings = ServeSettings.from_environment()
        self.gate = Gate()
        self.adapters: ServerAdapters
        self._watching: asyncio.Task | None = None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        elif self._path(scope).startswith(PREFIX):
            response = await self._manage(Request(scope, receive))
            await response(scope, receive, send)
        elif scope["method"] in PASSED_ON:
            await self.app(scope, receive, self._stamped(send))
        else:
            async with self.gate.request():
                await self._serve(scope, receive, send)

    @staticmethod
    def _path(scope: Any) -> str:
        return scope["path"].removeprefix(scope.get("root_path", ""))

    # -- requests -------------------------------------------------------------------------------------------------

    async def _serve(self, scope: Any, receive: Receive, send: Send) -> None:
        required = Request(scope).headers.get(REQUIRE_HEADER)
        send = self._stamped(send)
        if self.adapters.lost:
            refusal = _error(503, "A change of weights failed and could not be undone: restart the server.")
            await refusal(scope, receive, send)
        elif required is not None and required != self.adapters.stamp:
            refusal = _error(409, f"The weights are {self.adapters.stamp}, not {required}.")
            await refusal(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _stamped(self, send: Send) -> Send:
        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                header = (VERSION_HEADER.encode(), self.adapters.stamp.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        return stamped

    # -- management -----------------------------------------------------------------------------------------------

    async def _manage(self, request: Request) -> JSONResponse:
        problem = access_problem(request)
        if problem is not None:
            return problem
        action = self._path(request.scope).removeprefix(PREFIX), request.method
        try:
            if action == ("version", "GET"):
                return JSONResponse(self.adapters.status())
            if action == ("adapters", "GET"):
                return JSONResponse({"active": self.adapters.name, "adapters": self.adapters.allowed.list()})
            if action == ("swap", "POST"):
                body = await _json_body(request, adapter=str, name=str | None)
                return JSONResponse(await self.adapters.swap(body["adapter"], body.get("name")))
            if action == ("off", "POST"):
                await _json_body(request)
                return JSONResponse(await self.adapters.off())
            if action == ("push", "POST"):
                _check_type(request, "application/octet-stream")
                name = request.query_params.get("name", "pushed")
                return JSONResponse(await self.adapters.push(await request.body(), name))
        except StaleUpdateError as error:
            return _error(409, str(error))
        except FuraError as error:
            return _error(400, str(error))
        return _error(404, f"No {request.method} {request.url.path} here.")

    # -- start and end --------------------------------------------------------------------------------------------

    async def _live(self, scope: Any, receive: Receive, send: Send) -> None:
        async def started() -> Any:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self.adapters = ServerAdapters(vllm_names.engine_of_app(scope["app"]), self.settings, self.gate)
                await self.adapters.start()
                if self.settings.watch:
                    self._watching = asyncio.create_task(self.adapters.watch(self.settings.watch))
            elif message["type"] == "lifespan.shutdown" and self._watching is not None:
                self._watching.cancel()
            return message

        try:
            await self.app(scope, started, send)
        except FuraError as error:  # the server must not come up with other weights than those asked for
            await send({"type": "lifespan.startup.failed", "message": f"error: {error}"})


def access_problem(request: Request) -> JSONResponse | None:
    """Why this caller may not manage adapters: without the API key or, if there is none, from another machine."""
    keys = vllm_names.api_keys_of_app(request.app)
    if not keys:
        if request.client is None or _is_loopback(request.client.host):
            return None
        return _error(403, "Without an API key, adapters are managed from the server's own machine only.")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and any(hmac.compare_digest(given.encode(), key.encode()) for key in keys):
        return None
    return _error(401, "This server's API key is needed to manage its adapters.")


def _error(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_type(request: Request, wanted: str) -> None:
    """A web page can make a browser send forms and plain text to this machine, but not these types."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != wanted:
        raise FuraError(f"Send this with content-type {wanted}.")


async def _json_body(request: Request, **fields: Any) -> dict[str, Any]:
    """The request's JSON object. `fields` are the allowed keys and the types of their values."""
    _check_type(request, "application/json")
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise FuraError(f"The request's body is no JSON: {error}") from error
    if not isinstance(body, dict) or body.keys() - fields.keys():
        raise FuraError(f"The request's body must be an object with the keys {sorted(fields)}.")
    for key, kind in fields.items():
        if not isinstance(body.get(key), kind):
            raise FuraError(f"The request's body lacks {key!r}, or it is no string.")
    return body
