"""A server with two engines (`--data-parallel-size 2`): both have the weights that a change asks for, or neither."""

import pytest
from multi_cases import scored
from swapping import max_gap, reference_logprobs
from tensor_parallel import TOLERANCE, TWO_RANKS, start

from fura_rl.errors import FuraError
from fura_rl.rollout.client import FuraClient

pytestmark = TWO_RANKS


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_model, adapter_dir):
    folder = tmp_path_factory.mktemp("engines")
    server = start(
        tiny_model, folder / "log", "--for-training", "--adapter-dir", str(adapter_dir), "--worker-extension-cls",
        "tensor_parallel_worker.Extension", spread="--data-parallel-size",
        FURA_TEST_SHORT_OF_MEMORY=str(folder / "fault"),
    )  # fmt: skip
    server.fault = folder / "fault"
    try:
        yield server.wait()
    finally:
        server.stop()


def scores(server, sequences, engine):
    """Log-probs of tokens 1.. as one of the engines computes them."""
    return [scored(server, server.model, ids, {"X-data-parallel-rank": str(engine)}) for ids in sequences]


def test_both_engines_change_their_weights(server, tiny_model, adapter_dir, sequences):
    client = FuraClient(server.url)
    for name in ("a", None, "b"):
        client.swap(name) if name else client.off()
        expected = reference_logprobs(tiny_model, name and adapter_dir / name, sequences)
        assert all(max_gap(scores(server, sequences, engine), expected) < TOLERANCE for engine in (0, 1))


def test_what_fails_in_the_second_engine_is_undone_in_both(server, tiny_model, adapter_dir, sequences):
    """vLLM returns what the first engine says, and no more."""
    client = FuraClient(server.url)
    client.swap("b")
    before = client.version()
    server.fault.touch()
    with pytest.raises(FuraError, match=r"The adapter could not be merged; the old weights are back: .* out of memory"):
        client.swap("a")
    assert client.version() == before and not server.fault.exists()
    expected = reference_logprobs(tiny_model, adapter_dir / "b", sequences)
    assert all(max_gap(scores(server, sequences, engine), expected) < TOLERANCE for engine in (0, 1))
    assert client.swap("a")["name"] == "a"
