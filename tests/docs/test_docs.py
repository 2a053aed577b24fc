"""What the documentation says is true: commands exist and run, examples run, metrics and links are complete."""

import ast
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from fura_rl import configs
from fura_rl.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
PROGRAMS = ("fura-rl", "accelerate", "torchrun", "sbatch", "make", "pip", "mkdocs", "python", "vllm", "curl", "kill")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(pages):
    """(page, words, what it needs) of every line in a bash block."""
    for page in pages:
        for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                needs = re.search(r"# (needs .*)", line)
                yield pytest.param(page.name, words, needs and needs[1], id=f"{page.stem}-{' '.join(words)[:50]}")


def train_options():
    from fura_rl.trainer import FuraGRPOConfig
    from fura_rl.trainer.arguments import AdapterArguments, DataArguments, ModelArguments

    classes = (FuraGRPOConfig, AdapterArguments, DataArguments, ModelArguments)
    return {field.name for each in classes for field in fields(each)} | {"config"}


def check_training(words):
    """Every option of a training command exists, and so does its recipe."""
    options = [word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")]
    assert set(options) <= train_options(), set(options) - train_options()
    recipe = words[words.index("--config") + 1]
    assert configs.path(recipe.removeprefix("configs/")).is_file() or "<" in recipe, recipe


@pytest.mark.parametrize("page, words, needs", list(commands(PAGES)))
def test_a_command_exists(page, words, needs):
    """As far as parsing tells: the subcommand, its options, the types of their values; files and make targets."""
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    if words[-1] == "&":
        words = words[:-1]
    if "&&" in words:
        words = words[: words.index("&&")]
    assert words[0] in PROGRAMS, f"teach this test what {words[0]!r} is"
    if words[:2] == ["fura-rl", "train"]:
        check_training(words[2:])
    elif words[0] == "fura-rl" and len(words) > 1 and not words[1].startswith("--"):
        COMMANDS[words[1]].make_context(words[1], words[2:])  # raises what a user would see
    elif words[0] == "sbatch":
        script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
        check_training(["--config", *words[script + 1 :]])
        assert (ROOT / words[script]).is_file()
    elif words[0] in ("accelerate", "torchrun"):
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[script]).is_file()
        if words[script].startswith("examples/sft/"):  # options of their own, read by tests/examples/test_sft.py
            assert (ROOT / words[words.index("--config", script) + 1]).is_file()
        else:
            check_training(words[script + 1 :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), words


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_run, tiny_problems):
    """A directory like a checkout after `make demo`, in which commands and examples may write."""
    place = tmp_path_factory.mktemp("docs")
    (place / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(tiny_run, place / "runs" / "demo")
    shutil.copytree(tiny_problems, place / "runs" / "demo" / "data")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("page, words, needs", [c for c in commands(PAGES) if not c.values[2]])
def test_a_command_that_needs_nothing_runs(page, words, needs, workplace, monkeypatch):
    assert words[0] == "fura-rl", f"{page}: say what {words} needs, or teach this test to run it"
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if "--out" in words:
        assert any((workplace / words[words.index("--out") + 1]).iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, workplace, monkeypatch):
    """The README's loads models from the hub; the test below reads it."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = "\n".join(blocks(page, "python"))
    exec(compile(code, str(page), "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_what_python_imports_and_configures_exists(page):
    """For examples that load a model from the hub, too."""
    tree = ast.parse("\n".join(blocks(page, "python")))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(page), "exec"), {})
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    used = {k.arg for c in calls if getattr(c.func, "id", "") == "FuraGRPOConfig" for k in c.keywords}
    assert used <= train_options(), used - train_options()


# --- metrics ----------------------------------------------------------------------------------------------------------


def documented():
    """Name (a regular expression) -> its row, of the tables of metrics.md."""
    names = {}
    for row in re.findall(r"^\| (`.*)$", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            names["[^/]+".join(map(re.escape, re.split(r"<\w+>", name)))] = row
    return names


@pytest.mark.slow
def test_every_metric_of_a_real_run_is_documented_and_every_documented_one_occurs(tiny_run):
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)} - {"step", "time"}
    names = documented()
    missing = sorted(key for key in logged if not any(re.fullmatch(name, key) for name in names))
    assert not missing, f"docs/metrics.md lacks {missing}"
    if json.loads((tiny_run / "summary.json").read_text())["engine"] == "vllm":
        stale = [
            name
            for name, row in names.items()
            if not any(re.fullmatch(name, key) for key in logged) and "only with" not in row and "GPU" not in row
        ]
        assert not stale, f"docs/metrics.md describes {stale}, which the run did not log"


# --- links and the site -----------------------------------------------------------------------------------------------


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "eval" / "README.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if not target.startswith(("http://", "https://")):
            file = page.parent / target if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), anchor


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [file for entry in navigation for file in entry.values()]
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])


@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="mkdocs is not installed: pip install 'fura-rl[docs]'")
def test_the_site_builds_without_warnings(tmp_path):
    command = ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "FuraConfig" in (tmp_path / "api" / "index.html").read_text()
