"""Whatever goes wrong on the way from trainer to engine is noticed by the probe after the sync, which says why."""

import gc
import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from fura_rl.errors import FuraError
from fura_rl.rollout import merged_weights, vllm_names
from fura_rl.rollout.probe import probe_sequences
from fura_rl.trainer import FuraGRPOConfig, FuraGRPOTrainer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, tiny_model, tiny_problems):
    problems = [json.loads(line) for line in (tiny_problems / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": [{"role": "user", "content": p["problem"]}], "answer": p["answer"]} for p in problems]
    args = FuraGRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, max_steps=4, vllm_max_model_length=256, max_logp_gap=1e-4, save_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = FuraGRPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    yield trainer
    trainer.close()
    del trainer.vllm_generation.llm
    gc.collect()


@pytest.fixture
def synced(trainer):
    """The trainer after an update that its engine has, and the merged weights by name."""
    put(trainer, dict(merged_weights(trainer.model)))  # an earlier fault may be where no adapter is
    move(trainer)
    trainer.vllm_generation.sync_weights()
    assert trainer.engine_check.probe() < 1e-5
    return trainer, {name: tensor.clone() for name, tensor in merged_weights(trainer.model)}


def move(trainer):
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn_like(parameter))


def put(trainer, weights):
    """Into the engine, past our own sync."""
    trainer.vllm_generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})


def base_of(trainer, part):
    """The base weights whose names contain `part`."""
    parameters = trainer.model.base_model.model.named_parameters()
    base = {n.replace(".base_layer", ""): p.detach() for n, p in parameters if ".fura_" not in n}
    found = {name: tensor for name, tensor in base.items() if part in name}
    assert found
    return found


def check(trainer, cause):
    with pytest.raises(FuraError, match=rf"Engine and trainer disagree .*Likely cause: .*{cause}"):
        trainer.engine_check.probe()


def test_a_sync_that_does_not_happen(synced):
    trainer, _ = synced
    move(trainer)
    check(trainer, "the sync did not reach the engine, which still has the weights of the sync before")


def test_a_skipped_decoder_layer(synced):
    trainer, merged = synced
    put(trainer, {**merged, **base_of(trainer, "layers.1.")})
    check(trainer, r"the update of model\.layers\.1 did not reach the engine")


def test_a_skipped_matrix(synced):
    trainer, merged = synced
    put(trainer, {**merged, **base_of(trainer, "layers.0.mlp.down_proj")})
    check(trainer, r"the update of model\.layers\.0\.mlp\.down_proj did not reach the engine")


def test_an_adapter_that_was_lost(synced):
    trainer, merged = synced
    put(trainer, {**merged, **base_of(trainer, "proj.weight")})
    check(trainer, "the engine has the base model's weights, without the adapter")


def test_an_adapter_that_was_merged_twice(synced):
    trainer, merged = synced
    layers = {n.removeprefix("base_model.model."): m for n, m in trainer.model.named_modules() if hasattr(m, "delta")}
    twice = {f"{name}.weight": layer.merged_weight(["default", "default"]) for name, layer in layers.items()}
    put(trainer, {**merged, **twice})
    check(trainer, "the adapter was merged twice in the engine")


def test_two_layers_swapped(synced):
    trainer, merged = synced
    swapped = {name.replace("layers.0.", "layers.X."): tensor for name, tensor in merged.items()}
    swapped = {name.replace("layers.1.", "layers.0."): tensor for name, tensor in swapped.items()}
    put(trainer, {name.replace("layers.X.", "layers.1."): tensor for name, tensor in swapped.items()})
    check(trainer, "a layer with another layer's weights")


def test_bfloat16_where_float32_was_meant(synced):
    trainer, merged = synced
    put(trainer, {name: tensor.bfloat16().float() for name, tensor in merged.items()})
    check(trainer, "another base checkpoint or dtype")


def test_another_checkpoint(synced):
    """Differs where no adapter is, so that a sync of what is trained would not heal it."""
    trainer, merged = synced
    embedding = merged["model.embed_tokens.weight"]
    put(
        trainer,
        {**merged, "model.embed_tokens.weight": embedding + 0.1 * embedding.std() * torch.randn_like(embedding)},
    )
    check(trainer, "another base checkpoint")


def test_an_engine_that_says_nan(synced):
    trainer, merged = synced
    put(trainer, {**merged, "model.norm.weight": merged["model.norm.weight"] * float("nan")})
    check(trainer, "")


def test_options_that_differ_are_named(synced, monkeypatch):
    trainer, merged = synced
    put(trainer, {name: tensor.bfloat16().float() for name, tensor in merged.items()})
    monkeypatch.setattr(trainer.vllm_generation, "_trainer_dtype", lambda: torch.bfloat16)
    check(trainer, r"the engine computes in torch\.float32, the trainer in torch\.bfloat16")


@pytest.mark.parametrize("level", [1, 2])
def test_what_sleeping_drops_is_sent_again(synced, monkeypatch, level):
    """vLLM's CPU build sleeps without dropping anything, so what level 2 drops is overwritten here."""
    trainer, merged = synced
    engine = trainer.vllm_generation
    monkeypatch.setattr(engine, "enable_sleep_mode", True)
    monkeypatch.setattr(engine, "sleep_level", level)
    engine.llm.sleep(level=level)
    if level == 2:
        put(trainer, {name: torch.ones_like(tensor) for name, tensor in merged.items()})
    move(trainer)
    engine.sync_weights()
    assert trainer.engine_check.probe() < 1e-5  # which wakes the KV cache
    assert not vllm_names.is_asleep(engine.llm, "weights") and not vllm_names.is_asleep(engine.llm, "kv_cache")


def test_the_cadence(synced):
    trainer, _ = synced
    check, state = trainer.engine_check, trainer.state
    check.every, check.probed_at, check.engine_before = 2, None, None
    logged = trainer._metrics["train"]["sync/probe_gap_mean"]
    seen = []
    for step in range(5):
        state.global_step, trainer._last_loaded_step = step, -1
        if step == 3:  # as after a resume: probed once more, and not logged
            check.engine_before = None
        engine, count = check.engine_before, len(logged)
        trainer.sync_engine()
        seen.append((check.engine_before is not engine, len(logged) - count))
    assert seen == [(True, 1), (False, 0), (True, 1), (True, 0), (True, 1)]
    state.global_step, trainer._last_loaded_step, check.every = 0, -1, 1


def test_the_sequences_are_fixed_and_differ(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = probe_sequences(tokenizer)
    assert ids.shape == (4, 32) and torch.equal(ids, probe_sequences(tokenizer))
    assert len({tuple(row) for row in ids.tolist()}) == 4 and ids.unique().numel() > 30
