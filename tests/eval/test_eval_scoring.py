"""`evaluate` over completions that are known: scores, groups, seeds, and what is refused."""

import json
import re

import pytest

from fura_rl.errors import FuraError
from fura_rl.eval import PRESETS, Sampling, evaluate, load_benchmark
from fura_rl.eval import statistics as stats
from fura_rl.eval.sampling import sample_seed
from fura_rl.prompts import load_prompt

PROMPT = load_prompt("boxed")
SAMPLED = Sampling(temperature=1.0, n=4, max_tokens=200)


def addends(prompt):
    a, b = re.search(r"What is (\d+) \+ (\d+)\?", prompt).groups()
    return int(a), int(b)


def right(prompt, request):
    return f"Adding gives \\boxed{{{sum(addends(prompt))}}}."


def right_below_ten(prompt, request):
    """Right where the first addend is below ten (4 of 6 problems), silent at 12, wrong at 15."""
    a, b = addends(prompt)
    if a < 10:
        return f"\\boxed{{{a + b}}}"
    return "I do not know." if a == 12 else "\\boxed{-1}"


def run(sampler, tokenizer, benchmark, verifier, sampling, **kwargs):
    return evaluate(
        sampler,
        tokenizer,
        [benchmark],
        prompt=PROMPT,
        sampling=sampling,
        verifier=verifier,
        progress=False,
        **kwargs,
    )


def test_single_samples(script, tokenizer, sums_file, verifier):
    result = run(script(tokenizer, right_below_ten), tokenizer, load_benchmark(str(sums_file)), verifier, Sampling())
    score = result.scores["sums"]
    assert score.accuracy == pytest.approx(4 / 6)
    assert (score.low, score.high) == tuple(stats.wilson(4, 6))
    assert (score.k, score.problems, score.metric) == (1, 6, "accuracy")
    assert score.no_answer == pytest.approx(1 / 6)
    assert (score.truncated, score.timeouts, score.errors) == (0.0, 0, 0)
    assert score.by_subject["even"].value == pytest.approx(2 / 3)  # sums 0, 2, 4: the last is silent
    assert score.by_level["0"].value == pytest.approx(1.0)  # sums 0 and 3
    assert score.pass_at_k[1].value == score.maj_at_k[1].value == score.accuracy
    text = "\\boxed{7}"
    assert score.mean_tokens == pytest.approx((len(text) + 3 * len("\\boxed{11}") + 14 + 10) / 6)


def test_several_samples_and_answers_that_are_equal_but_spelled_differently(script, tokenizer, write_jsonl, verifier):
    """Half is the gold answer. Votes: 2 for one half (two spellings), 1 for 3, 1 for 4, so the majority is right."""
    benchmark = load_benchmark(
        str(write_jsonl("half.jsonl", [{"problem": "p", "answer": "\\frac{1}{2}"}, {"problem": "q", "answer": "7"}]))
    )
    half = ["\\boxed{0.5}", "\\boxed{\\frac12}", "\\boxed{3}", "\\boxed{4}"]
    seven = ["\\boxed{6}", "\\boxed{6.0}", "\\boxed{7}", "?"]
    texts = iter([*half, *seven])
    result = run(script(tokenizer, lambda p, r: next(texts)), tokenizer, benchmark, verifier, SAMPLED)
    score = result.scores["half"]
    assert score.metric == "avg@4"
    assert score.accuracy == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert score.pass_at_k[4].value == 1.0
    # 1 - C(2, 2) / C(4, 2) and 1 - C(3, 2) / C(4, 2)
    assert score.pass_at_k[2].value == pytest.approx((5 / 6 + 1 / 2) / 2)
    # First problem: right by two votes. Second: 6 and 6.0 are one wrong group of two votes against one.
    assert score.maj_at_k[4].value == pytest.approx(0.5)
    assert set(score.pass_at_k) == set(score.maj_at_k) == {1, 2, 4}
    assert score.no_answer == pytest.approx(1 / 8)
    assert score.pass_at_k[2].low <= score.pass_at_k[2].value <= score.pass_at_k[2].high


def test_truncation_is_counted(script, tokenizer, sums_file, verifier):
    sampling = Sampling(max_tokens=5)
    result = run(script(tokenizer, right), tokenizer, load_benchmark(str(sums_file)), verifier, sampling)
    score = result.scores["sums"]
    assert (score.truncated, score.no_answer, score.accuracy, score.mean_tokens) == (1.0, 1.0, 0.0, 5.0)


