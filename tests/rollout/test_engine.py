"""The real CPU engine samples from the merged policy, after every sync, on a trainer whose weights never move."""

import copy
import gc
import json

import pytest
import torch
from datasets import Dataset
from swapping import prompt_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def reference_logprobs(policy, sequences):
    """The same in transformers, from PEFT's own dense merge of a copy: independent of the stream under test."""
    merged = copy.deepcopy(policy).merge_and_unload()
    logps = []
    with torch.no_grad():
        for ids in sequences:
            logits = merged(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            logps.append(logits[range(len(ids) - 1), ids[1:]].tolist())
    return logps


@pytest.fixture(scope="module")
def rows(tiny_problems):
    """Prompts and answers, as the trainer wants them."""
    lines = (tiny_problems / "train.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    return [{"prompt": [{"role": "user", "content": p["problem"]}], "answer": p["answer"]} for p in problems]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_model, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    args = FuraGRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=32, num_generations=8,
        max_completion_length=80, max_steps=3, learning_rate=1e-2, vllm_max_model_length=256, max_logp_gap=1e-3,
        save_strategy="no", disable_tqdm=True, seed=3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trainer = FuraGRPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    yield trainer
    trainer.close()
    del trainer.vllm_generation.llm
    gc.collect()


def test_engine_equals_merged_model_after_random_updates(trainer):
    policy = trainer.accelerator.unwrap_model(trainer.model)
    adapter = [p for p in policy.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in adapter]
    sequences = [trainer.processing_class(f"Sam has {i} apples and {i + 7} pears.").input_ids for i in range(4)]
    base = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    torch.manual_seed(0)
    seen = []
    for version in range(1, 6):
        with torch.no_grad():
            for parameter in adapter:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
        trainer.vllm_generation.sync_weights()
        assert trainer.vllm_generation.version == version
        engine = prompt_logprobs(trainer.vllm_generation.llm, sequences)
        reference = reference_logprobs(policy, sequences)
        for ours, theirs in zip(engine, reference, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=2e-4)
        seen.append(sum(engine[0]))
    assert len({round(value, 3) for value in seen}) == 5  # each update really changed the engine
    for name, parameter in policy.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), f"{name} changed"
    with torch.no_grad():
        for parameter, value in zip(adapter, start, strict=True):
            parameter.copy_(value)


def test_a_training_run_keeps_engine_and_trainer_together(trainer):
    """Three optimiser steps at a high learning rate; `max_logp_gap` would stop the run at a gap above 1e-3."""
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in trainer.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    logs = [row for row in trainer.state.log_history if "sync/logp_gap_max" in row]
    assert len(logs) == 3
    assert all(row["sync/logp_gap_max"] < 1e-3 for row in logs)
    assert sum(row["verifier/algebra"] for row in logs) == 0
    assert len(trainer.verifier.worker_pids) == 2  # begun beside the first rollouts: no step has to wait for them


def test_a_stale_engine_is_caught(trainer, rows):
    """Weights that moved without a sync: the next rollouts are refused."""
    from fura_rl.errors import FuraError

    trainer.sync_engine()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    trainer.model.train()
    with pytest.raises(FuraError, match="Engine and trainer disagree"):
        trainer._generate_and_score_completions(rows[:8] * 4)
