"""`report.html` of a run: complete, harmless whatever a model wrote, and alive in a browser."""

import io
import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from matplotlib.image import imread
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.adapter.spectral import spectral_report
from fura_rl.errors import FuraError
from fura_rl.trainer.observe import relative_norms
from fura_rl.trainer.report_page import TEMPLATE, completions, read_run, write_report

HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'> @@title@@ \u2028 <!--"


class Page(HTMLParser):
    """What could run or load, and the text of the two scripts."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.scripts, self.inside = [], [], False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.loads += [v for name, v in attributes if name in ("src", "href") or name.startswith("on")]
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rollout(step, text, reward):
    rewards, prompt = {"accuracy": reward, "format": None}, [{"role": "user", "content": "6 * 7? " + HOSTILE}]
    return dict(step=step, prompt=prompt, completion=text, answer="42", extracted=None, rewards=rewards, advantage=0.5)


@pytest.fixture
def hostile_run(tmp_path):
    """A run in its third step, whose model writes what an attacker would, and whose loss is no number."""
    run = tmp_path / "run<i>"
    row = {"loss": float("nan"), "reward": 0.5, "entropy": 0.2, "sync/logp_gap_mean": 1e-3, "time/train": 2.0}
    values = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "truncated": 0.25, "no_answer": 0.0, "mean_tokens": 9.0}
    score = {f"eval_<b>_{name}": value for name, value in values.items()}
    write_lines(run / "metrics.jsonl", [{"step": 0, **score}, {"step": 1, **row}, {"step": 2, **row, "reward": 0.75}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # being written
    (run / "run.json").write_text(json.dumps({"config": {"prompt": HOSTILE}, "max_steps": 9, "started": 1.0}))
    for step, words in ((1, "the answer is 41 "), (2, "the answer is 42 ")):
        rows = [rollout(step, words + HOSTILE, 0.0), rollout(step, words, 1.0)]
        write_lines(run / "completions" / f"step_{step:06d}.jsonl", rows)
    return run


def test_a_completion_cannot_leave_its_place(hostile_run):
    page = Page(write_report(hostile_run).read_text())
    assert page.loads == [] and len(page.scripts) == 2
    data = json.loads(page.scripts[0])
    assert data["records"][0]["text"] == "the answer is 41 " + HOSTILE and "@@" in data["problems"][0]
    assert data["steps"][0]["loss"] is None and [row["step"] for row in data["steps"]] == [1, 2]
    assert page.scripts[1] == TEMPLATE.read_text().split("<script>")[1].split("</script>")[0]


def test_the_page_says_what_was_run_and_how_far_it_is(hostile_run):
    text = write_report(hostile_run).read_text()
    assert "after step 2 of 9; the run had not ended" in text
    assert "<th>&lt;b&gt;</th><td>0.500<br><small>0.400 to 0.600<br>cut off 25.0%" in text


def test_a_summary_of_an_earlier_run_in_the_directory_is_not_this_runs(hostile_run):
    (hostile_run / "summary.json").write_text("{}")
    assert read_run(hostile_run).summary == {}
    (hostile_run / "summary.json").write_text(json.dumps({"error": HOSTILE}))
    assert "Ended early after step 2 of 9. &lt;/script&gt;" in write_report(hostile_run).read_text()
    facts = json.loads((hostile_run / "run.json").read_text())
    started = (hostile_run / "summary.json").stat().st_mtime + 10
    (hostile_run / "run.json").write_text(json.dumps({**facts, "started": started}))
    assert read_run(hostile_run).summary is None


def test_too_many_completions_are_thinned_but_the_first_and_newest_stay(tmp_path):
    for step in range(1, 12):
        write_lines(tmp_path / "completions" / f"step_{step:06d}.jsonl", [rollout(step, "x" * 1000, 1.0)])
    shown, note = completions(tmp_path, limit=5000)
    steps = [record["step"] for record in shown["records"]]
    assert steps[0] == 1 and steps[-1] == 11 and 2 <= len(steps) <= 4
    assert note == f"{11 - len(steps)} of 11 files of completions are left out here."


def test_a_run_of_another_method_has_no_spectra(hostile_run):
    (hostile_run / "summary.json").write_text("{}")
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(hostile_run)
    assert json.loads(Page(write_report(hostile_run).read_text()).scripts[0])["spectra"] == []


def test_a_directory_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(FuraError, match=r"has no metrics\.jsonl.*fura-rl train"):
        write_report(tmp_path)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_parses(tmp_path):
    script = tmp_path / "script.js"
    script.write_text(TEMPLATE.read_text().split("<script>")[1].split("</script>")[0])
    assert subprocess.run(["node", "--check", script]).returncode == 0


@pytest.mark.parametrize("singular_values", ["trainable", "frozen", "merged"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_norms_of_layers_are_those_of_the_merged_weights(side, singular_values):
    """The short way, through singular values and basis, against the long one through the weight."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    adapter = FuraConfig(target_modules=["q_proj", "down_proj"], side=side, singular_values=singular_values)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), adapter)
    for name, parameter in model.named_parameters():
        if ".fura_blocks." in name:
            parameter.data.normal_(std=0.05)
    norms = relative_norms(model)
    wanted = {n.removeprefix("base_model.model."): r.relative_norm for n, r in spectral_report(model).items()}
    assert len(norms) == 4 and norms == pytest.approx(wanted, rel=1e-4)


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium: install it (Debian: apt-get install chromium) to see the page drawn")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def rows(browser):
    return browser.evaluate("[...document.querySelectorAll('#list summary')].map((s) => s.textContent)")


