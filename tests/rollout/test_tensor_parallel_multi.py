"""A server of two ranks whose requests name their adapters: each answers as its merged transformers model does."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from multi_cases import gap, make_lora, merged_model
from swapping import make_adapter, other_base
from tensor_parallel import CUDA, TOLERANCE, TWO_RANKS, start

pytestmark = TWO_RANKS


@pytest.fixture(scope="module")
def multi(tmp_path_factory, tiny_model, adapter_dir):
    """With two adapters of FuRA and, on a CPU, one of LoRA: vLLM's own kernels for LoRA take no float32 on a GPU."""
    folder = tmp_path_factory.mktemp("multi")
    adapters = {"a": adapter_dir / "a", "b": adapter_dir / "b"}
    options = ["--multi", "--adapter-dir", str(folder)]
    if not CUDA:
        adapters["lora"] = make_lora(tiny_model, folder / "lora")
        options.append("--enable-lora")
    for name, path in adapters.items():
        options += ["--adapter", f"{name}={path}"]
    server = start(tiny_model, folder / "log", *options)
    server.folder, server.adapters = folder, adapters
    try:
        yield server.wait()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def references(multi, tiny_model):
    folders = {multi.model: None, **multi.adapters}
    return {name: merged_model(tiny_model, folder) for name, folder in folders.items()}


def sampled(server, name, ids):
    """Greedy tokens after a prompt and their log-probs. vLLM's LoRA on a CPU cannot score a batch of prompts."""
    response = server.complete(ids, model=name, max_tokens=8, return_tokens_as_token_ids=True)
    assert response.status_code == 200, response.text
    found = response.json()["choices"][0]["logprobs"]
    return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]


def check_sampled(what, model, sequences, answers) -> None:
    found = max(gap(model, ids, answer) for ids, answer in zip(sequences, answers, strict=True))
    print(f"{what}: {found:.1e}")
    assert found < TOLERANCE, what


def test_requests_in_one_batch_each_get_the_adapter_that_they_name(multi, references, sequences):
    work = [(name, ids) for ids in sequences for name in references]
    with ThreadPoolExecutor(len(work)) as pool:
        answers = list(pool.map(lambda item: sampled(multi, *item), work))
    for name, model in references.items():
        own = [answer for (other, _), answer in zip(work, answers, strict=True) if other == name]
        check_sampled(f"a batch's rows of {Path(name).name}", model, sequences, own)
        others = [answer for (other, ids), answer in zip(work, answers, strict=True) if other != name]
        prompts = [ids for other, ids in work if other != name]
        assert min(gap(model, ids, answer) for ids, answer in zip(prompts, others, strict=True)) > 0.1


def test_adapters_come_and_go_while_both_ranks_run(multi, references, tiny_model, adapter_dir, sequences):
    def load(name, folder):
        body = {"lora_name": name, "lora_path": str(folder)}
        return httpx.post(f"{multi.url}/v1/load_lora_adapter", json=body, timeout=120)

    def check_now(name, model):
        check_sampled(f"one by one, {Path(name).name}", model, sequences[:1], [sampled(multi, name, sequences[0])])

    late = make_adapter(tiny_model, multi.folder / "late", seed=3)
    shutil.copytree(adapter_dir / "b", multi.folder / "other")
    for folder, model in ((late, merged_model(tiny_model, late)), ("other", references["b"])):
        assert load("late", folder).status_code == 200
        check_now("late", model)
        body = {"lora_name": "late"}
        assert httpx.post(f"{multi.url}/v1/unload_lora_adapter", json=body, timeout=120).status_code == 200
        assert multi.complete(sequences[0], model="late").status_code == 404
    other_base(shutil.copytree(adapter_dir / "a", multi.folder / "spoilt"))
    refused = load("spoilt", "spoilt")
    assert refused.status_code != 200 and "another base model" in refused.text
    for name, model in references.items():
        check_now(name, model)
