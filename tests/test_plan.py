"""`fura-rl plan` and the check before a run: what fits, what does not, and what is said then."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fura_rl.cli import app
from fura_rl.errors import FuraError
from fura_rl.memory import STRATEGIES, ModelSizes, Strategy
from fura_rl.plan import GIB, MARGIN, Run, check_memory, misfit, strategy_of
from fura_rl.plan_command import remarks
from fura_rl.train_grpo import main, parse

FURA_7B = ModelSizes(
    weights=7_615_616_512, trained=118_171_648, basis=118_184_192, layers=28, hidden=3584, intermediate=18944,
    query=3584, key_value=512, vocabulary=152_064, head_norms=False,
    matrices=((3584, 3584), (512, 3584), (512, 3584), (3584, 3584), (18944, 3584), (18944, 3584), (3584, 18944)) * 28,
)  # fmt: skip


def options(tiny_model, tmp_path, **changes):
    values = {
        "model_name_or_path": tiny_model, "dataset_name": "x.jsonl", "output_dir": tmp_path, "num_generations": 8,
        "per_device_train_batch_size": 64, "max_completion_length": 512, **changes,
    }  # fmt: skip
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


@pytest.fixture
def plan(tiny_model, tmp_path):
    """A run of a 7B model, with options of its own."""

    def made(gpu_memory=80.0, strategy="ddp", gpus=1, **changes):
        _, training, model, adapter = parse(options(tiny_model, tmp_path, **changes))
        return Run(FURA_7B, training, model, adapter, STRATEGIES[strategy], gpus, gpu_memory * GIB, prompt_tokens=256)

    return made


def command(*words):
    result = CliRunner().invoke(app, ["plan", *words])
    return result, " ".join(result.output.split())


def test_command_says_whether_it_fits(tiny_model, tmp_path):
    common = options(tiny_model, tmp_path)
    fits, said = command("--gpu-memory", "80", *common)
    assert fits.exit_code == 0, said
    for words in ("activations", "tokens of cache", "sent by a GPU in a step: 0 MiB", "batch_size that fits: "):
        assert words in said
    small, said = command("--gpu-memory", "1.8", *common)
    assert small.exit_code == 1 and "does not fit into 1.8 GiB" in said and "most of it for" in said
    several, said = command("--gpus", "4", "--strategy", "zero3", *common, "--vllm_mode", "server")
    assert several.exit_code == 0 and "gathered layers" in said and "sync to a server, merged" in said
    assert "engine" not in said and "tokens of cache" not in said
    with pytest.raises(FuraError, match="Unknown strategy 'zero4': use one of single_gpu, ddp, zero1"):
        CliRunner().invoke(app, ["plan", "--strategy", "zero4", *common], catch_exceptions=False)


def test_a_plan_for_a_gpu_is_made_without_one(tiny_model, tmp_path):
    """Options that this machine's launch would refuse: sleeping, an engine on two GPUs."""
    common = options(tiny_model, tmp_path, vllm_enable_sleep_mode=True, vllm_sleep_level=1, vllm_tensor_parallel_size=2)
    result, said = command("--gpus", "2", *common)
    assert result.exit_code == 0 and "asleep while training (level 1)" in said
    with pytest.raises(FuraError, match="vllm_tensor_parallel_size=2 does not divide 3 GPUs"):
        CliRunner().invoke(app, ["plan", "--gpus", "3", *common], catch_exceptions=False)


def test_phases_of_an_engine(plan):
    awake, asleep, server = plan(), plan(vllm_enable_sleep_mode=True), plan(vllm_mode="server")
    share = awake.engine_share
    assert share == awake.training.vllm_gpu_memory_utilization * 80 * GIB
    train, generate = awake.parts()
    assert train["engine (its share of the GPU)"] == generate["engine (its share of the GPU)"] == share
    train_asleep, generate_asleep = asleep.parts()
    assert "engine (its share of the GPU)" not in train_asleep and generate_asleep == generate
    assert sum(train.values()) - sum(train_asleep.values()) == share
    assert server.parts()[0] == train_asleep and server.engine_share == 0
    assert {name for name in train if name not in generate} == {"activations", "head"}
    assert asleep.largest_batch() > awake.largest_batch()
    kept = [line for line in remarks(plan(vllm_enable_sleep_mode=True, vllm_sleep_level=1)) if "asleep" in line]
    assert "keeps 14.2 GiB" in kept[0]


