"""Adapters in a running engine of this process: every change is exact, and what is refused changes nothing."""

import gc
import os
import shutil

import pytest
import swapping
import torch
from swapping import make_adapter, max_gap, prompt_logprobs, reference_logprobs
from transformers import AutoModelForCausalLM, Qwen2Config

from fura_rl.adapter.saving import to_delta
from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.attach import attach
from fura_rl.rollout.in_engine import InEngineAdapter
from fura_rl.rollout.payload import read_folder

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def engines_in_this_process(own_environment):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")


@pytest.fixture(scope="module")
def llm(tiny_model, engines_in_this_process):
    from vllm import LLM

    llm = LLM(str(tiny_model), enforce_eager=True, dtype="float32", max_model_len=512, enable_prefix_caching=True)
    yield llm
    del llm
    gc.collect()


@pytest.fixture(scope="module")
def fresh(llm, sequences):
    """Log-probs of the engine as it was started."""
    return prompt_logprobs(llm, sequences)


@pytest.mark.parametrize("keep", ["cpu", "device", "checkpoint"])
def test_any_adapter_may_follow_any_other(llm, fresh, keep, adapter_dir, sequences, tiny_model):
    """A, B, off, A: each equals transformers' merge, the second A equals the first and off equals a fresh engine, in
    every bit."""
    adapters = attach(llm, keep=keep)
    seen = {}
    for version, name in enumerate(["a", "b", None, "a", "b", None], start=1):
        assert (adapters.off() if name is None else adapters.swap(adapter_dir / name)) == version
        found = prompt_logprobs(llm, sequences)
        assert found == seen.setdefault(name, found)
        assert adapters.list() == {known: known == name for known in ["a", "b"][: min(version, 2)]}
        assert adapters.checksum == ("" if name is None else read_folder(adapter_dir / name).checksum)
    assert seen[None] == fresh
    for name in "ab":
        assert max_gap(seen[name], reference_logprobs(tiny_model, adapter_dir / name, sequences)) < 1e-4
        assert max_gap(seen[name], fresh) > 0.1


