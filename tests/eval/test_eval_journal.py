"""`samples.jsonl`: what is kept, reused, redone and moved aside, and what happens on a full disk."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fura_rl.errors import FuraError
from fura_rl.eval import Sampling, evaluate, load_benchmark
from fura_rl.eval.journal import Journal
from fura_rl.prompts import load_prompt

SAMPLED = Sampling(temperature=1.0, n=2, max_tokens=200)


@pytest.fixture
def go(script, tokenizer, sums_file, verifier, tmp_path):
    """Evaluates the sums into `tmp_path/out`; the answers are right and carry the seed."""

    def run(
        answer=lambda prompt, request: f"{request.seed} \\boxed{{7}}", prompt="boxed", sampling=SAMPLED, identity="m"
    ):
        sampler = script(tokenizer, answer)
        result = evaluate(
            sampler,
            tokenizer,
            [load_benchmark(str(sums_file))],
            prompt=load_prompt(prompt),
            sampling=sampling,
            verifier=verifier,
            out_dir=tmp_path / "out",
            progress=False,
            identity=identity,
        )
        return result, len(sampler.requests)

    return run


@pytest.fixture
def samples(tmp_path):
    return tmp_path / "out" / "samples.jsonl"


class Killed(BaseException):
    pass


def dies_after(count):
    drawn = []

    def answer(prompt, request):
        if len(drawn) == count:
            raise Killed
        drawn.append(1)
        return f"{request.seed} \\boxed{{7}}"

    return answer


def test_lines_are_graded_and_in_order(go, samples):
    go()
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(f"sum-{i}", j) for i in range(6) for j in range(2)]
    first = lines[0]
    assert first["prompt"].startswith("user: What is 0 + 7?")
    assert first["completion"] == f"{first['seed']} \\boxed{{7}}"
    assert (first["extracted"], first["correct"], first["reason"]) == ("7", True, "correct")
    assert lines[2]["correct"] is False
    assert first["tokens"] == len(first["completion"]) and first["finish_reason"] == "stop"


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(go, samples):
    whole, _ = go()
    expected = samples.read_bytes()
    samples.unlink()
    with pytest.raises(Killed):
        go(dies_after(5))
    assert len(samples.read_text().splitlines()) == 5
    resumed, asked = go()
    assert asked == 12 - 5
    assert resumed.timing["reused"] == 5
    assert samples.read_bytes() == expected
    assert resumed.to_dict(timing=False) == whole.to_dict(timing=False)


def test_a_finished_run_is_not_sampled_again(go):
    first, _ = go()
    second, asked = go()
    assert asked == 0
    assert second.samples == first.samples
    assert second.scores["sums"].tokens_per_second == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"\x00\xff\xfe garbage",
        lambda line: b"[1, 2]",
        lambda line: line.replace(b'"tokens": ', b'"token": '),
        lambda line: line.replace(b'"seed": ', b'"seed": "x", "was": '),
    ],
)
def test_a_damaged_line_is_reported_and_redone(go, samples, damage):
    whole, _ = go()
    expected = samples.read_bytes()
    lines = expected.splitlines()
    lines[3] = damage(lines[3])
    samples.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.warns(UserWarning, match=r"1 damaged line\(s\) \(4\)"):
        resumed, asked = go()
    assert asked == 1
    assert samples.read_bytes() == expected
    assert resumed.samples == whole.samples


def test_a_line_torn_by_a_kill_does_not_spoil_the_next(go, samples):
    with pytest.raises(Killed):
        go(dies_after(3))
    samples.write_bytes(samples.read_bytes()[:-40])
    with pytest.warns(UserWarning, match=r"1 damaged line\(s\) \(3\)"):
        _, asked = go()
    assert asked == 10
    # A complete last line that only lost its line break is kept.
    samples.write_bytes(samples.read_bytes().rstrip(b"\n"))
    with pytest.raises(Killed):
        go(dies_after(0), sampling=Sampling(temperature=1.0, n=3, max_tokens=200))
    assert len(samples.read_bytes().splitlines()) == 12
    assert go()[1] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "plain"},
        {"identity": "other weights"},
        {"sampling": Sampling(temperature=0.5, n=2, max_tokens=200)},
        {"sampling": Sampling(temperature=1.0, n=2, max_tokens=100)},
        {"sampling": Sampling(temperature=1.0, n=2, max_tokens=200, seed=1)},
    ],
)
def test_other_model_prompt_or_sampling_is_drawn_anew_and_the_old_is_kept(go, samples, change):
    go()
    before = samples.read_text().splitlines()
    with pytest.warns(UserWarning, match=r"12 completion\(s\) of another model, prompt or sampling"):
        _, asked = go(**change)
    assert asked == 12
    assert samples.with_name("samples.other.jsonl").read_text().splitlines() == before


@pytest.mark.parametrize("text", ["\u2028 \u0085 \x0b \x00", "日本 \r\n 🙂"])
def test_any_text_survives(go, samples, text):
    result, _ = go(lambda prompt, request: text)
    expected = [s.completion.text for row in result.samples["sums"] for s in row]
    assert [json.loads(line)["completion"] for line in samples.read_bytes().splitlines()] == expected
    assert go()[1] == 0


def test_text_that_is_not_unicode_survives(tmp_path):
    """A server's JSON may hold half of a surrogate pair, which no UTF-8 file can."""
    line = {"key": "k", "completion": json.loads('"half \\ud83d."'), "tokens": 1, "finish_reason": "stop", "seed": 1}
    journal = Journal(tmp_path, ["k"])
    journal.append(line)
    journal.finish([line])
    assert Journal(tmp_path, ["k"]).finished["k"].text == line["completion"]