def test_a_cache_of_fixed_size_counts_whatever_the_share_is(plan):
    """An engine of less than its weights, by its share of the GPU: vLLM does not look at that then."""
    engine = {"vllm_gpu_memory_utilization": 0.1, "vllm_engine_kwargs": '{"kv_cache_memory_bytes": 4294967296}'}
    small = {"per_device_train_batch_size": 8, "max_completion_length": 256}
    run = plan(**engine, **small)
    assert misfit(run) is None
    for phase in run.parts():
        assert phase["engine (its weights and cache)"] == 2 * FURA_7B.weights + 4 * GIB
        assert "engine (its share of the GPU)" not in phase
    assert "has 4.0 GiB: 74,898 tokens of cache" in remarks(run)[0]  # 28 layers x 2 x 512 numbers of 2 bytes a token
    reason = misfit(plan(**{**engine, "vllm_engine_kwargs": '{"kv_cache_memory_bytes": 64424509440}'}, **small))
    assert reason is not None and "lower kv_cache_memory_bytes, or set vllm_enable_sleep_mode" in reason
    asleep = plan(**engine, **small, vllm_enable_sleep_mode=True)
    assert "engine (its weights and cache)" not in asleep.parts()[0]


def test_the_largest_batch_fits_and_the_next_does_not(plan):
    for run in (plan(), plan(gradient_checkpointing=True), plan(load_in_4bit=True), plan(strategy="fsdp2", gpus=8)):
        batch = run.largest_batch()
        assert run.peak(batch) <= run.memory < run.peak(batch + 1)
    assert plan(gpu_memory=16).largest_batch() == 0
    assert plan().largest_batch(checkpointing=True) == plan(gradient_checkpointing=True).largest_batch()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "training needs .* most of it for activations .*lower per_device_train_batch_size from 64 to 10 and raise "
             "gradient_accumulation_steps or set gradient_checkpointing"),
        ({"gpu_memory": 24, "vllm_mode": "server"}, "set gradient_checkpointing"),
        ({"gpu_memory": 12, "vllm_mode": "server", "per_device_train_batch_size": 2, "num_generations": 2},
         "base weights .*set load_in_4bit, or split the weights over GPUs with ZeRO-3 or FSDP2"),
        ({"gpu_memory": 4, "load_in_4bit": True, "strategy": "fsdp2", "gpus": 2, "per_device_train_batch_size": 2,
          "vllm_mode": "server", "num_generations": 2, "max_completion_length": 16, "gradient_checkpointing": True},
         "base weights .*train a smaller"),
        ({"gpu_memory": 5, "load_in_4bit": True, "strategy": "zero3", "gpus": 8, "per_device_train_batch_size": 2,
          "vllm_mode": "server", "num_generations": 2, "max_completion_length": 16, "gradient_checkpointing": True},
         "DeepSpeed's buckets .*lower reduce_bucket_size"),
        ({"vllm_enable_sleep_mode": True, "vllm_gpu_memory_utilization": 0.9, "per_device_train_batch_size": 8},
         "generating needs .* engine .*lower vllm_gpu_memory_utilization"),
        ({"vllm_gpu_memory_utilization": 0.1},
         "The engine's share of the GPU is 8.0 GiB, and its weights alone take 14.2: raise vllm_gpu_memory_util"),
        ({"method": "full", "vllm_mode": "server", "per_device_train_batch_size": 8}, "train an adapter"),
    ],
)  # fmt: skip
def test_what_to_change_is_said(plan, changes, words):
    reason = misfit(plan(**changes))
    assert reason is not None and reason.endswith(".") and reason.count(". ") == 0
    assert re.search(words, reason), reason


def test_what_a_server_gets(plan):
    merged, pushed, exact = (
        plan(vllm_mode="server", **more).network()
        for more in ({}, {"vllm_transport": "adapter"}, {"vllm_transport": "adapter", "vllm_push": "exact"})
    )
    assert merged["sync to a server, merged"] == 2 * FURA_7B.weights
    assert pushed["sync to a server, adapter only"] == FURA_7B.trained
    assert exact["sync to a server, adapter only"] == 4 * FURA_7B.trained
    assert not any("sync" in reason for reason in plan().network())


