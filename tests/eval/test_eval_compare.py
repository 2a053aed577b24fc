"""Paired comparison of finished evaluations, through the files that an evaluation writes."""

import json
import re

import pytest

from fura_rl.errors import FuraError
from fura_rl.eval import Sampling, evaluate, load_benchmark
from fura_rl.eval import statistics as stats
from fura_rl.eval.commands import compare_command
from fura_rl.eval.compare import compare, markdown
from fura_rl.eval.results import read_results, write_results
from fura_rl.prompts import load_prompt

RUN = {"command": ["fura-rl"], "model": {"model": "m"}, "engine": {"engine": "script"}, "versions": {}}
PROBLEMS = 40


@pytest.fixture
def evaluated(script, tokenizer, verifier, write_jsonl, tmp_path):
    """Makes a finished evaluation of 40 problems: `solved[i]` of the samples of problem i are right."""
    rows = [{"id": f"p{i}", "problem": f"Problem {i}.", "answer": "1"} for i in range(PROBLEMS)]
    path = write_jsonl("sums.jsonl", rows)

    def make(name, solved, samples=1, prompt="boxed", max_tokens=200, seed=0, limit=None):
        left = dict(enumerate(solved))

        def answer(prompt, request):
            i = int(re.search(r"Problem (\d+)\.", prompt).group(1))
            left[i] -= 1
            return "\\boxed{1}" if left[i] >= 0 else "\\boxed{2}"

        result = evaluate(
            script(tokenizer, answer),
            tokenizer,
            [load_benchmark(str(path), limit=limit)],
            prompt=load_prompt(prompt),
            sampling=Sampling(temperature=1.0, n=samples, max_tokens=max_tokens, seed=seed),
            verifier=verifier,
            out_dir=tmp_path / name,
            progress=False,
        )
        write_results(tmp_path / name, result, RUN)
        return tmp_path / name

    return make


def pattern(*right):
    return [int(i in right) for i in range(PROBLEMS)]


def test_single_samples_are_compared_with_mcnemar(evaluated):
    a = read_results(evaluated("a", pattern(*range(0, 20))))
    b = read_results(evaluated("b", pattern(*range(2, 32)), seed=7))
    [c] = compare([a, b])
    assert (c.accuracy_a, c.accuracy_b, c.difference) == pytest.approx((0.5, 0.75, 0.25))
    assert (len(c.gained), len(c.lost)) == (12, 2)
    assert c.gained[0] == "p20" and c.lost == ["p0", "p1"]
    assert c.test == "McNemar" and c.p_value == pytest.approx(stats.mcnemar(2, 12))
    interval = stats.paired_bootstrap(pattern(*range(0, 20)), pattern(*range(2, 32)))
    assert (c.low, c.high) == pytest.approx(tuple(interval))
    assert c.p_holm == c.p_value


def test_several_samples_are_compared_by_sign_flips(evaluated):
    solved_a, solved_b = [i % 5 for i in range(PROBLEMS)], [min(4, i % 5 + i % 2) for i in range(PROBLEMS)]
    results = [read_results(evaluated(n, s, samples=4)) for n, s in (("a", solved_a), ("b", solved_b))]
    [c] = compare(results)
    differences = [y - x for x, y in zip(solved_a, solved_b, strict=True)]
    assert c.test == "sign flip"
    assert c.p_value == pytest.approx(stats.permutation(differences))
    assert c.difference == pytest.approx(sum(differences) / 4 / PROBLEMS)
    assert c.low < c.difference < c.high


def test_other_numbers_of_samples_need_force_and_are_scaled(evaluated):
    a = read_results(evaluated("a", [2] * 20 + [0] * 20, samples=4))
    b = read_results(evaluated("b", [1] * 20 + [0] * 20, samples=2))
    with pytest.raises(FuraError, match=r"a and b differ on sums in n \(4 / 2\)"):
        compare([a, b])
    [c] = compare([a, b], force=True)
    assert c.accuracy_a == c.accuracy_b == pytest.approx(0.25)
    assert (c.gained, c.lost, c.p_value) == ([], [], 1.0)
    assert c.low < 0 < c.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "plain"}, r"prompt \(boxed / plain\)"),
        ({"max_tokens": 100}, r"max_tokens \(200 / 100\)"),
        ({"limit": 30}, r"problems \(content \w{12} / \w{12}\)"),
    ],
)
def test_different_settings_are_refused(evaluated, change, message):
    a, b = (read_results(evaluated(*args, **kw)) for args, kw in ((("a", pattern()), {}), (("b", pattern()), change)))
    with pytest.raises(FuraError, match=message):
        compare([a, b])
    [c] = compare([a, b], force=True)
    assert c.problems == (30 if "limit" in change else 40)


def test_holm_over_all_pairs(evaluated):
    runs = [read_results(evaluated(n, pattern(*range(k)))) for n, k in (("a", 10), ("b", 20), ("c", 22))]
    against_first, every = compare(runs), compare(runs, all_pairs=True)
    assert [(c.a, c.b) for c in against_first] == [("a", "b"), ("a", "c")]
    assert [(c.a, c.b) for c in every] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [c.p_holm for c in every] == pytest.approx(stats.holm([c.p_value for c in every]))
    assert every[0].p_holm > every[0].p_value


def test_command_writes_table_flips_and_plot(evaluated, tmp_path, capsys):
    a, b = evaluated("a", pattern(0, 1)), evaluated("b", pattern(*range(1, 15)))
    compare_command([a, b], out=tmp_path / "cmp", force=False, all_pairs=False, flips=3)
    text = (tmp_path / "cmp" / "compare.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "| a | b | sums | 40 | 0.050 | 0.350 | +0.300 |" in text
    assert "sums, b against a, gained 13: p2, p3, p4 and 10 more" in text
    assert "sums, b against a, lost 1: p0" in text
    assert json.loads((tmp_path / "cmp" / "compare.json").read_text())[0]["test"] == "McNemar"
    assert (tmp_path / "cmp" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_cell_for_each_column(evaluated):
    runs = [read_results(evaluated(n, pattern(0))) for n in ("a", "b")]
    lines = markdown(compare(runs)).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_unfinished_missing_damaged_and_newer_evaluations(evaluated, tmp_path):
    with pytest.raises(FuraError, match=r"nowhere holds no finished evaluation \(it has no results.json\)"):
        read_results(tmp_path / "nowhere")
    a = evaluated("a", pattern(0))
    results = a / "results.json"
    text = results.read_text()
    results.unlink()
    with pytest.raises(FuraError, match="has not finished: run the same command again"):
        read_results(a)
    results.write_text(text[:-20])
    with pytest.raises(FuraError, match="is damaged"):
        read_results(a)
    results.write_text(json.dumps({**json.loads(text), "schema_version": 99}))
    with pytest.raises(FuraError, match=r"version 99; this program reads .* up to version 1"):
        read_results(a)


def test_one_evaluation_or_the_same_twice(evaluated):
    a = read_results(evaluated("a", pattern(0)))
    with pytest.raises(FuraError, match="at least two"):
        compare([a])
    with pytest.raises(FuraError, match="named twice"):
        compare([a, a])
