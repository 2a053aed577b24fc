"""A server of two ranks with one adapter at a time: what it says is what the merged transformers model says."""

import shutil
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from multi_cases import scored
from swapping import max_gap, other_base, other_shape, reference_logprobs, truncated
from syncs import make_policy
from syncs import reference_logprobs as policy_logprobs
from tensor_parallel import TWO_RANKS, check, start
from transformers import AutoTokenizer
from trl.generation import vllm_generation

from fura_rl.errors import FuraError
from fura_rl.rollout.client import VERSION_HEADER, FuraClient
from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.rollout.probe import probe_sequences, score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of

pytestmark = TWO_RANKS


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_model, adapter_dir):
    folder = tmp_path_factory.mktemp("merged")
    server = start(
        tiny_model, folder / "log", "--for-training", "--adapter-dir", str(adapter_dir), "--adapter-dir", str(folder),
        "--worker-extension-cls", "tensor_parallel_worker.Extension", "--weight-transfer-config",
        '{"backend": "file"}', VLLM_SERVER_DEV_MODE="1", FURA_TEST_SHORT_OF_MEMORY=str(folder / "fault"),
    )  # fmt: skip
    server.folder = folder
    try:
        yield server.wait()
    finally:
        server.stop()


def merged_scores(server, sequences):
    return [scored(server, server.model, ids) for ids in sequences]


def test_merged_adapters_follow_one_another_without_drift(merged, adapter_dir, sequences, tiny_model):
    """A, B, off, A: the second time A gives the same bits as the first."""
    client, seen = FuraClient(merged.url), {}
    for count, name in enumerate(["a", "b", None, "a"], start=1):
        status = client.off() if name is None else client.swap(name)
        assert status["version"].endswith(f"-{count}") and status["name"] == name
        found = merged_scores(merged, sequences)
        check(f"merged {name}", found, reference_logprobs(tiny_model, name and adapter_dir / name, sequences))
        assert seen.setdefault(name, found) == found
        assert merged.complete(sequences[0], max_tokens=1).headers[VERSION_HEADER] == status["version"]
    assert min(max_gap(seen["a"], seen["b"]), max_gap(seen["a"], seen[None])) > 0.1


def test_a_refusal_keeps_the_old_weights_of_both_ranks(merged, adapter_dir, sequences):
    client = FuraClient(merged.url)
    client.swap("b")
    before = client.version(), merged_scores(merged, sequences[:1])
    for spoil, reason in [(truncated, "truncated"), (other_base, "another base"), (other_shape, "this model has 512")]:
        spoil(shutil.copytree(adapter_dir / "a", merged.folder / spoil.__name__))
        with pytest.raises(FuraError, match=reason):
            client.swap(spoil.__name__)
        assert (client.version(), merged_scores(merged, sequences[:1])) == before


def test_what_fails_halfway_on_one_rank_is_undone_on_both(merged, sequences):
    client = FuraClient(merged.url)
    client.swap("b")
    before = client.version(), merged_scores(merged, sequences[:1])
    (merged.folder / "fault").touch()
    with pytest.raises(FuraError, match=r"The adapter could not be merged; the old weights are back: .* out of memory"):
        client.swap("a")
    assert (client.version(), merged_scores(merged, sequences[:1])) == before
    assert not (merged.folder / "fault").exists() and client.swap("a")["name"] == "a"


def move(policy, size, generator):
    """By a step of at most `size`."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(size * (2 * torch.rand(parameter.shape, generator=generator) - 1))


def test_a_trainer_sends_its_adapter_and_then_updates(merged, tiny_model):
    """Steps of 3e-5 travel as int8, one of 1e-2 as it is."""
    policy, generator = make_policy(tiny_model), torch.Generator().manual_seed(0)
    engine = AdapterVLLMClient(merged.url, connection_timeout=30)
    ids = probe_sequences(AutoTokenizer.from_pretrained(tiny_model))
    sizes, answers = [], []
    for step in (5e-2, 3e-5, 3e-5, 1e-2, 3e-5):
        move(policy, step, generator)
        engine.push(adapter_of(policy, lambda parameters: nullcontext()))
        sizes.append(engine.sent_bytes)
        answers.append(score_on_server(engine, ids.tolist()))
        check(f"pushed, step {step}", answers[-1], policy_logprobs(policy, ids))
        assert FuraClient(merged.url).version()["checksum"] == engine._held.checksum
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sizes[0] > 4.5 * trained  # with the basis
    assert all(size < 1.1 * trained for size in (sizes[1], sizes[2], sizes[4]))
    assert max_gap(answers[0], answers[3]) > 1e-2


def test_a_trainer_streams_merged_weights(merged, tiny_model, monkeypatch, tmp_path):
    from file_transfer import FileClient

    monkeypatch.setattr(vllm_generation, "VLLMClient", FileClient)
    monkeypatch.setattr(FileClient, "folder", tmp_path)
    policy, generator = make_policy(tiny_model), torch.Generator().manual_seed(1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    engine = FuraVLLMGeneration(
        policy, Accelerator(cpu=True), tokenizer, mode="server", server_base_url=merged.url, server_timeout=60
    )
    ids = probe_sequences(tokenizer)
    for number in range(3):
        move(policy, 5e-2, generator)
        engine.sync_weights()
        check(f"streamed {number}", engine.score(ids.tolist()), policy_logprobs(policy, ids))
