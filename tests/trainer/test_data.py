"""Local files become prompts; what is wrong with a file is said in one sentence."""

import json

import pytest
from datasets import Dataset

from fura_rl.data import load_problems, to_prompts
from fura_rl.errors import FuraError
from fura_rl.prompts import load_prompt


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_jsonl_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]
    jsonl = load_problems(write(tmp_path / "a.jsonl", rows))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    assert jsonl.to_list() == load_problems(str(tmp_path / "a.parquet")).to_list() == rows


def test_columns_of_known_sets_are_understood(tmp_path):
    gsm8k = [{"question": "How many?", "answer": "3 + 4 = 7\n#### 7"}]
    assert load_problems(write(tmp_path / "g.jsonl", gsm8k))["answer"][:] == ["7"]
    math = [{"problem": "x?", "solution": r"First \boxed{1}, then \boxed{\frac{1}{2}}."}]
    assert load_problems(write(tmp_path / "m.jsonl", math))["answer"][:] == [r"\frac{1}{2}"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "1+1", "answer": "2"}], "has no column 'problem'"),
        ([{"problem": "1+1", "gold": "2"}], "has no column 'answer'"),
        ([{"problem": "1+1", "answer": "2"}, {"problem": "3", "answer": " "}], "row 1 has an empty answer"),
        ([], "is empty"),
    ],
)
def test_bad_files_are_refused(tmp_path, rows, words):
    with pytest.raises(FuraError, match=words):
        load_problems(write(tmp_path / "bad.jsonl", rows))


def test_missing_file(tmp_path):
    with pytest.raises(FuraError, match="does not exist"):
        load_problems(str(tmp_path / "none.jsonl"))


def test_prompts_are_messages_only_with_a_chat_template():
    class Tokenizer:
        chat_template = None

    rows = Dataset.from_list([{"problem": "1+1?", "answer": "2"}])
    prompt = load_prompt("qwen-boxed")
    plain = to_prompts(rows, prompt, Tokenizer())[0]["prompt"]
    assert plain.startswith("1+1?\nPlease reason step by step")
    Tokenizer.chat_template = "{{ messages }}"
    assert to_prompts(rows, prompt, Tokenizer())[0]["prompt"] == [{"role": "user", "content": plain}]


def test_prompt_files_need_a_placeholder(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("Solve {problem} in {braces}.")
    assert load_prompt(str(file)).messages("1+1")[0]["content"] == "Solve 1+1 in {braces}."
    file.write_text("no place")
    with pytest.raises(FuraError, match="placeholder"):
        load_prompt(str(file))
    with pytest.raises(FuraError, match="Unknown prompt"):
        load_prompt("boxd")
