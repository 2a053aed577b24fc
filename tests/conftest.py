"""Fixtures that every test folder may use."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """Each module leaves `os.environ` as it found it: engines and trainers in this process set RANK, MASTER_PORT and
    more, and a process started later would take them for its own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of benchmark data next to the checkout; the data is not part of the repository."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"benchmark data not found: put the JSONL files into {path} to run this test")
    return path


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The checkpoint that ships with the repository."""
    return Path(__file__).parents[1] / "examples" / "tiny" / "model"


@pytest.fixture(scope="session")
def tiny_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train.jsonl` and `test.jsonl` of the kind that the tiny model was pretrained on."""
    folder = tmp_path_factory.mktemp("problems")
    script = Path(__file__).parents[1] / "examples" / "tiny" / "problems.py"
    subprocess.run([sys.executable, script, "--out", folder, "--train", "64", "--test", "16"], check=True)
    return folder
