"""A headless Chromium for tests: opens a page, runs expressions in it, and keeps what its console says."""

import asyncio
import base64
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Speaks the DevTools protocol; `errors` holds exceptions, console messages and refused loads of the page."""

    def __init__(self, profile: Path) -> None:
        self.errors: list[str] = []
        self._number = 0
        self._loop = asyncio.new_event_loop()
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            "--window-size=1300,900",
        ]
        self._process = subprocess.Popen(
            [CHROMIUM, *arguments, f"--user-data-dir={profile}", "about:blank"], stderr=subprocess.DEVNULL
        )
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 120
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert time.monotonic() < deadline and self._process.poll() is None, "Chromium did not start"
            time.sleep(0.05)
        self._loop.run_until_complete(self._connect(port_file.read_text().split()[0]))
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    async def _connect(self, port: str) -> None:
        self._session = aiohttp.ClientSession()
        pages = []
        while not pages:
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)

    def call(self, method: str, until: str | None = None, **parameters):
        """The result of a command, after the event `until` if one is named."""
        return self._loop.run_until_complete(asyncio.wait_for(self._call(method, until, parameters), 120))

    async def _call(self, method, until, parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        result = None
        while result is None or until is not None:
            message = await self._socket.receive_json()
            if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
                self.errors.append(str(message["params"]))
            if message.get("method") == until:
                until = None
            if message.get("id") == self._number:
                assert "error" not in message, message
                result = message["result"]
        return result

    def open(self, path: Path) -> None:
        self.errors.clear()
        self.call("Page.navigate", until="Page.loadEventFired", url=path.resolve().as_uri())

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def choose(self, field: str, value: str) -> None:
        """Set a field of a form as a user would."""
        self.evaluate(
            f"{{ const field = document.getElementById('{field}'); field.value = {value!r}; "
            "field.dispatchEvent(new Event('input')); }"
        )

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        self._loop.run_until_complete(self._socket.close())
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait()
