"""Adapters per request on a real model, on two ranks, and under load. Run by `make soak`."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from multi_cases import gap, make_lora, merged_model, sample, scored
from servers import Server, logprobs_of
from swapping import TEXTS, make_adapter, max_gap, other_base, reference_logprobs
from transformers import AutoTokenizer

from fura_rl.rollout.multi import load_adapter, register

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.soak]


@pytest.fixture(autouse=True)
def own_variables(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def engine(model, **options):
    from vllm import LLM

    register()
    options = {"max_loras": 3, "max_lora_rank": 8, "enforce_eager": True, **options}
    return LLM(str(model), dtype="float32", max_model_len=256, enable_lora=True, **options)


def texts_of(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(text).input_ids for text in TEXTS]


def gaps_of_a_mixed_batch(llm, models, requests, texts):
    pairs = [(name, ids) for ids in texts for name in requests]
    found = sample(llm, [ids for _, ids in pairs], [requests[name] for name, _ in pairs], max_tokens=24)
    gaps = dict.fromkeys(requests, 0.0)
    for (name, ids), row in zip(pairs, found, strict=True):
        gaps[name] = max(gaps[name], gap(models[name], ids, row))
    print(gaps)
    return gaps


def test_a_real_model(tmp_path, monkeypatch):
    """SmolLM2-135M: base, two of FuRA and a LoRA in one batch."""
    model = Path(__file__).parents[3] / "models" / "smollm2-135m"
    if not model.is_dir():
        pytest.skip(f"no model in {model}")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    folders = {name: make_adapter(model, tmp_path / name, seed, std=0.01) for seed, name in enumerate("ab")}
    folders["lora"] = make_lora(model, tmp_path / "lora")
    llm = engine(model)
    requests = {None: None} | {name: load_adapter(llm, name, folder) for name, folder in folders.items()}
    models = {name: merged_model(model, folders.get(name)) for name in requests}
    assert max(gaps_of_a_mixed_batch(llm, models, requests, texts_of(model)).values()) < 1e-4


def test_a_traced_engine_with_dense_weights(tiny_model, tmp_path, monkeypatch):
    """As on CUDA: the model is one traced graph, weights stay as they were loaded, and whether rows have adapters is
    read when the graph runs. vLLM itself does not trace models with LoRA on a CPU."""
    from vllm.config import CompilationMode
    from vllm.model_executor.layers import utils
    from vllm.platforms.cpu import CpuPlatform

    from fura_rl.rollout import multi_names

    check = CpuPlatform.check_and_update_config.__func__

    def traced(platform, config):
        check(platform, config)
        config.compilation_config.mode = CompilationMode.DYNAMO_TRACE_ONCE
        config.compilation_config.backend = "eager"

    def dense(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(traced))
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", dense)
    monkeypatch.setattr(multi_names, "traced_on_cpu", lambda layer: False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = engine(tiny_model, enforce_eager=False)
    assert llm.llm_engine.vllm_config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    texts, requests, models = texts_of(tiny_model), {None: None}, {None: merged_model(tiny_model, None)}
    assert gaps_of_a_mixed_batch(llm, models, requests, texts)[None] < 1e-4  # no row has an adapter yet
    for seed, name in enumerate("ab"):
        folder = make_adapter(tiny_model, tmp_path / name, seed)
        requests[name], models[name] = load_adapter(llm, name, folder), merged_model(tiny_model, folder)
    assert max(gaps_of_a_mixed_batch(llm, models, requests, texts).values()) < 1e-4


def test_two_ranks(tiny_model, tmp_path):
    """Tensor parallelism with processes: whole multipliers where the weight's rows are divided, their own blocks where
    its columns are. What does not fit is refused by both, and the others go on."""
    wide = make_adapter(tiny_model, tmp_path / "wide", 0, target_modules=["q_proj"], block_size={"q_proj": 256})
    mlp = make_adapter(tiny_model, tmp_path / "mlp", 1, target_modules=["v_proj", "gate_proj", "up_proj", "down_proj"])
    late = tmp_path / "late"
    make_adapter(tiny_model, late / "all", 2)
    other_base(make_adapter(tiny_model, late / "other", 3, target_modules=["q_proj"]))
    server = Server(
        tiny_model, tmp_path / "log", "--multi", "--adapter", f"wide={wide}", "--adapter", f"mlp={mlp}",
        "--adapter-dir", str(late), "--tensor-parallel-size", "2", "--distributed-executor-backend", "mp",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
    )  # fmt: skip
    texts = texts_of(tiny_model)
    references = {
        name: reference_logprobs(tiny_model, folder, texts)
        for name, folder in {server.model: None, "wide": wide, "mlp": mlp}.items()
    }
    try:
        server.wait()

        def largest_gap():
            found = {name: [scored(server, name, ids) for ids in texts] for name in references}
            return max(max_gap(found[name], references[name]) for name in references)

        gaps = [largest_gap()]
        # o_proj has as many inputs as q_proj, and so the large blocks that `wide` asks for
        for name, reason in {
            "all": "256 inputs are divided between 2 ranks, and a block of 256 would lie on two of them",
            "other": "another base model",
        }.items():
            body = {"lora_name": name, "lora_path": name}
            response = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=120)
            assert response.status_code != 200 and reason in response.text
            gaps.append(largest_gap())
        print(f"two ranks: largest gaps {gaps}")
        assert max(gaps) < 1e-4
    finally:
        server.stop()


def test_adapters_come_and_go_under_load(tiny_model, adapter_dir, tmp_path):
    """Eight clients ask for random adapters, more of them than slots, while others are loaded and unloaded: every
    response is that of the adapter that it names, and none fails."""
    names = ["a", "b", "c", "d"]  # c and d are a and b again
    named = [word for i, name in enumerate(names) for word in ("--adapter", f"{name}={adapter_dir / 'ab'[i % 2]}")]
    server = Server(
        tiny_model, tmp_path / "log", "--multi", "--adapter-dir", str(adapter_dir), "--max-loras", "2",
        "--max-cpu-loras", "3", *named,
    )  # fmt: skip
    try:
        server.wait()
        texts = texts_of(tiny_model)
        kinds = {server.model: None, "a": "a", "b": "b", "c": "a", "d": "b"}
        answers = {
            (name, i): logprobs_of(server.complete(ids, model=name))
            for name in (server.model, "a", "b")
            for i, ids in enumerate(texts)
        }
        chooser = random.Random(0)
        work = [(chooser.choice(list(kinds)), chooser.randrange(len(texts))) for _ in range(800)]

        def ask(item):
            name, i = item
            found = logprobs_of(server.complete(texts[i], model=name))
            return max_gap([found], [answers[kinds[name] or server.model, i]])

        changes = 0
        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(ask, item) for item in work]
            while not all(future.done() for future in waiting):
                body = {"lora_name": f"extra{changes}", "lora_path": str(adapter_dir / "ab"[changes % 2])}
                response = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=120)
                assert response.status_code == 200, response.text
                extra = logprobs_of(server.complete(texts[0], model=body["lora_name"]))
                assert max_gap([extra], [answers["ab"[changes % 2], 0]]) < 1e-3
                response = httpx.post(f"{server.url}/v1/unload_lora_adapter", json=body, timeout=120)
                assert response.status_code == 200, response.text
                changes += 1
            gaps = [future.result() for future in waiting]
        print(f"{len(gaps)} responses, {changes} adapters loaded and unloaded, largest gap {max(gaps)}")
        assert max(gaps) < 1e-3 and changes >= 10
    finally:
        server.stop()
