"""Contamination: known near-duplicates are found, and the index finds what comparing every pair finds."""

import json
import random

import pytest

from fura_rl.errors import FuraError
from fura_rl.eval import load_benchmark
from fura_rl.eval.benchmarks import Problem
from fura_rl.eval.commands import overlap_command
from fura_rl.eval.overlap import jaccard, ngrams, overlap, summarise, tokens


def test_known_near_duplicates_of_math500_are_found(shared_data):
    """The list holds pairs of similarity 0.7 and more, rounded, made by another program."""
    lines = (shared_data / "near_dups_math500_train.jsonl").read_text().splitlines()
    known = {(pair["math500"], pair["train"]) for pair in map(json.loads, lines)}
    train = load_benchmark(str(shared_data / "math_train.jsonl")).problems
    matches = overlap(train, load_benchmark("math500", shared_data), threshold=0.69)
    assert known - {(m.id, m.train_id) for m in matches} == set()
    assert len(matches) < 1.5 * len(known)


def test_index_finds_what_comparing_every_pair_finds():
    rng = random.Random(5)
    words = [
        "find",
        "the",
        "sum",
        "of",
        "all",
        "real",
        "roots",
        "x",
        "y",
        "+",
        "=",
        "3",
        "4",
        "17",
        "prime",
        "numbers",
        "such",
        "that",
    ]

    def texts(count, name):
        return tuple(
            Problem(f"{name}{i}", " ".join(rng.choices(words, k=rng.randint(1, 9))), "1") for i in range(count)
        )

    train, problems = texts(300, "t"), texts(60, "b")
    benchmark = type("B", (), {"name": "b", "problems": problems})
    for threshold in (0.3, 0.5, 0.7, 1.0):
        grams = {p.id: ngrams(tokens(p.problem, True), 2) for p in (*train, *problems)}
        every = {(b.id, t.id) for b in problems for t in train if jaccard(grams[b.id], grams[t.id]) >= threshold}
        assert {(m.id, m.train_id) for m in overlap(train, benchmark, threshold, n=2)} == every
        assert threshold == 1.0 or len(every) > 3


def test_copies_and_templates_are_told_apart(write_jsonl):
    train = load_benchmark(
        str(
            write_jsonl(
                "train.jsonl",
                [
                    {"id": "same", "problem": "Solve  $x + 17 = 20$ for x. [asy]draw(1);[/asy]", "answer": "3"},
                    {"id": "numbers", "problem": "Solve $x + 5 = 99$ for x.", "answer": "94"},
                    {"id": "other", "problem": "How many primes lie between ten and thirty?", "answer": "6"},
                ],
            )
        )
    ).problems
    rows = [{"id": "q", "problem": "solve $x + 17 = 20$ for $x$.".replace("$x$.", "x."), "answer": "3"}]
    benchmark = load_benchmark(str(write_jsonl("bench.jsonl", rows)))
    first, second = overlap(train, benchmark)
    assert (first.train_id, first.copy, first.template, first.same_answer) == ("same", 1.0, 1.0, True)
    assert (second.train_id, second.template, second.same_answer) == ("numbers", 1.0, False)
    assert second.copy < 0.5
    summary = summarise([first, second], benchmark, 0.7)
    assert (summary["copies"], summary["templates"], summary["copies_with_equal_answer"], summary["pairs"]) == (
        1,
        1,
        1,
        2,
    )


def test_command(write_jsonl, tmp_path, capsys):
    rows = [{"id": f"r{i}", "problem": f"What is {i} times {i + 1}, as a number?", "answer": str(i)} for i in range(4)]
    train, bench = write_jsonl("train.jsonl", rows), write_jsonl("bench.jsonl", rows[:2])
    out = tmp_path / "deep" / "pairs.jsonl"
    overlap_command(train, [str(bench)], data_dir=None, threshold=0.7, ngram=3, show=1, out=out)
    printed = capsys.readouterr().out
    assert "bench: of 2 problems 2 have a copy in train.jsonl (2 with an equal answer), 2 a twin" in printed
    assert printed.count("~") == 1
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(pairs) == 8 and pairs[0]["copy"] == 1.0


def test_command_refuses_nonsense(write_jsonl):
    path = write_jsonl("a.jsonl", [{"problem": "a", "answer": "1"}])
    settings = {"data_dir": None, "ngram": 3, "show": 1, "out": None}
    with pytest.raises(FuraError, match="threshold must be in"):
        overlap_command(path, [str(path)], threshold=0.0, **settings)
    with pytest.raises(FuraError, match=r"training set .*nowhere.jsonl does not exist"):
        overlap_command(path.with_name("x") / "nowhere.jsonl", [str(path)], threshold=0.7, **settings)
