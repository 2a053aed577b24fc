"""Sweeps: which runs they are made of, what is made again, and the table."""

import json
import subprocess
import sys

import pytest
import yaml

from fura_rl.errors import FuraError
from fura_rl.trainer.sweep import RECIPE, plan_sweep, sweep_command, why_failed


@pytest.fixture
def sweep(tmp_path):
    """Writes a sweep's file and returns its path."""

    def write(methods, recipe=None, **changes):
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump({"max_steps": 5, "benchmarks": ["b.jsonl"], **(recipe or {})})
        )
        path = tmp_path / "sweep.yaml"
        content = {"recipe": str(tmp_path / "recipe.yaml"), "output_dir": str(tmp_path / "out"), "methods": methods}
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return path

    return write


def finish(run, *accuracies, steps=5):
    """Writes what a run of `steps` steps with these evaluations leaves behind."""
    run.folder.mkdir(parents=True, exist_ok=True)
    evaluations = [{"step": i, "scores": {"b": {"accuracy": a}}} for i, a in enumerate(accuracies)]
    (run.folder / "summary.json").write_text(json.dumps({"steps": steps, "evaluations": evaluations}))


def test_lists_are_multiplied_out_and_options_reach_the_runs(sweep):
    methods = {"fura": {"learning_rate": [1e-3, 2e-3], "block_size": ["closest", "full"]}, "lora": {"lora_r": 8}}
    runs = plan_sweep(sweep(methods, seeds=[1, 2], options={"max_steps": 7}))
    assert len(runs) == 2 * 2 * 2 + 2 and len({run.folder for run in runs}) == len(runs)
    assert [run.options["method"] for run in runs] == ["fura"] * 8 + ["lora"] * 2
    assert {run.options["learning_rate"] for run in runs[:8]} == {1e-3, 2e-3}
    assert runs[-1].options["lora_r"] == 8 and runs[-1].options["seed"] == 2 and runs[-1].options["max_steps"] == 7
    assert runs[0].folder.name == "fura-learning_rate=0.001,block_size=closest-seed=1"
    assert runs[0].options["benchmarks"] == ["b.jsonl"]


def test_a_run_counts_as_done_when_it_made_all_its_steps(sweep):
    run = plan_sweep(sweep(["fura"]))[0]
    assert run.summary is None
    finish(run, 0.2, 0.4, steps=3)
    assert run.summary is None and run.curve() == []
    finish(run, 0.2, 0.4)
    assert run.curve() == [(0, 0.2), (1, 0.4)]


def test_a_run_that_was_begun_with_other_options_is_not_taken_for_this_one(sweep):
    run = plan_sweep(sweep(["fura"]))[0]
    finish(run, 0.2, 0.4)
    (run.folder / RECIPE).write_text(yaml.safe_dump({**run.options, "resume_from_checkpoint": "latest"}))
    assert plan_sweep(sweep(["fura"]))[0].summary is not None
    with pytest.raises(FuraError, match=r"begun with other values of beta, max_steps: set them back"):
        plan_sweep(sweep(["fura"], recipe={"beta": 0.1}, options={"max_steps": 4}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [1]}, "needs the keys"),
        ({"output": "elsewhere"}, "needs the keys"),
    ],
)
def test_mistakes_are_one_sentence(sweep, changes, words):
    with pytest.raises(FuraError, match=words):
        plan_sweep(sweep(["fura"], **changes))


def test_a_missing_file_is_named(sweep, tmp_path):
    path = sweep(["fura"])
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(FuraError, match=r"there is no recipe .*recipe.yaml"):
        plan_sweep(path)
    with pytest.raises(FuraError, match=r"There is no sweep file"):
        plan_sweep(tmp_path / "nowhere.yaml")


def test_a_sweep_without_evaluation_is_refused(sweep):
    with pytest.raises(FuraError, match="set benchmarks and max_steps"):
        plan_sweep(sweep(["fura"], recipe={"benchmarks": []}))


@pytest.fixture
def recipe(tiny_model, tiny_problems):
    """One step without an engine, and evaluations."""
    return dict(
        model_name_or_path=str(tiny_model), dataset_name=str(tiny_problems / "train.jsonl"), prompt="plain",
        max_steps=1, per_device_train_batch_size=8, num_generations=8, max_completion_length=16, use_vllm=False,
        benchmarks=[str(tiny_problems / "test.jsonl")], benchmark_max_tokens=16, save_strategy="no",
    )  # fmt: skip