def test_no_cached_prefix_outlives_a_swap(llm, adapter_dir, sequences, tiny_model):
    """A prompt of several cache blocks, asked again after a swap: nothing that other weights computed is used."""
    from vllm import SamplingParams

    prompt = (sequences[0] * 60)[:400]

    def ask():
        (output,) = llm.generate(
            [{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, temperature=0, logprobs=0), use_tqdm=False
        )
        (entry,) = output.outputs[0].logprobs
        (token,) = output.outputs[0].token_ids
        return output.num_cached_tokens, token, entry[token].logprob

    adapters = attach(llm)
    adapters.swap(adapter_dir / "a")
    ask()
    assert ask()[0] > 0
    adapters.swap(adapter_dir / "b")
    cached, token, logprob = ask()
    assert cached == 0
    assert abs(logprob - reference_logprobs(tiny_model, adapter_dir / "b", [[*prompt, token]])[0][-1]) < 1e-4
    adapters.off()


@pytest.mark.parametrize(
    "config",
    [
        {"side": "output"},
        {"singular_values": "merged"},
        {"basis": "identity"},
        {"target_modules": ["q_proj", "up_proj"]},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_members_of_the_family(llm, fresh, config, tmp_path, sequences, tiny_model):
    """Output-side blocks, other factors, and layers of which only one part of a fused matrix is adapted."""
    folder = make_adapter(tiny_model, tmp_path / "adapter", seed=3, **config)
    adapters = attach(llm)
    adapters.swap(folder)
    found = prompt_logprobs(llm, sequences)
    assert max_gap(found, reference_logprobs(tiny_model, folder, sequences)) < 1e-4
    assert max_gap(found, fresh) > 0.01
    adapters.off()
    assert prompt_logprobs(llm, sequences) == fresh


def test_the_delta_form_serves_the_same(llm, adapter_dir, tmp_path, sequences):
    adapters = attach(llm)
    adapters.swap(adapter_dir / "a")
    full = prompt_logprobs(llm, sequences)
    to_delta(shutil.copytree(adapter_dir / "a", tmp_path / "delta"))
    adapters.swap(tmp_path / "delta")
    assert max_gap(prompt_logprobs(llm, sequences), full) < 1e-4
    adapters.off()


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (swapping.truncated, "truncated"),
        (swapping.pickled, "pickle"),
        (swapping.other_base, "another base model"),
        (swapping.other_shape, "cover 1024 features, this model has 512"),
        (swapping.other_layers, "no layer model.layers.7"),
        (swapping.without_basis, "lacks basis"),
        (swapping.bad_factor, "do not fit together"),
        (swapping.not_finite, "NaN"),
        (swapping.extra_module, "modules_to_save"),
        (swapping.lora, "not one of FuRA"),
        (swapping.head, "no linear layer"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_weight_changes(llm, spoil, reason, adapter_dir, tmp_path, sequences):
    adapters = attach(llm)
    adapters.swap(adapter_dir / "a")
    before = prompt_logprobs(llm, sequences)
    spoil(shutil.copytree(adapter_dir / "b", tmp_path / "b"))
    with pytest.raises(FuraError, match=reason):
        adapters.swap(tmp_path / "b")
    assert adapters.version == 1 and adapters.list() == {"a": True}
    llm.reset_prefix_cache()
    assert prompt_logprobs(llm, sequences) == before
    adapters.off()


def test_a_failure_halfway_restores_the_old_weights(llm, adapter_dir, sequences, monkeypatch):
    adapters = attach(llm)
    adapters.swap(adapter_dir / "a")
    before = prompt_logprobs(llm, sequences)
    store, calls = vllm_names.store_weight, []

    def fails_once(module, parts):
        calls.append(module)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        store(module, parts)

    monkeypatch.setattr(vllm_names, "store_weight", fails_once)
    with pytest.raises(FuraError, match="old weights are back: out of memory"):
        adapters.swap(adapter_dir / "b")
    assert len(calls) == 10  # five layers tried, five put back
    assert adapters.version == 1
    llm.reset_prefix_cache()
    assert prompt_logprobs(llm, sequences) == before
    adapters.swap(adapter_dir / "b")  # and the engine can go on
    assert prompt_logprobs(llm, sequences) != before
    adapters.off()


@pytest.fixture(scope="module")
def biased_model(tmp_path_factory):
    """A random Qwen2: biases in q, k and v, and a head of its own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=496, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    folder = tmp_path_factory.mktemp("biased")
    model.save_pretrained(folder)
    return folder


def test_unpacked_fused_weights_and_biases_are_written_in_place(biased_model, sequences, tmp_path, monkeypatch):
    """As on CUDA, where captured graphs go on reading the same memory: an engine that does not pack its weights."""
    from vllm import LLM
    from vllm.model_executor.layers import utils

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
    llm = LLM(str(biased_model), enforce_eager=True, dtype="float32", max_model_len=128, skip_tokenizer_init=True)
    fresh = prompt_logprobs(llm, sequences)

    def addresses(model):
        return {name: weight.data_ptr() for name, weight in model.named_parameters()}

    (before,) = llm.apply_model(addresses)
    # something else has written to one layer; of the others is known where their parts are before anything is written
    llm.apply_model(lambda model: model.model.layers[1].mlp.gate_up_proj.weight.data.zero_())
    store, stored = vllm_names.store_weight, []

    def record(module, parts):
        stored.append(module.prefix)
        store(module, parts)

    monkeypatch.setattr(vllm_names, "store_weight", record)
    adapters = attach(llm)
    for name, train_bias in {"weights": False, "biases": True}.items():
        folder = make_adapter(biased_model, tmp_path / name, seed=4, train_bias=train_bias)
        adapters.swap(folder)
        assert stored == ["model.layers.1.mlp.gate_up_proj"]
        found = prompt_logprobs(llm, sequences)
        assert max_gap(found, reference_logprobs(biased_model, folder, sequences)) < 1e-4
        assert max_gap(found, fresh) > 0.1
    adapters.off()
    assert prompt_logprobs(llm, sequences) == fresh
    assert llm.apply_model(addresses) == [before]

    def fails(self, part, multiplier, out):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:  # what was written cannot be put back either: this engine is of no more use
        broken.setattr(InEngineAdapter, "_merge_into", fails)
        with pytest.raises(FuraError, match="An earlier change failed and could not be undone"):
            adapters.swap(tmp_path / "weights")
    with pytest.raises(FuraError, match="An earlier change failed and could not be undone"):
        adapters.off()


def test_the_names_file_says_what_a_new_vllm_has_moved(llm, monkeypatch):
    from vllm.model_executor.layers import linear
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert vllm_names.missing_names() == []
    monkeypatch.delattr(GPUModelRunner, "get_model")
    monkeypatch.delattr(linear, "QKVParallelLinear")
    monkeypatch.setattr(vllm_names, "SERVER_MODULES", ("vllm.moved.away",))
    assert vllm_names.missing_names() == [
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_model",
        "vllm.model_executor.layers.linear.QKVParallelLinear.weight_loader",
        "vllm.model_executor.layers.linear.QKVParallelLinear.weight_loader_v2",
        "vllm.moved.away",
    ]
    with pytest.raises(FuraError, match=r"has no dict\.model_runner\.get_model"):
        vllm_names.engine_model({})


def test_an_engine_elsewhere_needs_the_extension(monkeypatch, llm):
    monkeypatch.setattr(vllm_names, "runs_in_process", lambda llm: False)
    with pytest.raises(FuraError, match="worker_extension_cls"):
        attach(llm)
