"""`fura-rl eval` as a user runs it: a process of its own, real engines, kills, adapters, and mistakes."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import typer
from forked import Forked
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from fura_rl.adapter import FuraConfig
from fura_rl.errors import FuraError
from fura_rl.eval.commands import eval_command

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def start():
    """`start(...)` begins an evaluation in a process of its own, forked after the imports."""
    started = []

    def start(*arguments):
        started.append(Forked("-m", "fura_rl.cli", "eval", *arguments, environment=ENVIRONMENT))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def evaluate(start):
    """To its end; what it has printed."""

    def evaluate(*arguments):
        done = start(*arguments).wait()
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return evaluate


def evaluate_here(*arguments):
    """In this process, through the same parser."""
    app = typer.Typer()
    app.command()(eval_command)
    typer.main.get_command(app)([str(argument) for argument in arguments], standalone_mode=False)


def results(directory):
    return json.loads((directory / "results.json").read_text())


def completions(directory):
    lines = (directory / "samples.jsonl").read_text().splitlines()
    return [(line["id"], line["sample"], line["completion"]) for line in map(json.loads, lines)]


@pytest.fixture
def sums(write_jsonl):
    rows = [{"id": f"s{i}", "problem": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    return write_jsonl("sums.jsonl", rows)


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """FuRA and LoRA adapters of the tiny model with updates that are not small, and each merged into a checkpoint."""
    directory = tmp_path_factory.mktemp("adapters")
    for name, config in (
        ("fura", FuraConfig(target_modules="all-linear")),
        ("lora", LoraConfig(target_modules="all-linear", r=4)),
    ):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(directory / name)
        model.merge_and_unload().save_pretrained(directory / f"{name}-merged")
        PreTrainedTokenizerFast.from_pretrained(tiny_model).save_pretrained(directory / f"{name}-merged")
    return directory


def test_transformers_engine_end_to_end(tiny_model, sums, tmp_path):
    out = tmp_path / "out"
    arguments = ("--model", tiny_model, "-b", sums, "--out", out, "--engine", "transformers", "--max-tokens", 8)
    arguments += ("--temperature", 0.7, "--samples", 2, "--limit", 3, "--prompt", "plain")
    command = [sys.executable, "-m", "fura_rl.cli", "eval", *map(str, arguments)]
    printed = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT, timeout=400
    ).stdout
    assert "| sums | avg@2 | 0.000 | " in printed and "tokens/s" in printed
    data = results(out)
    assert (data["schema"], data["schema_version"]) == ("fura-rl/eval", 1)
    assert data["command"][:2] == ["fura-rl", "eval"] and "--max-tokens" in data["command"]
    assert data["model"]["weights"].startswith("sha256 ")
    assert data["engine"] == {"engine": "transformers", "dtype": "float32", "device": "cpu", "batch_size": 8}
    assert data["versions"]["torch"] == torch.__version__
    assert data["benchmarks"]["sums"]["sampling"]["max_tokens"] == 8
    assert data["prompt"] == {"name": "plain", "text": "{problem}"}
    assert json.loads((out / "timing.json").read_text())["sampled"] == 6
    assert (out / "report.html").stat().st_size > 10_000
    assert len(completions(out)) == 6


TWICE = """
import sys
from fura_rl import cli
words = sys.argv
for more in ([], ["--engine", "vllm"]):
    sys.argv = [*words, *more]
    try:
        cli.main()
    except SystemExit as end:
        print(f"exit status {end.code}", file=sys.stderr)
