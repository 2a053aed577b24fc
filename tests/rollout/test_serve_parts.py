"""What a server rests on, without an engine: the gate, the folders, finished checkpoints, the command line."""

import asyncio
import json
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from fura_rl import cli
from fura_rl.errors import FuraError
from fura_rl.rollout.allowed import AllowedAdapters
from fura_rl.rollout.client import FuraClient
from fura_rl.rollout.gate import Gate
from fura_rl.rollout.middleware import FuraMiddleware
from fura_rl.rollout.serve import parse_named, server_command
from fura_rl.rollout.server_adapters import SETTINGS_VARIABLE, ServerAdapters, ServeSettings
from fura_rl.rollout.watch import newest_checkpoint


def test_a_change_waits_for_requests_and_holds_new_ones():
    async def scenario():
        gate, events, may_end = Gate(), [], asyncio.Event()

        async def request(name, end=None):
            async with gate.request():
                events.append(f"{name} starts")
                if end is not None:
                    await end.wait()
                events.append(f"{name} ends")

        async def change():
            async with gate.change(timeout=60):
                events.append("change")

        running = asyncio.create_task(request("first", may_end))
        await asyncio.sleep(0)
        changing = asyncio.create_task(change())
        await asyncio.sleep(0)
        held = asyncio.create_task(request("second"))
        await asyncio.sleep(0)
        may_end.set()
        await asyncio.gather(running, changing, held)
        return events

    assert asyncio.run(scenario()) == ["first starts", "first ends", "change", "second starts", "second ends"]


def test_a_change_gives_up_on_a_request_that_does_not_end():
    async def scenario():
        gate = Gate()
        async with gate.request():
            with pytest.raises(FuraError, match=r"1 requests were still running after 0\.01 s"):
                async with gate.change(timeout=0.01):
                    raise AssertionError("must not start")
            async with gate.request():  # the gate is open again
                assert gate.in_flight == 2

    asyncio.run(scenario())


def test_only_adapters_from_named_folders(adapter_dir, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(adapter_dir / "a")
    (root / "files").mkdir()
    for file in (adapter_dir / "a").iterdir():
        (root / "files" / file.name).symlink_to(file)
    (root / "empty").mkdir()
    allowed = AllowedAdapters({"mine": adapter_dir / "b"}, [root, adapter_dir])
    assert allowed.find("mine") == allowed.find("b") == allowed.find(str(adapter_dir / "b")) == adapter_dir / "b"
    assert allowed.list() == {
        "mine": str(adapter_dir / "b"),
        "a": str(adapter_dir / "a"),
        "b": str(adapter_dir / "b"),
    }
    for adapter, reason in {
        f"../{adapter_dir.name}/a": "contains '..'",
        "a/../../x": "contains '..'",
        "files": "is a link out of",
        "empty": "holds no adapter_config.json",
        "/etc": "no adapter that this server may load",
        "nothing": "no adapter that this server may load",
    }.items():
        with pytest.raises(FuraError, match=reason):
            allowed.find(adapter)
    with pytest.raises(FuraError, match="no adapter that this server may load"):
        AllowedAdapters({}, [root]).find("link")


def test_only_finished_checkpoints_count(tmp_path):
    def checkpoint(name, *files):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("")
        return tmp_path / name

    whole = ("adapter_config.json", "adapter_model.safetensors", "trainer_state.json")
    assert newest_checkpoint(tmp_path) is None
    checkpoint("checkpoint-100", *whole[:2])  # still being written
    checkpoint("checkpoint-final", *whole)
    assert newest_checkpoint(tmp_path) is None
    nine = checkpoint("checkpoint-9", *whole)
    assert newest_checkpoint(tmp_path) == nine
    ten = checkpoint("checkpoint-10", *whole)
    assert newest_checkpoint(tmp_path) == ten  # by number, not by name


def test_the_server_binds_to_this_machine_unless_told_otherwise(adapter_dir):
    command = server_command(
        "base", ["--host", "0.0.0.0", "--tensor-parallel-size", "2"], for_training=False, on_cpu=False
    )
    hosts = [value for option, value in pairwise(command) if option == "--host"]
    assert hosts == ["127.0.0.1", "0.0.0.0"]  # the last one wins
    assert "--enforce-eager" not in command
    assert "--enforce-eager" in server_command("base", [], for_training=True, on_cpu=True)
    assert parse_named([f"x={adapter_dir / 'a'}"]) == {"x": str(adapter_dir / "a")}
    for values, reason in [
        (["x"], "write NAME=PATH"),
        ([f"x={adapter_dir / 'a'}", f"x={adapter_dir / 'b'}"], "given twice"),
        (["x=/nowhere"], "does not exist"),
    ]:
        with pytest.raises(FuraError, match=reason):
            parse_named(values)


def test_mistakes_on_the_command_line_are_one_sentence(tmp_path, tiny_model, monkeypatch, capsys):
    def fura_rl(*args):
        monkeypatch.setattr(sys, "argv", ["fura-rl", *args])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err.splitlines()[0]

    assert fura_rl("swap", "localhost:1", "x", "--off") == (
        2,
        "error: Give one of: an adapter's name or path, --off, --list, --watch RUN_DIR.",
    )
    assert fura_rl("serve", str(tiny_model), "--adapter-dir", str(tmp_path / "no")) == (
        2,
        f"error: {tmp_path / 'no'} is no folder.",
    )


def test_an_unreachable_server_is_one_error_after_some_tries():
    client = FuraClient("http://127.0.0.1:1", patience=0.5)  # nothing listens on port 1
    with pytest.raises(FuraError, match=r"http://127\.0\.0\.1:1 cannot be reached .*tried 2 times"):
        client.version()


def test_settings_survive_the_environment(monkeypatch):
    settings = ServeSettings(named={"a": "/x"}, folders=["/y"], first="a", watch="/z", push=True)
    monkeypatch.setenv(SETTINGS_VARIABLE, settings.to_environment()[SETTINGS_VARIABLE])
    assert ServeSettings.from_environment() == settings
    assert json.loads(settings.to_environment()[SETTINGS_VARIABLE])["keep"] == "cpu"


@pytest.mark.parametrize(
    "keys, host, authorization, status",
    [
        (None, "127.0.0.1", None, 200),
        (None, "::1", None, 200),
        (None, "203.0.113.5", None, 403),
        (["secret", "other"], "127.0.0.1", None, 401),
        (["secret", "other"], "203.0.113.5", "Bearer wrong", 401),
        (["secret", "other"], "203.0.113.5", "Basic secret", 401),
        (["secret", "other"], "203.0.113.5", "Bearer other", 200),
    ],
)
def test_who_may_manage_adapters(keys, host, authorization, status, monkeypatch):
    """The server's key if it has one; without a key only this machine. The answer is that of the real middleware."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app = Starlette()
    app.state.args = SimpleNamespace(api_key=keys)
    middleware = FuraMiddleware(app)
    middleware.adapters = ServerAdapters(None, ServeSettings(), middleware.gate)

    async def server(scope, receive, send):
        await middleware({**scope, "app": app}, receive, send)

    client = TestClient(server, client=(host, 1234), headers={"authorization": authorization} if authorization else {})
    assert client.get("/fura/adapters").status_code == status
    if status == 200:  # and nobody may send tensors to a server that was not started for training
        response = client.post("/fura/push", content=b"", headers={"content-type": "application/octet-stream"})
        assert response.status_code == 400 and "--for-training" in response.json()["error"]
