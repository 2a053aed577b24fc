"""Mistakes that users make: one sentence on stderr, exit status 2, no traceback."""

import json

import pytest

from fura_rl import train_grpo


def run(capsys, *arguments):
    status = train_grpo.main([str(a) for a in arguments])
    return status, capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"problem": "1+1?", "answer": "2"}) + "\n")
    return file


def test_missing_options(capsys, tmp_path, data):
    status, err = run(capsys, "--output_dir", tmp_path / "run", "--dataset_name", data)
    assert status == 2 and "--model_name_or_path is missing" in err
    status, err = run(capsys, "--output_dir", tmp_path / "run", "--model_name_or_path", "x")
    assert status == 2 and "--dataset_name is missing" in err


def test_unknown_model(capsys, tmp_path, data):
    status, err = run(
        capsys, "--output_dir", tmp_path / "run", "--dataset_name", data, "--model_name_or_path", tmp_path / "no-model"
    )
    assert status == 2 and err.splitlines()[-1] == f"error: The model directory {tmp_path / 'no-model'} does not exist."
    status, err = run(
        capsys, "--output_dir", tmp_path / "run", "--dataset_name", data, "--model_name_or_path", "nobody/no-model"
    )
    assert status == 2 and err.splitlines()[-1].startswith("error: Cannot load the model 'nobody/no-model'")


def test_missing_column(capsys, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"text": "1+1?", "answer": "2"}) + "\n")
    status, err = run(
        capsys, "--output_dir", tmp_path / "run", "--dataset_name", file, "--model_name_or_path", "unused"
    )
    assert status == 2 and "has no column 'problem'" in err


def test_unknown_option_in_the_recipe(capsys, tmp_path, data):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path / 'run'}\ndataset_name: {data}\nlerning_rate: 1.0\n")
    status, err = run(capsys, "--config", recipe)
    assert status == 2 and "lerning_rate" in err


def test_output_directory_that_is_a_file(capsys, tmp_path, data):
    status, err = run(capsys, "--output_dir", data, "--dataset_name", data, "--model_name_or_path", "unused")
    assert status == 2 and "Cannot write to output_dir" in err