def test_more_samples_reuse_the_first(go):
    go()
    _, asked = go(sampling=Sampling(temperature=1.0, n=5, max_tokens=200))
    assert asked == 6 * 3


def test_a_file_in_place_of_the_directory(go, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FuraError, match=r"Cannot write to .*out: File exists"):
        go()


FULL_DISK = """
import resource, signal, sys
from fura_rl.errors import FuraError
from fura_rl.eval.grading import Completion
from fura_rl.eval.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
journal = Journal(sys.argv[1], [])
line = dict(key="k", completion="x" * 300, tokens=300, finish_reason="stop", seed=1)
try:
    for i in range(100):
        journal.append({**line, "key": f"k{i}"})
    journal.flush()
except FuraError as error:
    print(error)
journal.close()
"""


def test_a_write_that_fails_keeps_what_was_finished(tmp_path):
    """A file size limit makes the system refuse the write, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.startswith(
        f"Cannot write to {tmp_path}: File too large. Completions that had finished are kept in"
    )
    with pytest.warns(UserWarning, match="1 damaged"):
        journal = Journal(tmp_path, [f"k{i}" for i in range(100)])
    assert list(journal.finished) == ["k0", "k1", "k2", "k3", "k4"]
    journal.close()


def test_appending_waits_for_no_disk(tmp_path):
    """A pipe that is full stands for a disk that hangs: lines can be appended, and `flush` waits for them."""
    journal = Journal(tmp_path, [])
    reader, writer = os.pipe()
    journal._file.close()
    journal._file = os.fdopen(writer, "wb", buffering=0)
    line = {"key": "k", "completion": "x" * 300_000, "tokens": 1, "finish_reason": "stop", "seed": 1}
    for number in range(3):
        journal.append({**line, "seed": number})
    with ThreadPoolExecutor() as threads, os.fdopen(reader, "rb") as file:
        flushed = threads.submit(journal.flush)
        assert not flushed.done()
        assert [json.loads(file.readline())["seed"] for _ in range(3)] == [0, 1, 2]
        flushed.result(timeout=60)
    journal.close()


def test_what_cannot_be_written_is_raised_where_it_came_from(tmp_path):
    journal = Journal(tmp_path, [])
    journal.append({"key": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        journal.flush()
    with pytest.raises(TypeError, match="not JSON serializable"):
        journal.append({"key": "k"})
    journal.close()
