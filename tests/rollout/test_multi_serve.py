"""`fura-rl serve --multi` on the CPU: adapters as models, loads and unloads while it runs, and what is refused."""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import swapping
import torch
from multi_cases import scored
from servers import ForkedServer
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from swapping import make_adapter, max_gap, reference_logprobs

from fura_rl import cli
from fura_rl.errors import FuraError
from fura_rl.rollout import multi_serve
from fura_rl.rollout.multi_names import without_adapters
from fura_rl.rollout.multi_rows import AdapterRows
from fura_rl.rollout.multi_settings import SETTINGS_VARIABLE, MultiSettings


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model, adapter_dir):
    """Adapters `a` and `b`, and a folder for further ones."""
    folder = tmp_path_factory.mktemp("multi")
    (folder / "more").mkdir()
    server = ForkedServer(
        tiny_model, folder / "log", "--multi", "--adapter", f"a={adapter_dir / 'a'}", "--adapter",
        f"b={adapter_dir / 'b'}", "--adapter-dir", str(folder / "more"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    server.more = folder / "more"
    yield server.wait()
    server.stop()


def load(server, name, path, **fields):
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=120)


def unload(server, name):
    return httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=120)


@pytest.fixture(scope="module")
def references(server, tiny_model, adapter_dir, sequences):
    folders = {server.model: None, "a": adapter_dir / "a", "b": adapter_dir / "b"}
    return {name: reference_logprobs(tiny_model, folder, sequences) for name, folder in folders.items()}


@pytest.mark.vllm
@pytest.mark.slow
def test_concurrent_requests_each_get_the_adapter_that_they_name(server, references, sequences):
    models = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    assert {model["id"] for model in models} == set(references)
    paths = httpx.get(f"{server.url}/openapi.json", timeout=30).json()["paths"]
    manage = {path for path in paths if "adapter" in path}
    assert len(manage) >= 2 and not any(multi_serve.MANAGED.isdisjoint(path.split("/")) for path in manage)
    work = [(name, i) for _ in range(4) for i in range(len(sequences)) for name in references]
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda item: scored(server, item[0], sequences[item[1]]), work))
    for (name, i), found in zip(work, answers, strict=True):
        assert max_gap([found], [references[name][i]]) < 1e-4
    assert server.complete(sequences[0], model="c").status_code == 404