"""


def test_falls_back_to_transformers_where_vllm_cannot_be_imported(tiny_model, sums, tmp_path):
    """An empty package of that name stands in for a broken installation; asked for, it is an error."""
    (tmp_path / "path" / "vllm").mkdir(parents=True)
    (tmp_path / "path" / "vllm" / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open')")
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "path")}
    arguments = ["eval", "--model", tiny_model, "-b", sums, "--out", tmp_path / "out", "--limit", 1, "--max-tokens", 2]
    command = [sys.executable, "-c", TWICE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second, _ = re.split(r"exit status (?=\d)", done.stderr)
    assert "vLLM cannot be used (ImportError: libcuda.so.1: cannot open): transformers generates" in first
    assert results(tmp_path / "out")["engine"]["engine"] == "transformers"
    assert done.stderr.endswith("exit status 2\n") and second.startswith("0\n")
    assert "vLLM cannot be used on this machine" in second


@pytest.mark.parametrize("method", ["fura", "lora"])
def test_adapter_on_base_equals_the_merged_checkpoint(tiny_model, adapters, sums, tmp_path, method):
    shared = ("-b", sums, "--engine", "transformers", "--max-tokens", 24, "--limit", 8)
    evaluate_here("--model", tiny_model, "--adapter", adapters / method, "--out", tmp_path / "adapter", *shared)
    evaluate_here("--model", adapters / f"{method}-merged", "--out", tmp_path / "merged", *shared)
    evaluate_here("--model", tiny_model, "--out", tmp_path / "base", *shared)
    assert completions(tmp_path / "adapter") == completions(tmp_path / "merged")
    assert completions(tmp_path / "adapter") != completions(tmp_path / "base")
    assert results(tmp_path / "adapter")["scores"] == results(tmp_path / "merged")["scores"]


@pytest.mark.slow
@pytest.mark.vllm
def test_adapter_on_base_equals_the_merged_checkpoint_in_vllm(tiny_model, adapters, sums, tmp_path, evaluate):
    shared = ("-b", sums, "--engine", "vllm", "--max-tokens", 24, "--limit", 8)
    printed = evaluate(*("--model", tiny_model, "--adapter", adapters / "fura", "--out", tmp_path / "adapter", *shared))
    assert "GiB in " in printed and "while the engine starts" in printed
    evaluate("--model", adapters / "fura-merged", "--out", tmp_path / "merged", *shared)
    assert completions(tmp_path / "adapter") == completions(tmp_path / "merged")
    assert results(tmp_path / "adapter")["scores"] == results(tmp_path / "merged")["scores"]
    assert not (tmp_path / "adapter" / "merged-checkpoint").exists()


def killed_half_way(process, out):
    """Kills an evaluation, without a chance to clean up, once some completions are written."""
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 1200
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 3):
        assert process.process.is_alive() and time.monotonic() < deadline, process.err.read_text()[-3000:]
        time.sleep(0.01)
    process.kill()
    return samples.read_bytes().count(b"\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "max_tokens"), [("transformers", 30), pytest.param("vllm", 300, marks=pytest.mark.vllm)]
)
def test_killed_and_run_again_gives_the_same_results(tiny_model, sums, tmp_path, start, evaluate, engine, max_tokens):
    out = tmp_path / "out"
    arguments = ("--model", tiny_model, "-b", sums, "--out", out, "--engine", engine, "--dtype", "float32")
    arguments += ("--max-tokens", max_tokens, "--temperature", 1, "--samples", 2, "--batch-size", 4)
    evaluate(*arguments)
    whole = out.rename(tmp_path / "whole")
    finished = killed_half_way(start(*arguments), out)
    assert 3 <= finished < 48
    assert not (out / "results.json").exists()
    evaluate(*arguments)
    timing = json.loads((out / "timing.json").read_text())
    assert timing["reused"] >= finished - 1 and timing["reused"] + timing["sampled"] == 48
    for name in ("results.json", "samples.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.vllm
def test_real_model_and_merged(smollm, tmp_path, write_jsonl, evaluate):
    """SmolLM2-135M in float32, sampled: an adapter against its merged checkpoint."""
    rows = [
        {"id": "a", "problem": "What is 2 + 3? Answer with \\boxed{5}.", "answer": "5"},
        {"id": "b", "problem": "Name the capital of France in \\boxed{}.", "answer": "Paris"},
    ]
    shared = ("-b", write_jsonl("two.jsonl", rows), "--prompt", "plain", "--max-tokens", 16, "--dtype", "float32")
    shared += ("--engine", "vllm", "--temperature", 0.8, "--samples", 2)
    base = AutoModelForCausalLM.from_pretrained(smollm, dtype="auto")
    model = get_peft_model(base, FuraConfig(target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.003 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(smollm).save_pretrained(tmp_path / "merged")
    evaluate("--model", smollm, "--adapter", tmp_path / "adapter", "--out", tmp_path / "1", *shared)
    evaluate("--model", tmp_path / "merged", "--out", tmp_path / "2", *shared)
    assert completions(tmp_path / "1") == completions(tmp_path / "2")
    assert results(tmp_path / "1")["scores"] == results(tmp_path / "2")["scores"]


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """As the tiny model, but narrower."""
    directory = tmp_path_factory.mktemp("other") / "model"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model)
    tokenizer.save_pretrained(directory)
    config = Qwen2Config.from_pretrained(tiny_model, hidden_size=32)
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def mistake(*arguments):
    """The one sentence that a command prints instead of a traceback."""
    with pytest.raises(FuraError) as caught:
        evaluate_here(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith((".", ")"))
    return sentence


@pytest.mark.parametrize("method", ["fura", "lora"])
def test_adapter_for_another_model(other_model, adapters, sums, tmp_path, method):
    arguments = ("-b", sums, "--out", tmp_path / "out", "--engine", "transformers")
    sentence = mistake("--model", other_model, "--adapter", adapters / method, *arguments)
    assert f"{method} cannot be merged into" in sentence


def test_adapter_with_missing_layers(tiny_model, adapters, sums, tmp_path):
    """A LoRA for half the modules, given the configuration for all: PEFT alone would warn and go on."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"], r=4))
    model.save_pretrained(tmp_path / "half")
    config = json.loads((adapters / "lora" / "adapter_config.json").read_text())
    (tmp_path / "half" / "adapter_config.json").write_text(json.dumps(config))
    arguments = ("-b", sums, "--out", tmp_path / "out", "--engine", "transformers")
    sentence = mistake("--model", tiny_model, "--adapter", tmp_path / "half", *arguments)
    assert "0 of its tensors have no place there and 24 are missing" in sentence


