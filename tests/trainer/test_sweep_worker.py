"""Sweeps whose runs share a process and an engine: what comes out is what processes of their own give."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fura_rl.errors import FuraError
from fura_rl.rewards.memory import peak_mib
from fura_rl.rollout import shared
from fura_rl.trainer.sweep import Slot, SweepRun, sweep_command
from fura_rl.trainer.sweep_worker import RunWorker, can_share, release_memory, restore_environment

OF_THE_MACHINE = ("time", "seconds", "per_second", "memory", "cache_hits")
RATE = {"learning_rate": 1e-3}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model, tiny_problems):
    """Writes a sweep's file over the tiny model; returns its path and the folder of its runs."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # the module's environment is put back

    def write(methods, **options):
        folder = tmp_path_factory.mktemp("sweep")
        recipe = dict(
            model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
            max_steps=2, per_device_train_batch_size=8, num_generations=8, max_completion_length=24,
            vllm_max_model_length=128, benchmarks=[str(tiny_problems / "test.jsonl")], benchmark_max_tokens=24,
            benchmark_temperature=1.0, save_strategy="no",
        )  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **options}))
        content = {"recipe": str(folder / "recipe.yaml"), "output_dir": str(folder / "runs"), "methods": methods}
        path = folder / "sweep.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path, folder / "runs"

    return write


@pytest.fixture(scope="module")
def shared_runs(sweep):
    """The folders of four runs by name, made by one sweep: the first fails, the last needs an engine of its own."""
    methods = {
        "broken": {"method": "fura", "dataset_name": "nothing.jsonl"},
        "full": RATE,
        "fura": RATE,
        "longer": {"method": "fura", **RATE, "vllm_max_model_length": 160},
    }
    path, folder = sweep(methods)
    with pytest.raises(FuraError, match=r"1 of the sweep's runs failed \(broken-seed=1\)"):
        sweep_command(path)
    return {name: folder / f"{name}-seed=1" for name in methods}


def results(folder):
    """What a run has measured, answered and trained, without what differs from process to process."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    texts = {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("step_*.jsonl"))}
    weights = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    assert len(texts) == 4 and len(weights) == 1  # rollouts of two steps, answers before and after
    metrics = [{k: v for k, v in line.items() if not any(word in k for word in OF_THE_MACHINE)} for line in lines]
    return {"metrics": metrics, **texts, **weights}


def process_of(folder):
    return json.loads((folder / "run.json").read_text())["pid"]


@pytest.mark.slow
@pytest.mark.vllm
def test_runs_in_one_process_equal_runs_in_their_own(sweep, shared_runs):
    """After full fine-tuning every weight of the engine is another: the next run must not sample from any of them."""
    path, own = sweep({"fura": RATE})
    sweep_command(path, share_engine=False)
    assert process_of(shared_runs["full"]) == process_of(shared_runs["fura"]) != process_of(own / "fura-seed=1")
    assert results(shared_runs["fura"]) == results(own / "fura-seed=1")


@pytest.mark.slow
@pytest.mark.vllm
def test_after_a_run_that_fails_and_for_another_engine_there_is_a_new_process(shared_runs):
    assert "dataset file nothing.jsonl does not exist" in (shared_runs["broken"] / "log.txt").read_text()
    assert "other values of max_model_len" in (shared_runs["longer"] / "log.txt").read_text()
    assert process_of(shared_runs["longer"]) != process_of(shared_runs["fura"])
    assert all(json.loads((shared_runs[n] / "summary.json").read_text())["steps"] == 2 for n in ("full", "longer"))


@pytest.mark.slow
@pytest.mark.vllm
def test_ctrl_c_of_a_sweep_ends_its_worker_with_a_checkpoint(sweep):
    path, folder = sweep({"fura": RATE, "lora": RATE}, max_steps=100_000)
    command = [sys.executable, "-m", "fura_rl.cli", "sweep", str(path)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = folder / "fura-seed=1"
    try:
        deadline = time.monotonic() + 1200
        while not ((run / "metrics.jsonl").exists() and '"loss"' in (run / "metrics.jsonl").read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        worker = process_of(run)
        process.send_signal(signal.SIGINT)  # the sweep's process only, as a scheduler does
        process.wait(600)
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert list(run.glob("checkpoint-*")) and not (folder / "lora-seed=1").exists()


def test_after_an_interruption_no_run_is_begun(tmp_path):
    """Ctrl-C may come while a slot waits for one process to end and is about to start the next."""
    worker = RunWorker(dict(os.environ))
    worker.interrupt()
    assert worker.make(tmp_path / "recipe.yaml", tmp_path / "log.txt") != 0
    assert worker.process is None and not (tmp_path / "log.txt").exists()
    slot = Slot()
    slot.worker.interrupt()
    for number, options in enumerate(({}, {"use_vllm": False})):
        folder = tmp_path / str(number)
        assert not slot.make(SweepRun("fura", "", 1, {**options, "max_steps": 1}, folder))
        assert not (folder / "log.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_asks_something_gets_no_answer(tmp_path):
    """The process's standard input is the sweep's requests: `input()` in a run would wait for the next."""
    command = [sys.executable, "-m", "fura_rl.trainer.sweep_worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while os.readlink(f"/proc/{process.pid}/fd/0") != os.devnull:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.stdin.close()
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep a process's peak")
def test_a_run_does_not_report_the_memory_of_the_one_before():
    held = bytearray(b"x") * 400 * 2**20
    before = peak_mib()
    del held
    release_memory()
    assert peak_mib() < before - 300


def test_what_engines_compile_is_kept_apart_where_vllm_would_keep_it(monkeypatch):
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch")
    assert "VLLM_CACHE_ROOT" not in Slot().environment
    assert Slot(number=1).environment["VLLM_CACHE_ROOT"] == "/scratch/vllm/sweep-1"
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/other")
    assert Slot(number=2).environment["VLLM_CACHE_ROOT"] == "/other/sweep-2"


def test_only_colocated_engines_that_stay_awake_are_shared():
    assert can_share({})
    for option in ({"use_vllm": False}, {"vllm_mode": "server"}, {"vllm_enable_sleep_mode": True}, {"fsdp": "x"},
                   {"full_determinism": True}, {"tf32": True}):  # fmt: skip
        assert not can_share(option)


def test_a_kept_engine_brings_its_random_numbers_back():
    made = []

    def make(**arguments):
        shared.torch.manual_seed(0)
        made.append(arguments)
        return object()

    arguments = {"model": "m", "enable_sleep_mode": False}
    with shared.engines_are_kept():
        first = shared.engine(make, arguments)
        drawn = shared.torch.rand(4)
        shared.torch.manual_seed(7)
        assert shared.engine(make, dict(arguments)) is first and len(made) == 1
        assert shared.torch.rand(4).equal(drawn)
        with pytest.raises(shared.OtherEngineError, match="other values of model"):
            shared.engine(make, {**arguments, "model": "n"})
        assert shared.engine(make, {**arguments, "enable_sleep_mode": True}) is not first
    assert shared.engine(make, arguments) is not first


def test_what_a_run_has_set_is_taken_back_but_not_what_its_engine_reads(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("VLLM_OF_A_TEST", "1")
    before = {**os.environ, "MASTER_PORT": "2"}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("VLLM_OF_A_TEST", "2")
    restore_environment(before)
    assert os.environ["MASTER_PORT"] == "2" and "RANK" not in os.environ and os.environ["VLLM_OF_A_TEST"] == "2"
