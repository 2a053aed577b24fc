"""Checkpoints: whole or not there, found out when damaged, few, and without the base model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fura_rl.errors import FuraError
from fura_rl.trainer import checkpoints
from fura_rl.trainer import signals as stop_signals

# --- files ------------------------------------------------------------------------------------------------------------


def write(run, step, **facts):
    """A small checkpoint, written as the trainer does."""
    inner = checkpoints.partial_path(run, step) / f"checkpoint-{step}"
    inner.mkdir(parents=True)
    (inner / "a.bin").write_bytes(bytes(range(256)) * step)
    (inner / "b.json").write_text(json.dumps({"step": step}))
    checkpoints.seal(inner, checkpoints.checkpoint_path(run, step), step=step, **facts)
    inner.parent.rmdir()
    return run / f"checkpoint-{step}"


def test_a_sealed_checkpoint_is_whole(tmp_path):
    path = write(tmp_path, 3)
    manifest = checkpoints.verify(path)
    assert manifest["step"] == 3 and set(manifest["files"]) == {"a.bin", "b.json"}
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "a.bin").unlink(), "lacks a.bin"),
        (lambda path: os.truncate(path / "a.bin", 100), "a.bin has 100 bytes instead of 512"),
        (lambda path: (path / "a.bin").write_bytes(bytes(512)), "a.bin has changed since it was written"),
        (lambda path: (path / "manifest.json").unlink(), "has no readable manifest.json"),
        (lambda path: os.truncate(path / "manifest.json", 50), "has no readable manifest.json"),
        (lambda path: (path / "manifest.json").write_text("[]"), "has no readable manifest.json"),
    ],
)
def test_damage_is_found_and_the_one_before_is_used(tmp_path, caplog, damage, words):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    damage(bad)
    with pytest.raises(checkpoints.DamagedCheckpoint, match=words):
        checkpoints.verify(bad)
    assert checkpoints.find_checkpoint("latest", tmp_path) == good
    assert words in caplog.text and "skipped for the one before it" in caplog.text
    with pytest.raises(FuraError, match=words):
        checkpoints.find_checkpoint(str(bad), tmp_path)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    os.truncate(write(tmp_path, 2) / "a.bin", 1)
    checkpoints.verify(write(tmp_path, 2))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2"]


def test_half_written_ones_do_not_count_and_are_removed(tmp_path):
    good = write(tmp_path, 1)
    (tmp_path / ".checkpoint-9.partial" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "checkpoint-old").mkdir()  # a user's own folder
    assert checkpoints.find_checkpoint("latest", tmp_path) == good
    checkpoints.remove_partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-old"]


def test_the_newest_and_the_best_stay(tmp_path):
    for step, reward in ((1, 0.2), (2, 0.9), (3, 0.1), (10, 0.3), (20, 0.9)):
        write(tmp_path, step, metrics={"reward": reward})
    best = checkpoints.best_checkpoint(tmp_path, "reward", greater_is_better=True)
    assert best == tmp_path / "checkpoint-2"
    assert checkpoints.best_checkpoint(tmp_path, "reward", greater_is_better=False) == tmp_path / "checkpoint-3"
    assert checkpoints.best_checkpoint(tmp_path, "kl", greater_is_better=False) is None
    checkpoints.prune(tmp_path, 2, best)
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [2, 10, 20]
    checkpoints.prune(tmp_path, 0, None)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 3


def test_a_full_disk_is_one_sentence_and_leaves_the_one_before(tmp_path):
    """On a real file system of 1 MiB, with each library that writes checkpoints."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        good = write(tmp_path, 1)
        partial = checkpoints.partial_path(tmp_path, 2)
        large = torch.zeros(2**19)
        writers = {
            "torch": lambda: torch.save(large, partial / "optimizer.pt"),
            "safetensors": lambda: save_file({"x": large}, partial / "adapter.safetensors"),
            "text": lambda: (partial / "progress.json").write_text("0" * 2**21),
        }
        for name, write_file in writers.items():
            partial.mkdir()
            with pytest.raises(FuraError, match=r"disk is full: .*/checkpoint-1 is whole"):  # noqa: SIM117
                with checkpoints.cleaned_up(partial):
                    write_file()
            assert sorted(os.listdir(tmp_path)) == ["checkpoint-1"], name
        checkpoints.verify(good)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# --- of a run ---------------------------------------------------------------------------------------------------------


def peak_at_step_two(completions, trainer_state, **_):
    """Rewards that differ in a group, and are best in the second step."""
    best = 10.0 * (trainer_state.global_step + 1 == 2)
    return [best + len(completion) + i for i, completion in enumerate(completions)]


def test_what_a_checkpoint_holds(train, tmp_path, tiny_model):
    """The newest and the best by reward stay; no base model, no pickle that needs trust; the run knows the best."""
    trainer = train(
        peak_at_step_two, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1,
        metric_for_best_model="reward", steps_per_generation=1,
    )  # fmt: skip
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert trainer.best_checkpoint() == tmp_path / "checkpoint-2"
    newest = tmp_path / "checkpoint-4"
    assert set(checkpoints.verify(newest)["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "optimizer.pt",
        "progress_0.json", "rng_state.pth", "scheduler.pt", "tokenizer.json", "tokenizer_config.json",
        "trainer_state.json",
    }  # fmt: skip
    with safe_open(newest / "adapter_model.safetensors", "pt") as file:
        assert all(".fura_blocks." in name for name in file.keys())  # noqa: SIM118
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(newest / name, weights_only=True)
    assert not list(tmp_path.rglob("training_args.bin"))


def test_a_metric_that_nobody_logs(train):
    with pytest.raises(FuraError, match=r"metric_for_best_model=rewrd is not logged; did you mean reward\?"):
        train(peak_at_step_two, max_steps=1, metric_for_best_model="rewrd")


def test_options_that_change_what_a_step_is(train, tmp_path):
    """They must be those of the checkpoint; others may change, here to a longer run."""
    options = dict(save_strategy="steps", save_steps=1)
    train(peak_at_step_two, max_steps=1, **options)
    with pytest.raises(FuraError, match=r"checkpoint-1 was written with num_generations=4, but this run has .*=8"):
        train(peak_at_step_two, max_steps=3, num_generations=8, resume="latest", **options)
    trainer = train(peak_at_step_two, max_steps=3, resume="latest", **options)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3]


# --- signals ----------------------------------------------------------------------------------------------------------

SLEEPER = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])  # without the seconds that its package takes
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
signals.SAME_REQUEST_S = 8  # this process may be kept waiting
with signals.StopSignals() as stop:
    stop.deferred = True
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
        if stop.received:
            print(stop.received, flush=True)
"""


def test_a_second_signal_ends_the_process():
    number = signal.SIGTERM
    command = [sys.executable, "-c", SLEEPER, stop_signals.__file__]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None
        process.send_signal(number)
        assert process.stdout.readline() == number.name + "\n"
        process.send_signal(number)  # what a launcher passes on in the same moment
        time.sleep(8.5)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == -number
        assert "a checkpoint written; a second signal stops at once" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()
