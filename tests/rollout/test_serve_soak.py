"""Minutes of load and of killed servers. Run by `make soak`."""

import gc
import json
from pathlib import Path

import psutil
import pytest
import torch
from datasets import Dataset
from servers import Server, alternate, load, logprobs_of
from swapping import TEXTS, make_adapter, max_gap, prompt_logprobs, reference_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fura_rl.errors import FuraError
from fura_rl.rollout import FuraClient, attach
from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.soak]


@pytest.fixture(scope="module", params=["tiny", "smollm2-135m"])
def model(request, tiny_model) -> Path:
    """The tiny model, and a real one where it lies beside the checkout."""
    path = tiny_model if request.param == "tiny" else Path(__file__).parents[3] / "models" / request.param
    if not path.is_dir():
        pytest.skip(f"no model in {path}")
    return path


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> Path:
    """A folder with adapters `a` and `b` of the model."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("ab"):
        make_adapter(model, folder / name, seed, std=0.01)
    return folder


@pytest.fixture(scope="module")
def texts(model) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text).input_ids for text in TEXTS]


def test_in_process(model, adapters, texts, monkeypatch):
    """A, B, off, A: the bits of a fresh engine, and transformers' merge."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    llm = LLM(str(model), enforce_eager=True, dtype="float32", max_model_len=256)
    seen = {None: prompt_logprobs(llm, texts)}
    attached = attach(llm)
    for name in ["a", "b", None, "a", "b", None]:
        attached.off() if name is None else attached.swap(adapters / name)
        found = prompt_logprobs(llm, texts)
        assert found == seen.setdefault(name, found)
    gaps = {name: max_gap(seen[name], reference_logprobs(model, adapters / name, texts)) for name in "ab"}
    moved = {name: max_gap(seen[name], seen[None]) for name in "ab"}
    print(f"{model.name}: largest log-prob gap to transformers' merge {gaps}, to the base {moved}")
    assert max(gaps.values()) < 1e-4 < 1e-2 < min(moved.values())
    del llm, attached
    gc.collect()


def test_two_hundred_swaps_under_eight_clients(tmp_path, model, adapters, texts):
    """Every response is of exactly one version, none fails, and the server's memory stays flat."""
    server = Server(model, tmp_path / "log", "--adapter", f"first={adapters / 'a'}", "--adapter-dir", str(adapters))
    try:
        server.wait()
        client = FuraClient(server.url)
        answers = {}
        for name in ("first", "b", None):
            client.off() if name is None else client.swap(name)
            answers[name] = [logprobs_of(server.complete(ids)) for ids in texts]

        def resident() -> float:
            root = psutil.Process(server.process.pid)
            return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 2**20

        change, memory = alternate(client), []

        def swap(i):
            if i % 40 == 0:
                memory.append(resident())
            return change(i)

        counts = load(server, answers, texts, swaps=200, change=swap)
        memory.append(resident())
        print(f"{model.name}: responses by adapter: {counts}; MiB after each 40 swaps: {[round(m) for m in memory]}")
        assert len(counts) == 3 and min(counts.values()) >= 200
        assert int(client.version()["version"].split("-")[1]) == 204  # the first, three for the answers, 200
        # allocators and caches fill during the first 80; a leak of one adapter's weights a swap would be 800 MiB here
        assert max(memory[3:]) - memory[2] < 0.02 * memory[2]
    finally:
        server.stop()


class Restart(TrainerCallback):
    """Kills the server after the first step and starts another at the same address."""

    def __init__(self, server, again):
        self.server, self.again = server, again

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.server.kill()
            self.server = self.again()


def test_a_restarted_server_is_synced_before_it_generates(tmp_path, tiny_model, tiny_problems):
    def start(port=None):
        return Server(tiny_model, tmp_path / "log", "--for-training", port=port)

    server = start().wait()
    restart = Restart(server, lambda: start(server.port))
    problems = [json.loads(line) for line in (tiny_problems / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": [{"role": "user", "content": p["problem"]}], "answer": p["answer"]} for p in problems]
    args = FuraGRPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=16, num_generations=8, max_completion_length=48,
        max_steps=3, learning_rate=1e-2, max_logp_gap=1e-3, vllm_mode="server", vllm_transport="adapter",
        vllm_server_base_url=server.url, vllm_server_timeout=240, save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = FuraGRPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[restart]
    )
    try:
        engine = trainer.vllm_generation.vllm_client
        trainer.train()  # killed between steps: the next sync sends everything to the new server
        logs = [row for row in trainer.state.log_history if "sync/logp_gap_max" in row]
        gaps = [row["sync/logp_gap_max"] for row in logs]
        assert len(gaps) == 3 and max(gaps) < 1e-3
        assert int(engine.stamp.split("-")[1]) == 2  # steps 2 and 3
        trainer.vllm_generation.sync_weights()
        trained = engine.sent_bytes

        restart.server.kill()  # killed after the sync: what was sent last is sent again before it generates
        restart.server = start(server.port)
        before, (_, completions, logps, _) = engine.stamp, trainer.vllm_generation.generate([[5, 6, 7]] * 8, None, 8)
        assert engine.stamp != before and engine.stamp.endswith("-1") and len(completions) == 8
        assert engine.sent_bytes > 1.5 * trained
        print(f"gaps {gaps}; trained tensors {trained} bytes, everything {engine.sent_bytes} bytes")
        with torch.no_grad():
            ids = torch.tensor([[5, 6, 7, *completions[0]]])
            policy = trainer.model(ids).logits[0, 2:-1].log_softmax(-1)
        expected = policy[range(len(completions[0])), completions[0]]
        torch.testing.assert_close(torch.tensor(logps[0])[:, 0], expected, rtol=0, atol=1e-3)

        restart.server.kill()  # and none comes back
        engine.patience = engine.manager.patience = 1.5
        with pytest.raises(FuraError, match=r"cannot be reached .*tried 3 times"):
            trainer.vllm_generation.generate([[5, 6, 7]] * 8, None, 8)
    finally:
        restart.server.stop()
        trainer.close()