def test_a_reference_model_is_counted_where_there_is_one(plan):
    held = plan(method="full", beta=0.01).parts()[1]
    assert held["reference model"] == 4 * FURA_7B.weights
    assert (
        "reference model" not in plan(beta=0.01).parts()[1] and "reference model" not in plan(method="full").parts()[1]
    )


def test_a_run_is_refused_beyond_the_margin_only(tiny_model, tmp_path):
    _, training, model, adapter = parse(options(tiny_model, tmp_path))
    sizes = ModelSizes.of(str(tiny_model), adapter)
    needed = Run(sizes, training, model, adapter, Strategy(), 1, 0.0, prompt_tokens=0).peak()
    share = training.vllm_gpu_memory_utilization
    least = needed / (1 - share)  # without the engine, whose share is of the GPU
    check_memory(training, model, adapter, memory=least)
    edge = needed / (1 + MARGIN - share)
    check_memory(training, model, adapter, memory=edge * 1.01)
    with pytest.raises(FuraError, match=r"does not fit into .* GiB: .*; check_memory: false starts it all the same\.$"):
        check_memory(training, model, adapter, memory=edge * 0.99)
    check_memory(replace_option(training, check_memory=False), model, adapter, memory=edge * 0.5)


def replace_option(training, **changes):
    for name, value in changes.items():
        setattr(training, name, value)
    return training


def test_what_is_not_planned_for_is_not_refused(tiny_model, tmp_path, monkeypatch):
    engine = {"vllm_engine_kwargs": '{"quantization": "fp8"}'}
    for changes in ({"method": "dora"}, engine, {"method": "full", "optim": "adafactor"}):
        _, training, model, adapter = parse(options(tiny_model, tmp_path, **changes))
        check_memory(training, model, adapter, memory=0.1 * GIB)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    check_memory(*parse(options(tiny_model, tmp_path))[1:], memory=0.1 * GIB)
    monkeypatch.undo()
    _, training, model, adapter = parse(options("/no/such/model", tmp_path))
    check_memory(training, model, adapter, memory=0.1 * GIB)
    _, training, model, adapter = parse(options(tiny_model, tmp_path))
    if training.device.type == "cpu":
        check_memory(training, model, adapter)  # main memory is not planned for


def test_training_asks_before_it_loads_anything(tiny_model, tiny_problems, tmp_path, monkeypatch, capsys):
    """The job itself, on a device that says how little it has."""
    words = options(tiny_model, tmp_path / "run", use_vllm=False)
    words[words.index("--dataset_name") + 1] = str(tiny_problems / "train.jsonl")
    real = check_memory
    monkeypatch.setattr("fura_rl.train_grpo.check_memory", lambda *groups: real(*groups, memory=1.2 * GIB))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert (
        "does not fit into 1.2 GiB: with completions of full length, training needs" in said and said.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_the_strategy_of_a_launch(tiny_model, tmp_path, monkeypatch):
    common, before = options(tiny_model, tmp_path), torch.distributed.is_initialized()  # by an engine of another test
    assert strategy_of(parse(common)[1]) == Strategy()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert strategy_of(parse(common)[1]) == Strategy(fsdp=True)
    assert torch.distributed.is_initialized() == before


@pytest.mark.slow
def test_a_deepspeed_option_of_the_recipe_counts(tiny_model, tmp_path):
    """In a process of its own: DeepSpeed's settings stay with a process. ZeRO-3 would also split what is counted."""
    pytest.importorskip("deepspeed", reason="the extra 'deepspeed' is not installed")
    common = options(tiny_model, tmp_path, use_vllm=False)
    recipe = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero3.json"
    command = [sys.executable, "-m", "fura_rl.cli", "plan", "--gpus", "2", *common, "--deepspeed", str(recipe)]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    named, said = CliRunner().invoke(app, ["plan", "--gpus", "2", "--strategy", "zero3", *common]), process.stdout
    assert "gathered layers" in said and "weights, gathered for the sync" in said
    assert said.splitlines()[-5:] == named.output.splitlines()[-5:]
