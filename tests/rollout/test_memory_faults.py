"""A real server that runs out of memory while it takes an adapter: it goes on with the old weights, as can a run."""

from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import torch
from servers import ForkedServer, logprobs_of
from swapping import max_gap
from syncs import make_policy, reference_logprobs
from transformers import AutoTokenizer

from fura_rl.errors import FuraError
from fura_rl.rollout.client import FuraClient
from fura_rl.rollout.probe import probe_sequences, score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

VARIABLE = "FURA_TEST_SHORT_OF_MEMORY"  # of `short_of_memory`, which only the server's process may import


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model, adapter_dir):
    folder = tmp_path_factory.mktemp("server")
    server = ForkedServer(
        tiny_model, folder / "log", "--for-training", "--adapter-dir", str(adapter_dir),
        "--worker-extension-cls", "short_of_memory.Extension",
        PYTHONPATH=str(Path(__file__).parent), **{VARIABLE: str(folder / "fault")},
    )  # fmt: skip
    server.fault = folder / "fault"
    yield server.wait()
    server.stop()


@pytest.fixture
def client(server):
    client = FuraClient(server.url)
    yield client
    client.close()


@pytest.fixture(scope="module")
def policy(tiny_model):
    torch.manual_seed(0)
    return make_policy(tiny_model)


SENTENCES = {
    "checks": r"The adapter was not merged, and the weights are as before: the engine ran out of memory \(CUDA out of "
    r"memory\. Tried to allocate 20\.00 MiB\)\.$",
    "merge": r"The adapter could not be merged; the old weights are back: the engine ran out of memory \(CUDA out of "
    r"memory\. Tried to allocate 20\.00 MiB\)$",
}


def move(policy, size):
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.parametrize("where", SENTENCES)
@pytest.mark.parametrize("size", [1e-6, 0.05], ids=["int8", "exact"])
def test_a_push(server, policy, where, size):
    """One sentence; the server answers as before and with the same version; the same push succeeds afterwards."""
    engine = AdapterVLLMClient(server.url, connection_timeout=30)
    ids = probe_sequences(AutoTokenizer.from_pretrained(policy.name_or_path))

    def push():
        engine.push(adapter_of(policy, lambda parameters: nullcontext()))

    move(policy, 0.05)
    push()
    before, scores = engine.manager.version(), score_on_server(engine, ids.tolist())
    move(policy, size)
    server.fault.write_text(where)
    with pytest.raises(FuraError, match=SENTENCES[where]):
        push()
    assert not server.fault.exists()
    assert engine.manager.version() == before and engine.stamp == before["version"]
    assert score_on_server(engine, ids.tolist()) == scores
    push()
    assert engine.sent_bytes < {1e-6: 2e5, 0.05: 6e5}[size]  # what is trained alone: the server still has the rest
    assert max_gap(score_on_server(engine, ids.tolist()), reference_logprobs(policy, ids)) < 1e-4


@pytest.mark.parametrize("where", SENTENCES)
def test_a_swap(server, client, where, sequences):
    client.swap("a")
    before, answers = client.version(), [logprobs_of(server.complete(ids)) for ids in sequences]
    server.fault.write_text(where)
    with pytest.raises(FuraError, match=SENTENCES[where]):
        client.swap("b")
    assert client.version() == before
    assert [logprobs_of(server.complete(ids)) for ids in sequences] == answers
    assert client.swap("b")["name"] == "b"
    assert max_gap([logprobs_of(server.complete(sequences[0]))], [answers[0]]) > 0.1


def test_where_even_the_old_weights_find_no_memory(server, client, sequences):
    """The last test of this server, which answers nothing rather than with a mixture of two adapters."""
    client.swap("a")
    server.fault.write_text("merge!")
    with pytest.raises(FuraError, match="could not be undone: restart the engine"):
        client.swap("b")
    server.fault.unlink()
    assert server.complete(sequences[0]).status_code == 503
    with pytest.raises(FuraError, match=r"could not be undone: restart the server\.$"):
        client.off()
    assert httpx.get(f"{server.url}/health", timeout=120).status_code == 200
