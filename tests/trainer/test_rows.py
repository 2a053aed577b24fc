"""Batches of problems on their way from TRL's loader to the trainer."""

import pytest
from accelerate.utils import send_to_device

from fura_rl.trainer.resumable import Rows


@pytest.mark.slow
def test_the_loader_hands_out_rows_as_they_are(train):
    """As TRL's own `identity` would, without a walk through every value for the sake of tensors."""
    seen = []

    def keep(trainer):
        prepare = trainer._prepare_inputs
        trainer._prepare_inputs = lambda batch: seen.append(batch) or prepare(batch)

    trainer = train(lambda completions, **columns: [1.0] * len(completions), prepare=keep, max_steps=2)
    assert len(seen) == 2
    for batch in seen:
        assert type(batch) is Rows and len(batch) == 8
        assert send_to_device(batch, trainer.args.device) is batch
        assert all(row["prompt"] == f"What is {int(row['answer']) - 1} + 1?" for row in batch)
    prompts = [row["prompt"] for row in seen[0]]
    assert prompts[:4] == [prompts[0]] * 4 != prompts[4:]  # a group of generations for each problem