def test_one_batch_for_all_benchmarks_with_their_own_sampling(script, tokenizer, sums_file, write_jsonl, verifier):
    other = load_benchmark(str(write_jsonl("other.jsonl", [{"problem": "What is 1 + 1?", "answer": "2"}])))
    sampler = script(tokenizer, right)
    sampling = {"sums": Sampling(max_tokens=99), "other": SAMPLED}
    result = evaluate(
        sampler,
        tokenizer,
        [load_benchmark(str(sums_file)), other],
        prompt=PROMPT,
        sampling=sampling,
        verifier=verifier,
        progress=False,
    )
    assert [r.sampling.max_tokens for r in sampler.requests] == [99] * 6 + [200] * 4
    assert result.scores["sums"].accuracy == result.scores["other"].accuracy == 1.0
    assert tokenizer.decode(sampler.requests[0].prompt_token_ids) == (
        "user: What is 0 + 7?\n\nThink for a bit about the question and then put your final answer as a number inside "
        "\\boxed{}.\nassistant: "
    )


def test_seeds_differ_between_samples_and_do_not_depend_on_the_company(script, tokenizer, sums_file, verifier):
    asked = []
    for limit in (6, 2):
        sampler = script(tokenizer, right)
        run(sampler, tokenizer, load_benchmark(str(sums_file), limit=limit), verifier, SAMPLED)
        asked.append([request.seed for request in sampler.requests])
    assert len(set(asked[0])) == 24
    assert asked[0][:8] == asked[1]
    assert asked[0][5] == sample_seed(0, "sums", "sum-1", 1)
    assert all(0 <= seed < 2**31 for seed in asked[0])


def test_to_dict_is_json_and_without_timing_reproducible(script, tokenizer, sums_file, verifier):
    benchmark = load_benchmark(str(sums_file))
    first, second = (run(script(tokenizer, right), tokenizer, benchmark, verifier, SAMPLED) for _ in range(2))
    assert json.dumps(first.to_dict(timing=False)) == json.dumps(second.to_dict(timing=False))
    timed = json.loads(json.dumps(first.to_dict()))
    assert timed["timing"]["tokens"] > 0 and timed["scores"]["sums"]["seconds"] > 0
    assert timed["benchmarks"]["sums"]["sampling"]["n"] == 4
    assert first.summary()["sums/accuracy"] == 1.0
    assert "| sums | avg@4 | 1.000 | " in first.table()


def test_presets():
    paper = PRESETS["paper"]
    assert paper["math500"] == paper["amc23"] == Sampling(temperature=0.0, max_tokens=2048)
    assert paper["aime25"] == Sampling(temperature=0.6, top_p=0.95, max_tokens=2048, n=8)
    assert PRESETS["avg32"]["aime25"].n == 32
    assert PRESETS["greedy"]["my-own-file"].temperature == 0
    assert PRESETS["long"]["math500"].max_tokens == 32_768


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature >= 0"),
        ({"top_p": 0}, "0 < top_p <= 1"),
        ({"max_tokens": 0}, "max_tokens >= 1"),
        ({"n": 4}, "gives 4 equal samples"),
    ],
)
def test_senseless_sampling_is_refused(settings, message):
    with pytest.raises(FuraError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("gold", ["\\frac{1}{2", "}{"])
def test_a_gold_answer_that_cannot_be_read_stops_before_sampling(script, tokenizer, write_jsonl, verifier, gold):
    rows = [{"id": "ok", "problem": "p", "answer": "1"}, {"id": "broken", "problem": "q", "answer": gold}]
    sampler = script(tokenizer, lambda p, r: "")
    with pytest.raises(FuraError, match=r"gold answer .* of problem 'broken' in .*cannot be read"):
        run(sampler, tokenizer, load_benchmark(str(write_jsonl("b.jsonl", rows))), verifier, Sampling())
    assert sampler.requests == []


def test_no_benchmark_and_two_of_one_name(script, tokenizer, sums_file, verifier):
    benchmark = load_benchmark(str(sums_file))
    for benchmarks, message in (([], "no benchmark"), ([benchmark, benchmark], "same name: sums, sums")):
        with pytest.raises(FuraError, match=message):
            evaluate(
                script(tokenizer, right),
                tokenizer,
                benchmarks,
                prompt=PROMPT,
                sampling=Sampling(),
                verifier=verifier,
                progress=False,
            )
