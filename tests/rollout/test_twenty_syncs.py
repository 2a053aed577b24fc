"""Twenty syncs with random updates: the engine says what the merged transformers model says.

Each architecture on a real engine of this process, and a real model there and on a server. The tiny model's servers are
in `test_serve` and `test_merged_server`.
"""

import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from servers import Server
from swapping import max_gap
from syncs import SYNCS, check_twenty_syncs, make_policy, reference_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.errors import FuraError
from fura_rl.rollout.engine import FuraVLLMGeneration
from fura_rl.rollout.merged import merged_weights
from fura_rl.rollout.probe import probe_sequences, score_on_server
from fura_rl.rollout.transport import AdapterVLLMClient, adapter_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SHAPE = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256, initializer_range=0.2,
)  # fmt: skip
ARCHITECTURES = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "llama, tied, biases": (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": False}),
    "qwen3, tied": (Qwen3Config, {"tie_word_embeddings": True}),
}


def after_losing_everything(policy, engine):
    """The gap of the sync after a sleep of level 2: weights that no adapter touches, and biases, come back too.

    vLLM's CPU build sleeps without dropping anything, so what a GPU drops is overwritten here.
    """
    engine.enable_sleep_mode = True
    engine.llm.sleep(level=2)
    engine._load((name, torch.ones_like(tensor)) for name, tensor in merged_weights(policy))
    engine.sync_weights()
    ids = probe_sequences(AutoTokenizer.from_pretrained(policy.name_or_path))
    gap = max_gap(engine.score(ids.tolist()), reference_logprobs(policy, ids))
    assert gap < 1e-4
    return gap


def colocated(path, std=0.05, **options):
    """The largest gap of twenty syncs into an engine of this process."""
    policy = make_policy(path, **options)
    engine = engine_of(policy)
    gap = check_twenty_syncs(policy, engine.sync_weights, engine.score, std)
    assert engine.version == SYNCS and engine._in_place.complete
    gap = max(gap, after_losing_everything(policy, engine))
    del engine.llm
    gc.collect()
    return gap


def save_random(path, tiny_model, architecture):
    config_class, options = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SHAPE, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # transformers starts them at zero
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, tmp_path, tiny_model):
    save_random(tmp_path, tiny_model, architecture)
    colocated(tmp_path, train_bias="biases" in architecture)


def gap_of_a_sync(policy, engine):
    engine.sync_weights()
    ids = probe_sequences(AutoTokenizer.from_pretrained(policy.name_or_path))
    return max_gap(engine.score(ids.tolist()), reference_logprobs(policy, ids))


def engine_of(policy):
    tokenizer = AutoTokenizer.from_pretrained(policy.name_or_path)
    return FuraVLLMGeneration(policy, Accelerator(cpu=True), tokenizer, max_model_length=128, max_num_seqs=4)


def test_a_bias_that_another_adapter_trained_does_not_stay(tmp_path, tiny_model):
    save_random(tmp_path, tiny_model, "llama, tied, biases")
    policy = make_policy(tmp_path, train_bias=True)
    policy.add_adapter("plain", FuraConfig(target_modules="all-linear"))
    engine = engine_of(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".default." in name and "fura_" in name:
                parameter.normal_(std=0.05)
    assert [gap_of_a_sync(policy, engine) < 1e-4 for _ in range(2)] == [True, True]
    policy.set_adapter("plain")
    assert gap_of_a_sync(policy, engine) < 1e-4


def test_a_part_of_a_fused_layer_beside_other_trained_weights(tmp_path, tiny_model):
    save_random(tmp_path, tiny_model, "qwen2")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = FuraConfig(target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    policy = get_peft_model(base, config)
    engine = engine_of(policy)
    for _ in range(3):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        assert gap_of_a_sync(policy, engine) < 1e-4


def test_a_tied_embedding_that_is_trained_apart_is_refused(tmp_path, tiny_model):
    save_random(tmp_path, tiny_model, "qwen2, tied")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = FuraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(FuraError, match="trained apart from the weight that it is tied to"):
        engine_of(get_peft_model(base, config))


@pytest.fixture
def real_model():
    path = Path(__file__).parents[3] / "models" / "smollm2-135m"
    if not path.is_dir():
        pytest.skip(f"no model in {path}")
    return path


@pytest.mark.soak
def test_a_real_model_in_this_process(real_model):
    print(f"{real_model.name}: largest log-prob gap of {SYNCS} syncs {colocated(real_model, std=0.01):.2e}")


@pytest.mark.soak
def test_a_real_model_on_a_server(real_model, tmp_path):
    policy = make_policy(real_model)
    server = Server(real_model, tmp_path / "log", "--for-training")
    try:
        client = AdapterVLLMClient(server.wait().url, connection_timeout=60)
        gap = check_twenty_syncs(
            policy,
            lambda: client.push(adapter_of(policy, lambda parameters: nullcontext())),
            lambda sequences: score_on_server(client, sequences),
            std=0.01,
        )
    finally:
        server.stop()
    print(f"{real_model.name}, server: largest log-prob gap of {SYNCS} syncs {gap:.2e}")
