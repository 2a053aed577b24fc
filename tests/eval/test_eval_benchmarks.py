"""Benchmarks: content, counts, hashes, and every way in which a file can be wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from fura_rl.errors import FuraError
from fura_rl.eval import SPECS, load_benchmark
from fura_rl.eval.benchmarks import aime24, amc23, gsm8k, minerva_math, olympiadbench
from fura_rl.eval.benchmarks.base import from_rows

LOCAL = {"math500": 500, "aime25": 30, "aime24": 30, "amc23": 40, "gsm8k": 1319}


@pytest.mark.parametrize(("name", "rows"), LOCAL.items())
def test_named_benchmark_from_a_directory(shared_data, name, rows):
    benchmark = load_benchmark(name, shared_data)
    assert benchmark.name == name
    assert len(benchmark.problems) == rows
    assert benchmark.sha256 == SPECS[name].file_sha256
    assert len({problem.id for problem in benchmark.problems}) == rows


def test_math500_has_subjects_and_levels(shared_data):
    problems = load_benchmark("math500", shared_data).problems
    assert len({p.subject for p in problems}) == 7
    assert {p.level for p in problems} == {"1", "2", "3", "4", "5"}
    assert problems[0].answer == r"\left( 3, \frac{\pi}{2} \right)"


@pytest.mark.parametrize("name", LOCAL)
def test_every_gold_answer_can_be_read(shared_data, verifier, name):
    problems = load_benchmark(name, shared_data).problems
    golds = [p.answer for p in problems]
    grades = verifier.grade([f"\\boxed{{{gold}}}" for gold in golds], golds)
    assert [p.id for p, g in zip(problems, grades, strict=True) if not g.correct] == []


def test_every_issue_benchmark_is_registered_with_a_pinned_source():
    assert set(SPECS) == {"math500", "aime25", "aime24", "amc23", "gsm8k", "minerva_math", "olympiadbench"}
    for name, spec in SPECS.items():
        pinned = len(spec.revision) == 40 and set(spec.revision) <= set("0123456789abcdef")
        assert pinned or (name == "minerva_math" and spec.revision == "main")


def test_gsm8k_rows_of_the_hub_become_the_local_file(shared_data):
    """The hub's rows hold the solution with "#### answer"; converted, they must hash as the local file does."""
    lines = (shared_data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    hub = [{"question": row["problem"], "answer": row["solution"]} for row in map(json.loads, lines)]
    converted = from_rows([gsm8k.to_row(row, i) for i, row in enumerate(hub)], "gsm8k", "hub")
    assert converted.sha256 == SPECS["gsm8k"].hub_sha256
    assert converted.problems[5].id == "gsm8k-test-5"


def test_rows_of_other_hub_data_sets():
    assert aime24.to_row({"id": 60, "problem": "P", "answer": "025"}, 0)["answer"] == "25"
    assert amc23.to_row({"id": 3, "question": "Q", "answer": 27.0}, 0)["answer"] == "27"
    assert amc23.to_row({"id": 3, "question": "Q", "answer": "-1"}, 0)["answer"] == "-1"
    assert minerva_math.to_row({"question": "Q", "answer": "1e5"}, 0) == {"problem": "Q", "answer": "1e5"}
    row = {"id": 1606, "question": "Q", "context": None, "final_answer": ["$2$", "$-2$"], "subfield": "Algebra"}
    assert olympiadbench.to_row(row, 0)["answer"] == "2, -2"


def test_limit_changes_the_content_hash(shared_data):
    whole, part = load_benchmark("aime25", shared_data), load_benchmark("aime25", shared_data, limit=5)
    assert part.problems == whole.problems[:5]
    assert part.sha256 != whole.sha256


def test_any_jsonl_runs(write_jsonl):
    rows = [{"problem": "1 + 1?", "answer": 2}, {"problem": "Die Würde?", "answer": "unantastbar", "level": 3}]
    benchmark = load_benchmark(str(write_jsonl("mine.jsonl", rows)))
    assert benchmark.name == "mine"
    assert [p.answer for p in benchmark.problems] == ["2", "unantastbar"]
    assert [p.id for p in benchmark.problems] == ["mine-0", "mine-1"]
    assert benchmark.problems[1].level == "3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"problem": "a", "answer": "1"}\n{"problem": "a"', "Line 2 of .* is not valid JSON"),
        ("[1, 2]", "Line 1 of .* is not a JSON object"),
        ('{"question": "a", "answer": "1"}', "Row 1 of .* has no 'problem' .*answer, question"),
        ('{"problem": "a"}', "has no 'answer'"),
        ('{"problem": "a", "answer": null}', "has no 'answer'"),
        ('{"problem": "a", "answer": "  "}', "has an empty 'answer'"),
        ('{"id": 7, "problem": "a", "answer": "1"}\n{"id": 7, "problem": "b", "answer": "1"}', "'7' occurs twice"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(FuraError, match=message):
        load_benchmark(str(path))


def test_unknown_name_lists_the_known():
    with pytest.raises(FuraError, match=r"Unknown benchmark 'math50'.*math500"):
        load_benchmark("math50")


def test_limit_of_nothing(sums_file):
    with pytest.raises(FuraError, match="limit of 0"):
        load_benchmark(str(sums_file), limit=0)


def test_other_content_under_a_known_name_is_refused(tmp_path, shared_data):
    lines = (shared_data / "aime25.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "aime25.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(FuraError, match=r"aime25 has 30 problems, but .* holds 29"):
        load_benchmark("aime25", tmp_path)
    changed = json.loads(lines[0]) | {"answer": "71"}
    (tmp_path / "aime25.jsonl").write_text("\n".join([json.dumps(changed), *lines[1:]]))
    with pytest.raises(FuraError, match=r"not those of aime25 .*pass the file's path"):
        load_benchmark("aime25", tmp_path)
    assert len(load_benchmark(str(tmp_path / "aime25.jsonl")).problems) == 30


def test_missing_directory():
    with pytest.raises(FuraError, match="data directory nowhere does not exist"):
        load_benchmark("math500", "nowhere")


def test_hub_loader_reads_a_data_set_repository(tmp_path, shared_data):
    """The same call that asks the hub, on a repository that lies on disk."""
    (tmp_path / "test.jsonl").write_bytes((shared_data / "math500.jsonl").read_bytes())
    benchmark = replace(SPECS["math500"], repo=str(tmp_path)).load()
    assert benchmark.sha256 == SPECS["math500"].hub_sha256
    assert benchmark.source == f"{tmp_path}@{SPECS['math500'].revision}"


def test_without_network_the_remedy_is_named(tmp_path):
    code = (
        "from fura_rl.eval import load_benchmark\nfrom fura_rl.errors import FuraError\n"
        "try: load_benchmark('aime25')\nexcept FuraError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert "aime25 is not to be had from the hub (math-ai/aime25)" in done.stdout, done.stderr
    assert "put aime25.jsonl into a directory and name that with --data-dir" in done.stdout
