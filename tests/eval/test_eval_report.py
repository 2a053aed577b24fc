"""`report.html` needs nothing but itself, shows what was run, and cannot be broken by what a model writes."""

import json
import re
from html.parser import HTMLParser

import pytest

from fura_rl.eval import Sampling, evaluate, load_benchmark, report
from fura_rl.eval.report import write_report
from fura_rl.eval.results import read_results, write_results
from fura_rl.prompts import load_prompt

RUN = {
    "command": ["fura-rl", "eval", "--model", "<m>"],
    "model": {"model": "<b>m</b>", "adapter": "a"},
    "engine": {"engine": "script", "dtype": "float32"},
    "versions": {"torch": "2"},
}
HOSTILE = "</script><script>alert(1)</script><!-- \\boxed{7} \u2028 \x07"


class Page(HTMLParser):
    """Text by element and the attributes that could load something."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.links, self.scripts, self.cells = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.stack.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop() != tag:
            pass

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data
        elif self.stack and self.stack[-1] in ("td", "th"):
            self.cells.append(data)


@pytest.fixture
def evaluation(script, tokenizer, sums_file, verifier, tmp_path):
    def make(text=HOSTILE, **sampling):
        result = evaluate(
            script(tokenizer, lambda prompt, request: text),
            tokenizer,
            [load_benchmark(str(sums_file))],
            prompt=load_prompt("boxed"),
            sampling=Sampling(**{"max_tokens": 100_000, **sampling}),
            verifier=verifier,
            out_dir=tmp_path / "out",
            progress=False,
        )
        write_results(tmp_path / "out", result, RUN)
        return read_results(tmp_path / "out")

    return make


def test_report_is_self_contained_and_escaped(evaluation):
    page = Page(write_report(evaluation(temperature=1.0, n=2)).read_text(encoding="utf-8"))
    assert page.links == []
    assert len(page.scripts) == 2  # the data and the program; the model's own stayed text
    samples = json.loads(page.scripts[0])
    assert len(samples) == 12
    assert samples[0]["completion"] == HOSTILE
    assert samples[0]["correct"] is True and samples[2]["correct"] is False
    assert "<b>m</b> + a" in page.cells
    assert "sums" in page.cells and "avg@2" in page.cells
    assert "@@" not in page.scripts[1]


def test_report_has_a_plot_and_parts(evaluation):
    text = write_report(evaluation()).read_text(encoding="utf-8")
    assert re.search(r"<svg[^>]*>.*</svg>", text, re.DOTALL)
    cells = Page(text).cells
    assert {"even", "odd", "0", "1", "2"} <= set(cells)
    assert "boxed: " + load_prompt("boxed").text in cells


def test_report_is_reproducible(evaluation):
    results = evaluation()
    assert write_report(results).read_bytes() == write_report(results).read_bytes()


def test_long_completions_lose_their_middle_only_in_the_report(evaluation, monkeypatch):
    monkeypatch.setattr(report, "MAX_EMBEDDED", 50_000)
    long = "start " + "x" * 20_000 + " \\boxed{7} end"
    results = evaluation(text=long)
    text = write_report(results).read_text(encoding="utf-8")
    assert "The middle of 6 long completions is left out here" in text
    shown = json.loads(Page(text).scripts[0])[0]["completion"]
    assert shown.startswith("start ") and shown.endswith("\\boxed{7} end") and "characters ...]" in shown
    assert results.samples[0]["completion"] == long
