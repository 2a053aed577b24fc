"""Mistakes end to end: one sentence that names the remedy, exit status 2, and nothing written.

`test_errors.py` and `test_data.py` have the mistakes in names and files of models and data.
"""

import json
import shutil
import socket
import subprocess

import pytest
import yaml

from fura_rl import train_grpo


@pytest.fixture
def fails(tmp_path, recipe, capsys, monkeypatch):
    """`fails(*arguments, **changes)` runs the recipe, which must fail as it should; returns the sentence."""
    monkeypatch.setenv("MASTER_PORT", "0")

    def fails(*arguments, nothing_written=True, **changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**recipe, **changes}))
        status = train_grpo.main(["--config", str(file), *map(str, arguments)])
        output = capsys.readouterr()
        assert status == 2, output
        assert "Traceback" not in output.err
        sentence = [line for line in output.err.splitlines() if line.strip()][-1]
        assert sentence.startswith("error: ") and sentence.endswith((".", "?"))
        assert not (nothing_written and (tmp_path / "run").exists())
        return sentence.removeprefix("error: ")

    return fails


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--learning_rat", "1"], "Unknown option --learning_rat; did you mean learning_rate?"),
        (["--lerning-rate=1"], "Unknown option --lerning-rate; did you mean learning_rate?"),
        (["--max_step", "1"], "Unknown option --max_step; did you mean max_steps?"),
        (["--xyzzy"], "Unknown option --xyzzy."),
        (["--max_steps", "many"], "Option: argument --max_steps/--max-steps: invalid int value: 'many'."),
        (["--vllm_mode"], "Option: argument --vllm_mode/--vllm-mode: expected one argument."),
        (["--resume_from_checkpoint", "runs/none"], "The checkpoint runs/none does not exist"),
    ],
)
def test_command_line(fails, arguments, sentence):
    assert fails(*arguments).startswith(sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"benchmark_stepz": 3}, "Unknown option benchmark_stepz in the recipe; did you mean benchmark_steps?"),
        ({"max_steps": "many"}, "Option: argument --max_steps/--max-steps: invalid int value: 'many'."),
        ({"max_steps": 1.5}, "Option max_steps takes a whole number, not 1.5."),
        ({"top_p": [1]}, "Option top_p takes a number, not [1]."),
        ({"use_vllm": "perhaps"}, "Option: argument --use_vllm"),
        ({"rewards": "accuracy"}, "Option rewards takes a list, not 'accuracy'."),
        (
            {"target_modules": ["q_prj"]},
            "The model has no linear module 'q_prj'; did you mean q_proj? Its modules are:",
        ),
        ({"guards": {"kl": {"abov": 2}}}, "Guard 'kl' has no setting 'abov'; did you mean above?"),
        ({"benchmark_preset": "gredy"}, "Unknown benchmark_preset 'gredy'"),
        # contradictions
        ({"benchmarks": []}, "benchmark_steps is set, but there are no benchmarks"),
        ({"num_generations": 5}, "Configuration: "),
        ({"generation_batch_size": 32}, "Configuration: "),  # beside steps_per_generation
        ({"load_best_model_at_end": True}, "Configuration: load_best_model_at_end is not supported"),
        (
            {"metric_for_best_model": "eval_tst_accuracy"},
            "No benchmark gives metric_for_best_model=eval_tst_accuracy; ",
        ),
        (
            {"metric_for_best_model": "eval_a_accuracy", "benchmark_steps": None},
            "metric_for_best_model=eval_a_accuracy",
        ),
        # no GPU, or too few
        (
            {"use_vllm": True, "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode needs a GPU, and this run has none.",
        ),
        (
            {"use_vllm": True, "vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size=2 does not divide the number of processes, 1.",
        ),
        pytest.param(
            {"use_cpu": False, "bf16": True},
            "Configuration: Your setup doesn't support bf16/gpu.",
            marks=pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU"),
        ),
        # too much, too little
        ({"per_device_train_batch_size": 64}, "16 problem(s) are too few: one generation takes 64 different ones"),
        ({"per_device_train_batch_size": 16, "num_generations": 2}, "16 problem(s) are too few"),
    ],
)
def test_recipes(fails, changes, sentence):
    assert fails(**changes).startswith(sentence)


def test_files(fails, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert fails(dataset_name=str(empty)) == f"{empty} is empty."
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "1"}\n')
    assert "has no column 'problem'" in fails(dataset_name=str(other))
    assert "does not exist" in fails(dataset_name=str(tmp_path / "none.jsonl"))
    for recipe, words in (("none.yaml", "does not exist"), ("list.yaml", "is not a list of `option: value` lines")):
        (tmp_path / "list.yaml").write_text("- 1\n")
        assert train_grpo.main(["--config", str(tmp_path / recipe)]) == 2
        assert words in capsys.readouterr().err


def test_prompts_longer_than_the_context(fails, tmp_path, few_problems):
    rows = [json.loads(line) for line in (few_problems / "train.jsonl").read_text().splitlines()]
    rows[9]["problem"] *= 30
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = fails(dataset_name=str(file))
    assert sentence.startswith("The prompt of row 9 has ") and "the context holds" in sentence


def test_context_shorter_than_a_completion(fails, tmp_path):
    sentence = fails(use_vllm=True, max_completion_length=256)
    assert sentence == "max_completion_length=256 leaves no room for a prompt in vllm_max_model_length=256."


def test_unsupported_vllm(fails, tmp_path, monkeypatch):
    """The version is read from the installed package's metadata, here an older one found first."""
    metadata = tmp_path / "site" / "vllm-0.15.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.15.1\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert fails(use_vllm=True).startswith("vllm 0.15.1 is not supported, 0.22 to 0.31 are")


def test_a_server_that_is_something_else(fails):
    """Its port is taken by a program that does not answer as vLLM's server would."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        sentence = fails(
            use_vllm=True, vllm_mode="server", vllm_server_base_url=f"http://127.0.0.1:{taken.getsockname()[1]}",
            vllm_server_timeout=1,
        )  # fmt: skip
    assert sentence.startswith("No vLLM server answers at ") and "another program may have its port" in sentence


def test_read_only_output(fails, tmp_path):
    place = tmp_path / "read_only"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=1M", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("mounting a read-only file system needs root")
    try:
        assert fails(output_dir=str(place / "run")).startswith(f"Cannot write to output_dir {place / 'run'}: no permis")
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_directory_with_another_runs_checkpoints(fails, tmp_path):
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    assert "holds checkpoints of an earlier run" in fails(nothing_written=False)
    assert "are damaged" in fails("--resume_from_checkpoint", "latest", nothing_written=False)
    assert "no readable manifest.json" in fails(
        "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-7", nothing_written=False
    )
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == ["checkpoint-7"]


def test_a_tokenizer_without_template_and_pad_token_works(recipe, tmp_path, tiny_model, monkeypatch):
    """The prompt is plain text then, and the end of a text fills up a batch."""
    monkeypatch.setenv("MASTER_PORT", "0")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    file = tmp_path / "recipe.yaml"
    changes = dict(model_name_or_path=str(model), max_steps=2, benchmarks=[], benchmark_steps=None, use_cpu=True)
    file.write_text(yaml.safe_dump({**recipe, **changes}))
    assert train_grpo.main(["--config", str(file)]) == 0
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "completions" / "step_000001.jsonl").open()]
    assert all(isinstance(rollout["prompt"], str) and rollout["completion"] for rollout in rollouts)