def test_in_a_browser_nothing_of_a_completion_runs_and_the_filters_work(hostile_run, browser):
    browser.open(write_report(hostile_run))
    assert browser.errors == [] and browser.evaluate("window.pwned") is None
    assert len(rows(browser)) == 4
    browser.choose("low", "0.5")
    assert [row.split(",")[1] for row in rows(browser)] == [" step 1", " step 2"]
    browser.choose("step", "2")
    assert len(rows(browser)) == 1
    browser.choose("low", "")
    browser.choose("text", "PWNED = 1")
    assert len(rows(browser)) == 2  # it is in the problem, too
    browser.evaluate("document.querySelectorAll('#list details').forEach((card) => { card.open = true; })")
    assert browser.evaluate("document.getElementById('diff-problem').options.length") == 1
    marked = browser.evaluate("['del', 'ins'].map((tag) => document.querySelector('#diff ' + tag).textContent)")
    assert marked == ["41", "42"]
    assert browser.errors == [] and browser.evaluate("window.pwned") is None


@pytest.mark.slow
def test_a_real_run_draws_every_part(tiny_run: Path, browser):
    text = (tiny_run / "report.html").read_text()  # the run itself wrote it
    assert "Finished after step 2 of 2" in text and "<th>max_grad_norm</th><td>1.0</td>" in text
    browser.open(tiny_run / "report.html")
    titles = browser.evaluate("[...document.querySelectorAll('#charts figcaption b')].map((b) => b.textContent)")
    for words in ("Accuracy", "Reward of", "length", "Share", "Entropy", "Seconds a step", "Memory", "KL", "update"):
        assert any(words in title for title in titles), words
    assert browser.evaluate("document.querySelectorAll('#heatmap rect').length") == 3 * 2  # layers x steps
    assert browser.evaluate("document.getElementById('heat').options.length") == 4
    browser.choose("heat", "1")
    assert browser.evaluate("document.querySelectorAll('#heatmap rect').length") == 3 * 7  # layers x modules
    sources = browser.evaluate("[...document.getElementById('source').options].map((o) => o.value)")
    assert sources == ["rollouts", "test"]
    browser.choose("source", "test")
    assert len(rows(browser)) == 40
    assert browser.evaluate("document.querySelectorAll('#diff .pair pre').length") == 2
    picture = imread(io.BytesIO(browser.screenshot()))
    assert picture.shape[0] > 1500 and len(np.unique((picture[..., :3] * 255) @ (1, 256, 65536))) > 50  # colours
    assert browser.errors == []
