"""A run that was killed, however often and whenever, ends as if nothing had happened."""

import json
import random
import shutil
import signal
import time

import pytest

SEED = 11


@pytest.fixture
def whole(start, recipe, tmp_path):
    """The run that nothing interrupts."""
    run = start({**recipe, "output_dir": str(tmp_path / "whole")})
    assert run.wait() == 0, run.output()[-3000:]
    return run


def rollouts(run):
    return {path.name: path.read_text() for path in (run.directory / "completions").glob("step_*.jsonl")}


def check_equal(run, whole):
    """Metrics, rollouts and summary of a run are those of `whole`."""
    assert run.metrics() == whole.metrics()
    assert rollouts(run) == rollouts(whole)
    summary, expected = (json.loads((r.directory / "summary.json").read_text()) for r in (run, whole))
    assert summary["generated_tokens"] == expected["generated_tokens"] and summary["steps"] == expected["steps"]
    assert [e["step"] for e in summary["evaluations"]] == [e["step"] for e in expected["evaluations"]]
    adapter = "adapter_model.safetensors"
    assert (run.directory / adapter).read_bytes() == (whole.directory / adapter).read_bytes()


@pytest.mark.slow
def test_interrupted_runs_equal_the_whole_one(start, recipe, whole):
    """SIGKILL at a random moment, SIGKILL in the middle of a checkpoint, SIGTERM; then a damaged checkpoint."""
    steps = [line["step"] for line in whole.metrics() if "loss" in line]
    assert steps == [2, 4, 6, 8, 10, 12] and whole.checkpoints() == [9, 12]
    rng = random.Random(SEED)
    resuming = {"resume_from_checkpoint": "latest"}

    run = start(recipe, **resuming)  # nothing to resume yet: the same command can always be used
    run.until_step(rng.randint(0, 4))
    time.sleep(rng.random())
    run.kill()

    run = start(recipe, **resuming)
    run.kill_in_checkpoint(5)
    assert list(run.directory.glob(".checkpoint-*"))

    before = run.checkpoints()
    run = start(recipe, **resuming)
    run.until(lambda: run.checkpoints() > before)
    run.signal(signal.SIGTERM)
    assert run.wait() == 0
    assert "Stopped by SIGTERM after step" in run.output()
    step = run.checkpoints()[-1]
    assert f"checkpoint-{step} is written" in run.output() and step < 12

    run = start(recipe, **resuming)
    assert run.wait() == 0, run.output()[-3000:]
    assert f"resuming from {run.directory / f'checkpoint-{step}'}" in run.output()
    check_equal(run, whole)

    damaged = whole.directory / "checkpoint-12" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    copy = shutil.copytree(whole.directory, whole.directory.with_name("copy"))
    run = start({**recipe, "output_dir": str(copy)}, **resuming)
    assert run.wait() == 0, run.output()[-3000:]
    assert "optimizer.pt has changed since it was written. It is skipped" in run.output()
    assert f"resuming from {copy / 'checkpoint-9'}" in run.output()
    check_equal(run, whole)


@pytest.mark.soak
@pytest.mark.vllm
def test_ten_kills_with_the_engine(start, recipe, tmp_path):
    """The same with vLLM, killed at ten random moments, in start-up, generation, training and checkpoints alike."""
    recipe = {**recipe, "use_vllm": True, "max_steps": 60, "benchmark_steps": 20, "save_steps": 2}
    recipe["vllm_engine_kwargs"] = {"max_num_seqs": 32}
    whole = start({**recipe, "output_dir": str(tmp_path / "whole")})
    assert whole.wait() == 0, whole.output()[-3000:]
    rng = random.Random(SEED)
    for kill in range(10):
        run = start(recipe, resume_from_checkpoint="latest")
        before = max(run.checkpoints(), default=0)
        if kill % 3 == 2:
            run.kill_in_checkpoint(before + rng.randint(1, 3))
        else:
            run.until_step(before + rng.randint(0, 8))
            time.sleep(rng.random())
            run.kill()
        print(f"kill {kill + 1}: resumed at {before}, checkpoints then {run.checkpoints()}")
    run = start(recipe, resume_from_checkpoint="latest")
    assert run.wait() == 0, run.output()[-3000:]
    check_equal(run, whole)
