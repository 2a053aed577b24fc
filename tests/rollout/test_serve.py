"""A real `fura-rl serve` on the CPU: swaps, refusals, versions under load, and a trainer that sends its adapter."""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest
import torch
from datasets import Dataset
from servers import Server, alternate, load, logprobs_of
from swapping import max_gap, other_base, other_shape, reference_logprobs, truncated
from syncs import check_twenty_syncs, make_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl import cli
from fura_rl.errors import FuraError
from fura_rl.rollout.client import REQUIRE_HEADER, VERSION_HEADER, FuraClient, ServerLostError
from fura_rl.rollout.probe import score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of
from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model, adapter_dir):
    folder = tmp_path_factory.mktemp("server")
    (folder / "run").mkdir()
    server = Server(
        tiny_model, folder / "log", "--adapter", f"first={adapter_dir / 'a'}", "--adapter-dir", str(adapter_dir),
        "--adapter-dir", str(folder), "--watch", str(folder / "run"), "--for-training",
    )  # fmt: skip
    server.folder = folder
    yield server.wait()
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    client = FuraClient(server.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def answers(server, client, sequences):
    """What each adapter (None: the base) answers greedily: token log-probs, one adapter at a time."""
    found = {}
    for name in ("first", "b", None):
        client.off() if name is None else client.swap(name)
        found[name] = [logprobs_of(server.complete(ids)) for ids in sequences]
    return found


def scored(server, sequences):
    """Log-probs of the tokens of given sequences, as `prompt_logprobs` says."""
    found = []
    for ids in sequences:
        entries = server.complete(ids, max_tokens=1, prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"]
        found.append([entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries[1:], strict=True)])
    return found


def test_the_first_adapter_is_merged_before_the_first_request(server, client, adapter_dir, sequences, tiny_model):
    status = client.version()
    assert status["name"] == "first" and status["version"].endswith("-1")
    assert status["path"] == str(adapter_dir / "a") and len(status["checksum"]) == 64
    assert max_gap(scored(server, sequences), reference_logprobs(tiny_model, adapter_dir / "a", sequences)) < 1e-4


def test_swap_off_list_and_versions(server, client, adapter_dir, sequences, tiny_model):
    count = int(client.version()["version"].split("-")[1])
    for name, path in {"b": adapter_dir / "b", None: None, "first": adapter_dir / "a"}.items():
        status = client.off() if name is None else client.swap(name)
        count += 1
        assert status["version"] == f"{status['version'].split('-')[0]}-{count}" and status["name"] == name
        assert max_gap(scored(server, sequences), reference_logprobs(tiny_model, path, sequences)) < 1e-4
        response = server.complete(sequences[0])
        assert response.headers[VERSION_HEADER] == status["version"] == client.version()["version"]
    known = client.list()
    assert known["active"] == "first" and set(known["adapters"]) >= {"first", "a", "b"}
    assert client.swap(adapter_dir / "b", name="mine")["name"] == "mine"


def test_a_request_can_ask_for_a_version(server, client, sequences):
    now = client.version()["version"]
    assert server.complete(sequences[0], headers={REQUIRE_HEADER: now}).status_code == 200
    refused = server.complete(sequences[0], headers={REQUIRE_HEADER: "gone-1"})
    assert refused.status_code == 409 and refused.json()["error"] == f"The weights are {now}, not gone-1."


def test_refusals_keep_the_old_weights(server, client, adapter_dir, sequences):
    client.swap("first")
    before = client.version(), scored(server, sequences)
    for spoil, reason in [(truncated, "truncated"), (other_base, "another base"), (other_shape, "this model has 512")]:
        spoil(shutil.copytree(adapter_dir / "b", server.folder / spoil.__name__))
        with pytest.raises(FuraError, match=reason):
            client.swap(spoil.__name__)
    for adapter in ("nothing", "../adapters/a", "/etc"):
        with pytest.raises(FuraError):
            client.swap(adapter)
    for body, content_type in [
        ("{}", "application/json"),
        ("[1]", "application/json"),
        ('{"adapter": "b"}', "text/plain"),
    ]:
        response = httpx.post(f"{server.url}/fura/swap", content=body, headers={"content-type": content_type})
        assert response.status_code == 400, body
    assert httpx.get(f"{server.url}/fura/nothing").status_code == 404
    assert (client.version(), scored(server, sequences)) == before


def test_the_command_line(server, client, adapter_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fura-rl", "swap", server.url, str(adapter_dir / "b"), "--name", "chosen"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.split("\t")[:2] == [client.version()["version"], "chosen"]


def test_every_response_under_load_has_one_version(server, client, answers, sequences):
    counts = load(server, answers, sequences, swaps=10, change=alternate(client))
    assert min(counts.values()) > 0 and len(counts) == 3
    assert all(
        max_gap([answers[a][0]], [answers[b][0]]) > 0.1 for a, b in [("first", "b"), ("b", None), ("first", None)]
    )


def test_each_new_checkpoint_of_a_run_is_swapped_in(server, client, adapter_dir):
    client.off()
    for step, adapter in {5: "a", 10: "b"}.items():
        folder = server.folder / "run" / f"checkpoint-{step}"
        shutil.copytree(adapter_dir / adapter, folder)
        (folder / "trainer_state.json").write_text("{}")
        end = time.monotonic() + 120
        while client.version()["name"] != folder.name and time.monotonic() < end:
            time.sleep(0.1)
        assert client.version()["path"] == str(folder)


def test_watching_from_outside(server, client, adapter_dir, monkeypatch, capsys):
    class StopError(Exception):
        pass

    def stop(seconds):
        raise StopError

    folder = server.folder / "other-run" / "checkpoint-7"
    shutil.copytree(adapter_dir / "a", folder)
    (folder / "trainer_state.json").write_text("{}")
    monkeypatch.setattr("fura_rl.rollout.client.time", SimpleNamespace(sleep=stop))
    monkeypatch.setattr(sys, "argv", ["fura-rl", "swap", server.url, "--watch", str(folder.parent)])
    with pytest.raises(StopError):
        cli.main()
    assert client.version()["path"] == str(folder)
    assert capsys.readouterr().out.startswith(client.version()["version"])


@pytest.fixture(scope="module")
def trainer(server, tmp_path_factory, tiny_model, tiny_problems):
    problems = [json.loads(line) for line in (tiny_problems / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": [{"role": "user", "content": p["problem"]}], "answer": p["answer"]} for p in problems]
    args = FuraGRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=16, num_generations=8,
        max_completion_length=48, max_steps=3, learning_rate=1e-2, max_logp_gap=1e-3, vllm_mode="server",
        vllm_transport="adapter", vllm_server_base_url=server.url, vllm_server_timeout=30, save_strategy="no",
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = FuraGRPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    yield trainer
    trainer.close()


def test_a_trainer_sends_only_what_it_trains(trainer, client):
    """Three steps at a high learning rate; `max_logp_gap` would stop the run at a gap above 1e-3."""
    before = int(client.version()["version"].split("-")[1])
    trainer.train()
    logs = [row for row in trainer.state.log_history if "sync/logp_gap_max" in row]
    assert len(logs) == 3 and all(row["sync/logp_gap_max"] < 1e-3 for row in logs)
    status, engine = client.version(), trainer.vllm_generation.vllm_client
    assert status["name"] == "training" and status["version"] == engine.stamp
    assert int(status["version"].split("-")[1]) == before + trainer.vllm_generation.version == before + 3
    trained = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
    assert trained < engine.sent_bytes < 1.1 * trained  # such steps are too large for eight bits in a float32 engine
    trainer.vllm_generation.sync_weights()  # of the last step
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-5)
    trainer.vllm_generation.sync_weights()
    assert engine.sent_bytes < 0.3 * trained


def test_other_weights_than_the_trainers_are_refused(trainer, client):
    """Somebody swaps during training: the run stops before a rollout of those weights is used."""
    trainer.vllm_generation.sync_weights()
    client.swap("b")
    with pytest.raises(FuraError, match=r"Somebody else changed the weights .* now b"):
        trainer.vllm_generation.generate([[5, 6, 7]] * 8, None, num_generations=8)
    trainer.vllm_generation.sync_weights()  # takes the server back
    assert len(trainer.vllm_generation.generate([[5, 6, 7]] * 8, None, num_generations=8)[1]) == 8


def test_a_trainer_of_another_base_is_refused(trainer, client, tmp_path, tiny_model):
    """The server has the tiny model; the adapter was made for weights that differ."""
    adapter = adapter_of(trainer.model, trainer.vllm_generation._dist.gather_params)
    for tensors in adapter.modules.values():
        tensors["base_sample"] = torch.randn_like(tensors["base_sample"])
    stranger = AdapterVLLMClient(client.url, connection_timeout=30)
    before = client.version()
    with pytest.raises(FuraError, match="another base model"):
        stranger.push(adapter)
    assert client.version() == before


@pytest.mark.parametrize("step, share", [(None, 4), (3e-5, 1.1)])
def test_twenty_syncs(client, tiny_model, step, share):
    """Whatever form an update takes: steps of 3e-5 travel as int8."""
    policy = make_policy(tiny_model)
    engine = AdapterVLLMClient(client.url, connection_timeout=30)
    sizes = []

    def sync():
        engine.push(adapter_of(policy, lambda parameters: nullcontext()))
        sizes.append(engine.sent_bytes)

    check_twenty_syncs(policy, sync, lambda sequences: score_on_server(engine, sequences), step=step)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert all(0.9 * share * trained < size < 1.1 * share * trained for size in sizes[1:])


def test_an_update_that_the_server_does_not_expect_goes_in_full(client, tiny_model, monkeypatch):
    """An answer was lost after the server had merged: sent again, the update would be merged twice."""
    policy = make_policy(tiny_model)
    engine = AdapterVLLMClient(client.url, connection_timeout=30)

    def push(size=3e-5):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(size)
        engine.push(adapter_of(policy, lambda parameters: nullcontext()))
        return engine.sent_bytes

    first, small = push(), push()
    assert small < 0.2 * first
    send, calls = engine.manager.push, []

    def loses_an_answer(data, name):
        calls.append(len(data))
        if len(calls) == 1:
            send(data, name=name)  # the client tries again after this one
        return send(data, name=name)

    with monkeypatch.context() as network:
        network.setattr(engine.manager, "push", loses_an_answer)
        assert push() == calls[1] == first and calls[0] == small
    assert push() == small
    assert client.version()["checksum"] == engine._held.checksum


def test_an_exact_push(client, tiny_model):
    policy = make_policy(tiny_model)
    engine = AdapterVLLMClient(client.url, connection_timeout=30, form="exact")
    for size in (1e-2, 1e-6):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(size)
        adapter = adapter_of(policy, lambda parameters: nullcontext())
        engine.push(adapter)
        assert client.version()["checksum"] == adapter.checksum


def test_a_plain_vllm_server_or_none_is_one_sentence(trainer):
    with pytest.raises(FuraError, match=r"cannot be reached .*tried 2 times"):
        AdapterVLLMClient("http://127.0.0.1:1", connection_timeout=0.5)


def test_a_server_that_hangs_and_one_that_was_killed(trainer, server, monkeypatch):
    """The last test that needs the server."""
    engine = trainer.vllm_generation
    engine.sync_weights()
    engine.vllm_client.heartbeat = 0.5
    engine.vllm_client.patience = engine.vllm_client.manager.patience = 1.5
    os.killpg(server.process.pid, signal.SIGSTOP)
    engine.vllm_client.manager.timeout = 0.5
    with pytest.raises(ServerLostError, match=r"did not answer within 0\.5 s"):
        engine.generate([[5, 6, 7]] * 8, None, num_generations=8)
    monkeypatch.setattr(engine.vllm_client, "refresh", lambda: None)  # as if it had stopped while it generated
    with pytest.raises(ServerLostError, match=r"The server at .* hangs: it has not answered for 0\.5 s"):
        engine.generate([[5, 6, 7]] * 8, None, num_generations=8)
    monkeypatch.undo()
    server.kill()
    with pytest.raises(ServerLostError, match=r"The server at .* cannot be reached .*tried 3 times"):
        engine.generate([[5, 6, 7]] * 8, None, num_generations=8)
    trainer._last_loaded_step = -1
    with pytest.raises(FuraError, match=r"cannot be reached .* This was at step 4: start it again and begin anew"):
        trainer._generate([[{"role": "user", "content": "1 + 1?"}]] * 8)
