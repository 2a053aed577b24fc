"""Engines of two ranks, real ones: what they say is what the merged transformers model says.

On a machine with two GPUs the same tests run there, in float32 too; else on two cores, with vLLM's CPU build. Groups of
tests share a server and may run beside each other: `pytest -n 5 --dist loadgroup`.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from accelerate import Accelerator
from multi_cases import gap, make_lora, merged_model, scored
from servers import Server
from swapping import make_adapter, max_gap, other_base, other_shape, reference_logprobs, truncated
from syncs import make_policy
from syncs import reference_logprobs as policy_logprobs
from transformers import AutoTokenizer
from trl.generation import vllm_generation

from fura_rl.errors import FuraError
from fura_rl.rollout.client import VERSION_HEADER, FuraClient
from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.rollout.probe import probe_sequences, score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
CORES = sorted(os.sched_getaffinity(0))
DEVICES = torch.cuda.device_count() if CUDA else len(CORES)
# On a GPU vLLM's attention kernel multiplies float32 as TF32, unless Triton is told otherwise as below.
TOLERANCE = 1e-3 if CUDA else 1e-4

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(DEVICES < 2, reason=f"two ranks need two {'GPUs' if CUDA else 'cores'}: there is one"),
]

if CUDA:
    OPTIONS = ["--enforce-eager", "--gpu-memory-utilization", "0.2", "--kv-cache-memory-bytes", str(2**30)]
    OPTIONS += ["--disable-custom-all-reduce"]
    ENVIRONMENT = {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "TRITON_F32_DEFAULT": "ieee",
    }
else:
    OPTIONS, ENVIRONMENT = [], {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CORES[:2]))}


def start(model, log, *options, **environment) -> Server:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environment = {**ENVIRONMENT, "PYTHONPATH": path, **environment}
    return Server(model, log, "--tensor-parallel-size", "2", *OPTIONS, *options, **environment)


def check(what, found, expected) -> None:
    worst = max_gap(found, expected)
    print(f"{what}: {worst:.1e}")
    assert worst < TOLERANCE, what


# -- one adapter at a time, merged


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


@pytest.mark.xdist_group("merged")
def test_merged_adapters_follow_one_another_without_drift(merged, adapter_dir, sequences, tiny_model):
    """A, B, off, A: the second time A gives the same bits as the first."""
    client, seen = FuraClient(merged.url), {}
    for count, name in enumerate(["a", "b", None, "a"], start=1):
        status = client.off() if name is None else client.swap(name)
        assert status["version"].endswith(f"-{count}") and status["name"] == name
        found = merged_scores(merged, sequences)
        check(f"merged {name}", found, reference_logprobs(tiny_model, name and adapter_dir / name, sequences))
        assert seen.setdefault(name, found) == found
        assert merged.complete(sequences[0]).headers[VERSION_HEADER] == status["version"]
    assert min(max_gap(seen["a"], seen["b"]), max_gap(seen["a"], seen[None])) > 0.1


@pytest.mark.xdist_group("merged")
def test_a_refusal_keeps_the_old_weights_of_both_ranks(merged, adapter_dir, sequences):
    client = FuraClient(merged.url)
    client.swap("b")
    before = client.version(), merged_scores(merged, sequences[:1])
    for spoil, reason in [(truncated, "truncated"), (other_base, "another base"), (other_shape, "this model has 512")]:
        spoil(shutil.copytree(adapter_dir / "a", merged.folder / spoil.__name__))
        with pytest.raises(FuraError, match=reason):
            client.swap(spoil.__name__)
        assert (client.version(), merged_scores(merged, sequences[:1])) == before


@pytest.mark.xdist_group("merged")
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


@pytest.mark.xdist_group("merged")
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


@pytest.mark.xdist_group("merged")
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


# -- adapters per request


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
    response = server.complete(ids, model=name, return_tokens_as_token_ids=True)
    assert response.status_code == 200, response.text
    found = response.json()["choices"][0]["logprobs"]
    return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]


def check_sampled(what, model, sequences, answers) -> None:
    found = max(gap(model, ids, answer) for ids, answer in zip(sequences, answers, strict=True))
    print(f"{what}: {found:.1e}")
    assert found < TOLERANCE, what


@pytest.mark.xdist_group("multi")
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


@pytest.mark.xdist_group("multi")
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


# -- the engine of a training job, one rank in each of its processes


@pytest.mark.parametrize(
    "sleep_level",
    [pytest.param(level, marks=pytest.mark.xdist_group(f"training{level}")) for level in ([0, 1, 2] if CUDA else [0])],
)
def test_a_training_run_whose_engine_is_spread_over_its_ranks(tmp_path, tiny_model, tiny_problems, sleep_level):
    """Two steps at a high learning rate; `max_logp_gap` would stop the run on either rank."""
    recipe = tmp_path / "recipe.yaml"
    engine = {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "disable_custom_all_reduce": True} if CUDA else {}
    options = dict(
        model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=16, num_generations=8,
        max_completion_length=32, learning_rate=1e-2, save_strategy="no", max_logp_gap=1e-3, dtype="float32",
        bf16=False, vllm_max_model_length=256, vllm_tensor_parallel_size=2, vllm_gpu_memory_utilization=0.2,
        vllm_engine_kwargs=engine, vllm_enable_sleep_mode=sleep_level > 0, vllm_sleep_level=sleep_level or 2,
        benchmarks=[str(tiny_problems / "test.jsonl")], benchmark_max_tokens=32,
    )  # fmt: skip
    recipe.write_text(yaml.safe_dump(options))
    job = [str(Path(__file__).parent / "tensor_parallel_job.py"), str(recipe), str(tmp_path)]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *job],
        capture_output=True, text=True, timeout=500,
        env={**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"} | ({} if CUDA else {"ACCELERATE_USE_CPU": "true"}),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    ranks = [list(map(json.loads, (tmp_path / f"rank{i}.jsonl").read_text().splitlines())) for i in range(2)]
    for number, (first, second) in enumerate(zip(*ranks, strict=True), start=1):
        assert first["version"] == second["version"] == number
        assert (first["ranks"], first["rank"], second["ranks"], second["rank"]) == (2, 0, 2, 1)
        assert first["scores"] == second["scores"]
    scores = [line["scores"] for line in ranks[0]]
    assert len(scores) == 3 and max_gap([scores[0]], [scores[-1]]) > 1e-2  # before each step and at the end
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = {key: [row[key] for row in logged if key in row] for key in ("sync/probe_gap_max", "sync/logp_gap_max")}
    print(f"training, sleep level {sleep_level}: {gaps}")
    assert len(gaps["sync/logp_gap_max"]) == 2 and max(map(max, gaps.values())) < TOLERANCE
    assert [row["step"] for row in json.loads((tmp_path / "run" / "summary.json").read_text())["evaluations"]] == [0, 2]