@pytest.mark.vllm
@pytest.mark.slow
def test_adapters_come_and_go_while_it_runs(server, references, adapter_dir, sequences):
    """By a path relative to the folder named at the start; an unloaded name may belong to another adapter."""
    shutil.copytree(adapter_dir / "b", server.more / "late")
    assert load(server, "late", "late").status_code == 200
    assert max_gap([scored(server, "late", sequences[0])], references["b"][:1]) < 1e-4
    assert unload(server, "late").status_code == 200
    assert server.complete(sequences[0], model="late").status_code == 404
    shutil.copytree(adapter_dir / "a", server.more / "late", dirs_exist_ok=True)
    assert load(server, "late", server.more / "late").status_code == 200
    assert max_gap([scored(server, "late", sequences[0])], references["a"][:1]) < 1e-4
    for name in ("late", "new"):
        replaced = load(server, name, server.more / "late", load_inplace=True)
        assert replaced.status_code != 200 and "cannot be loaded in place" in replaced.text
    assert unload(server, "late").status_code == 200


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil, reason",
    [
        (swapping.truncated, "truncated"),
        (swapping.pickled, "holds no adapter_model.safetensors"),
        (swapping.other_base, "another base model"),
        (swapping.other_shape, "cover 1024 features, this model has 512"),
        (swapping.lora, "no FuRA adapter: start the server with --enable-lora"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_others_go_on(server, references, spoil, reason, adapter_dir, sequences):
    folder = server.more / spoil.__name__
    spoil(shutil.copytree(adapter_dir / "b", folder))
    response = load(server, "spoilt", folder)
    assert response.status_code != 200 and reason in response.text
    for name in references:
        assert max_gap([scored(server, name, sequences[0])], references[name][:1]) < 1e-4


@pytest.mark.vllm
@pytest.mark.slow
def test_only_folders_named_at_the_start(server, references, adapter_dir, tmp_path, sequences):
    outside = shutil.copytree(adapter_dir / "b", tmp_path / "outside")
    (server.more / "link").symlink_to(outside)
    for path, reason in {
        outside: "no adapter that this server may load",
        f"{server.more}/../outside": "contains '..'",
        server.more / "link": "no adapter that this server may load",
        "someone/on-the-hub": "no adapter that this server may load",
    }.items():
        response = load(server, "outside", path)
        assert response.status_code != 200 and reason in response.text
    assert max_gap([scored(server, "a", sequences[0])], references["a"][:1]) < 1e-4


# -- without an engine


@pytest.fixture
def own_files(adapter_dir, tmp_path):
    return shutil.copytree(adapter_dir, tmp_path / "adapters")


def test_the_command_line(own_files, tiny_model, monkeypatch):
    """Slots for every adapter, LoRA only where it is asked for, the user's options last."""
    named = [f"x{i}={own_files / 'a'}" for i in range(5)]
    command, environment = multi_serve.server("base", named, [own_files], ["--port", "1"])
    assert command[:3] == [sys.executable, "-m", command[2]] and command[-2:] == ["--port", "1"]
    assert command[command.index("--max-loras") + 1] == "5" and command[command.index("--max-lora-rank") + 1] == "1"
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert f"x4={own_files / 'a'}" in command
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    monkeypatch.setenv(SETTINGS_VARIABLE, environment[SETTINGS_VARIABLE])
    settings = MultiSettings.from_environment()
    assert not settings.with_lora and str(own_files) in settings.folders
    assert settings.block_sizes == {256: 16, 512: 32}
    assert "--max-lora-rank" not in multi_serve.server("base", [], [], ["--enable_lora"])[0]
    command, environment = multi_serve.server("base", named[:1], [], ["--enable-lora"])
    assert "--max-lora-rank" not in command and "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment
    assert command[command.index("--max-loras") + 1] == "4"


def test_block_sizes_that_all_adapters_fit_into(tiny_model, tmp_path):
    folders = {
        "eights": make_adapter(tiny_model, tmp_path / "eights", seed=1, block_size={"o_proj": 8}),
        "heads": make_adapter(tiny_model, tmp_path / "heads", seed=1, block_size="head"),
    }
    named = [f"{name}={folder}" for name, folder in folders.items()]
    settings = json.loads(multi_serve.server("base", named, [], [])[1][SETTINGS_VARIABLE])
    assert settings["block_sizes"] == {"256": 64, "512": 32}


@pytest.mark.parametrize(
    "adapters, options, reason",
    [
        (["a"], [], "write NAME=PATH"),
        (["a={dir}/a", "a={dir}/b"], [], "the name a is given twice"),
        (["a={dir}/lora"], [], "add --enable-lora"),
        (["a={dir}/none"], [], "holds no adapter_config.json"),
        ([], ["--lora-modules", "a=b"], "--adapter NAME=PATH"),
        ([], ["--lora-modules=a=b"], "--adapter NAME=PATH"),
        ([], ["--lora_modules", "a=b"], "--adapter NAME=PATH"),
    ],
)
def test_what_cannot_be_served(own_files, adapters, options, reason):
    swapping.lora(shutil.copytree(own_files / "a", own_files / "lora"))
    with pytest.raises(FuraError, match=reason):
        multi_serve.server("base", [value.format(dir=own_files) for value in adapters], [], options)


def test_the_plugin_has_to_be_there(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(FuraError, match="VLLM_PLUGINS leaves out fura_rl"):
        multi_serve.server("base", [], [], [])
    monkeypatch.setattr(multi_serve, "PLUGIN", "not-installed")
    with pytest.raises(FuraError, match="has not registered its vLLM plugin"):
        multi_serve.server("base", [], [], [])


def test_merged_weights_and_adapters_per_request_do_not_mix(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fura-rl", "serve", "base", "--multi", "--watch", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "leave out --multi" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "keys", "given", "status"),
    [
        ("127.0.0.1", None, "", 200),
        ("10.0.0.7", None, "", 403),
        ("10.0.0.7", ["k"], "Bearer k", 200),
        ("10.0.0.7", ["k"], "Bearer other", 401),
        ("127.0.0.1", ["k"], "", 401),
    ],
)
@pytest.mark.parametrize("root_path", ["", "/", "/served"])
def test_who_may_load_adapters(host, keys, given, status, root_path, monkeypatch):
    """On every path that leads there, also those on which vLLM asks for no key; other requests are not touched."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    managed = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters", "/adapters/a"]
    routes = [Route(path, lambda request: PlainTextResponse("done")) for path in (*managed, "/v1/models")]
    app = Starlette(routes=routes)
    app.state.args = SimpleNamespace(api_key=keys)
    layer = multi_serve.LocalManagement(app)

    async def outer(scope, receive, send):
        await layer({**scope, "app": app, "root_path": root_path}, receive, send)

    client = TestClient(outer, client=(host, 1234), headers={"authorization": given})
    assert [client.get(path).status_code for path in managed] == [status] * len(managed)
    assert client.get("/v1/models").status_code == 200


def test_without_lora_the_plugin_costs_an_engine_nothing(monkeypatch):
    """It leaves alone what an engine without LoRA runs on, and says so if this vLLM is another than it knows."""
    from fura_rl.rollout import multi, vllm_names

    monkeypatch.setattr(multi, "_registered", False)
    monkeypatch.setattr(vllm_names, "missing_for_per_request", lambda: ["vllm.lora.moved"])
    joined = []
    monkeypatch.setattr(multi.multi_names, "join_lora", lambda *arguments: joined.append(arguments))
    multi.register()
    multi.register()
    assert joined == [] and multi._registered
    assert os.environ.get(SETTINGS_VARIABLE) is None


def test_the_rows_of_a_batch():
    """FuRA's kernels see the rows of FuRA adapters, LoRA's those of LoRA; what vLLM makes up to warm up is both."""
    from vllm.lora.layers import LoRAMapping

    rows = AdapterRows(8, 4, torch.device("cpu"))
    addresses = rows.ids.data_ptr(), rows.order.data_ptr(), rows.starts.data_ptr()
    rows.add(5, fura=True)
    rows.add(6, fura=False)
    rows.set((5, 6, 0, 7, 5), [6, 5, 7, None])
    assert rows.ids.tolist() == [1, -1, -1, 2, 1, -1, -1, -1] and rows.any_adapted
    assert rows.order.tolist() == [1, 2, 0, 4, 3, 5, 6, 7] and rows.counts.tolist() == [3, 5]  # by slot, and stable
    assert rows.starts.tolist() == [2, 2, 4, 5, 5]
    seen_by_lora = without_adapters(LoRAMapping((5, 6, 0, 7, 5), (5, 6), is_prefill=True), rows.fura)
    assert seen_by_lora == LoRAMapping((0, 6, 0, 7, 0), (0, 6), is_prefill=True)
    rows.set((6, 0), [6, 5, 7, None])
    assert rows.ids.tolist() == [-1] * 8 and rows.order.tolist() == list(range(8)) and not rows.any_adapted
    rows.add(5, fura=False)  # a number that is given again
    rows.set((5,), [6, 5, 7, None])
    assert not rows.any_adapted and rows.fura == set()
    assert (rows.ids.data_ptr(), rows.order.data_ptr(), rows.starts.data_ptr()) == addresses