@pytest.mark.slow
def test_missing_runs_are_made_and_finished_ones_are_not(sweep, recipe, tmp_path, tiny_problems, capsys):
    control = {"method": "fura", "basis": "identity"}
    path = sweep({"fura": {}, "lora": {"lora_r": 4}, "control": control}, recipe=recipe)
    finish(plan_sweep(path)[1], 0.0, 0.25, steps=1)
    sweep_command(path, jobs=2)
    printed = capsys.readouterr().out
    assert "3 runs, 1 done before" in printed and "| lora | - | - | 0.250 |" in printed
    out = tmp_path / "out"
    rows = {row["method"]: row for row in json.loads((out / "sweep.json").read_text())}
    assert set(rows) == {"fura", "lora", "control"}
    assert rows["control"]["by_problem"]["problems"] == len((tiny_problems / "test.jsonl").read_text().splitlines())
    assert rows["control"]["by_problem"]["difference"] == pytest.approx(rows["control"]["against"]["difference"])
    assert rows["lora"]["by_problem"] is None  # finished by hand, without answers
    assert json.loads((out / "control-seed=1" / "adapter_config.json").read_text())["basis"] == "identity"
    assert (out / "sweep.png").stat().st_size > 0
    assert (out / "fura-seed=1" / "adapter_model.safetensors").exists()
    sweep_command(path)
    assert "3 runs, 3 done before" in capsys.readouterr().out


def test_a_failed_run_is_named(sweep, tmp_path, capsys):
    path = sweep(["fura"], recipe={"model_name_or_path": str(tmp_path / "no_model"), "dataset_name": "no.jsonl"})
    with pytest.raises(FuraError, match=r"1 of the sweep's runs failed \(fura-seed=1\)"):
        sweep_command(path)
    log = tmp_path / "out" / "fura-seed=1" / "log.txt"
    assert "error: The dataset file no.jsonl does not exist." in log.read_text()
    assert f"fura-seed=1: failed: The dataset file no.jsonl does not exist. ({log})" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_without_memory_is_made_again_alone(sweep, recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "crowded.py").write_text(
        "import pathlib, torch\n"
        "def reward(completions, **columns):\n"
        "    mark = pathlib.Path(__file__).with_name('tried')\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = sweep({"lora": {"lora_r": 4}}, recipe={**recipe, "rewards": ["crowded:reward"]})
    sweep_command(path, jobs=2)
    printed = capsys.readouterr().out
    assert "lora-seed=1: failed: torch.OutOfMemoryError: CUDA out of memory." in printed
    again = printed.index("1 ran out of memory beside others: again")
    assert printed.index("failed: torch.OutOfMemoryError") < again < printed.index("lora-seed=1: accuracy")


def test_why_a_run_failed(tmp_path):
    log = tmp_path / "log.txt"
    assert why_failed(log) == f"failed, see {log}"
    log.write_text(
        "ValueError: first\n  torch.Error: inside of a trace\ntorch.OutOfMemoryError: CUDA out of memory. " + "x " * 99
    )
    log.write_text(log.read_text() + "\nGRPO: 0/40\nErrors may follow\n")
    assert why_failed(log).startswith("failed: torch.OutOfMemoryError: CUDA out of memory. x x")
    assert why_failed(log).endswith(f"x... ({log})") and len(why_failed(log)) < 135 + len(str(log))
    log.write_text("[rank1]: torch.OutOfMemoryError: CUDA out of memory.\n")  # as torchrun's processes say it
    assert why_failed(log) == f"failed: [rank1]: torch.OutOfMemoryError: CUDA out of memory. ({log})"


def test_runs_that_start_together_take_other_ports():
    """TRL's engine takes 29500 if nobody has it yet: of two that look at the same moment, one fails."""
    from fura_rl.train_grpo import free_port

    ports = {free_port() for _ in range(8)}
    assert len(ports) > 1 and 29500 not in ports


@pytest.mark.slow
def test_one_process_of_torchrun_meets_its_agent(tmp_path):
    """The launcher's port is where the process has to go: with one of its own it would wait for ever."""
    code = tmp_path / "job.py"
    code.write_text(
        "import os, torch.distributed as dist\nfrom fura_rl import train_grpo\n"
        "port = os.environ['MASTER_PORT']\ntrain_grpo.main(['--config', 'nothing.yaml'])\n"
        "assert os.environ['MASTER_PORT'] == port\ndist.init_process_group('gloo')\nprint('met')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone", str(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("met\n"), done.stderr[-2000:]