def test_mistakes_are_one_sentence_and_leave_nothing_behind(tiny_model, sums, write_jsonl, tmp_path):
    out = tmp_path / "out"
    base = ("--out", out, "--engine", "transformers", "--max-tokens", 4)
    empty = write_jsonl("empty.jsonl", [])
    twice = write_jsonl("twice.jsonl", [{"id": 1, "problem": "a", "answer": "1"}] * 2)
    broken = write_jsonl("broken.jsonl", [{"problem": "a", "answer": "\\frac{1}{"}])
    for arguments, words in [
        (("--model", tiny_model, "-b", empty), "benchmark empty is empty"),
        (("--model", tiny_model, "-b", twice), "occurs twice"),
        (("--model", tiny_model, "-b", broken), "cannot be read by the verifier"),
        (("--model", tmp_path / "none", "-b", sums), "No tokenizer for"),
        (("--model", tiny_model, "-b", sums, "--adapter", tmp_path), "is not an adapter"),
        (("--model", tiny_model, "-b", sums, "--preset", "papre"), "choose one of paper, greedy, avg32, long"),
        (("--model", tiny_model, "-b", sums, "--prompt", "boxd"), "Unknown prompt 'boxd'"),
        (("--model", tiny_model, "-b", sums, "--engine", "sglang"), "--engine 'sglang' is unknown"),
        (("--model", tiny_model, "-b", sums, "--samples", 3), "3 equal samples"),
        (("-b", sums), "--model"),
        (("--model", tiny_model, "-b", sums, "--server", "http://x", "--adapter", "y"), "cannot be combined"),
    ]:
        assert words in mistake(*base, *arguments)
    assert not out.exists()


def test_merged_checkpoint_needs_space(tiny_model, adapters, tmp_path, monkeypatch):
    from fura_rl.errors import FuraError
    from fura_rl.eval import models

    usage = models.shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: usage)
    with (
        pytest.raises(FuraError, match=r"No space for the merged checkpoint: .* needs 0.0 GiB and 0.0 GiB are free"),
        models.merged_checkpoint(str(tiny_model), str(adapters / "fura"), tmp_path),
    ):
        pass


def test_model_card_of_the_long_preset(tiny_model, tmp_path):
    from transformers import GenerationConfig

    from fura_rl.eval.commands import resolve_sampling

    GenerationConfig(temperature=0.7, top_p=0.8, top_k=30, do_sample=True).save_pretrained(tmp_path)
    card = resolve_sampling("long", str(tmp_path), ["math500"], {"seed": 3, "top_k": None})["math500"]
    assert (card.temperature, card.top_p, card.top_k, card.max_tokens, card.seed) == (0.7, 0.8, 30, 32_768, 3)
    ours = resolve_sampling("long", str(tmp_path / "none"), ["aime25"], {"n": 4})["aime25"]
    assert (ours.temperature, ours.top_p, ours.top_k, ours.n) == (0.6, 0.95, 20, 4)
    assert resolve_sampling("paper", str(tmp_path), ["math500"], {})["math500"].temperature == 0


def test_context_is_capped_with_a_warning(tiny_model):
    from fura_rl.eval.run import _context

    assert _context(str(tiny_model), 300) == 300
    with pytest.warns(UserWarning, match="needs 2100 tokens, but .* was made for 512"):
        assert _context(str(tiny_model), 2100) == 512


def test_importing_the_commands_is_light():
    """Neither engines nor plots nor data sets are imported before a command runs."""
    heavy = ("vllm", "datasets", "matplotlib")
    code = f"import sys, fura_rl.eval.commands; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "[]"
