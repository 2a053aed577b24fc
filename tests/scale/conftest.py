"""The main job on several ranks, in a folder for each module."""

import pytest
from job import Ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_model, tiny_problems):
    ranks = Ranks(
        tmp_path_factory.mktemp("ranks"), model_name_or_path=str(tiny_model), prompt="plain", use_vllm=False,
        dataset_name=str(tiny_problems / "train.jsonl"), max_steps=6, num_generations=4, max_completion_length=16,
        learning_rate=1e-3, lr_scheduler_type="linear", rewards=["job:reward"], save_steps=3, weight_decay=0.1,
    )  # fmt: skip
    yield ranks
    ranks.close()
