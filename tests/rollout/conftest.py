"""Fixtures shared by the tests of swapping and serving."""

from pathlib import Path

import pytest
from swapping import TEXTS, make_adapter
from transformers import AutoTokenizer


@pytest.fixture(scope="session")
def adapter_dir(tmp_path_factory, tiny_model) -> Path:
    """A folder with adapters `a` and `b` of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_model, folder / "a", seed=1)
    make_adapter(tiny_model, folder / "b", seed=2)
    return folder


@pytest.fixture(scope="session")
def sequences(tiny_model) -> list[list[int]]:
    """Token ids to score."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [tokenizer(text).input_ids for text in TEXTS]
