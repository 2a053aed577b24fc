"""Adapters per request in an engine of this process: each row has its own, and what is refused changes nothing."""

import gc
import os
import shutil

import pytest
import swapping
from multi_cases import gap, make_lora, merged_model, sample
from swapping import make_adapter, max_gap

from fura_rl.adapter.saving import to_delta
from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.multi import load_adapter, register
from fura_rl.rollout.multi_settings import MultiSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def engines_in_this_process(own_environment):
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
    os.environ.update(MultiSettings(block_sizes={512: 64}).to_environment())


@pytest.fixture(scope="module")
def llm(tiny_model, engines_in_this_process):
    from vllm import LLM

    register()
    llm = LLM(
        str(tiny_model), enforce_eager=True, dtype="float32", max_model_len=512, enable_prefix_caching=True,
        enable_lora=True, max_loras=3, max_lora_rank=8, max_cpu_loras=16,
    )  # fmt: skip
    yield llm
    del llm
    gc.collect()


@pytest.fixture(scope="module")
def lora_dir(tiny_model, tmp_path_factory):
    """An ordinary LoRA that has moved."""
    return make_lora(tiny_model, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def adapters(llm, adapter_dir, lora_dir):
    """Requests by name: the base, two of FuRA, and a LoRA in the last slot."""
    folders = {"a": adapter_dir / "a", "b": adapter_dir / "b", "lora": lora_dir}
    return {None: None} | {name: load_adapter(llm, name, folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def merged(tiny_model, adapter_dir, lora_dir):
    """transformers' models, with each adapter merged by PEFT."""
    folders = {None: None, "a": adapter_dir / "a", "b": adapter_dir / "b", "lora": lora_dir}
    return {name: merged_model(tiny_model, folder) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["a", "b", "lora", None])
def test_each_adapter_alone_is_the_merged_model(llm, adapters, merged, sequences, name):
    """Fused q, k, v and gate, up have multipliers of their own in it."""
    for ids, found in zip(sequences, sample(llm, sequences, [adapters[name]] * len(sequences)), strict=True):
        assert gap(merged[name], ids, found) < 1e-4
        assert name is None or gap(merged[None], ids, found) > 0.1


def test_a_mixed_batch_is_each_of_its_rows_alone(llm, adapters, merged, sequences):
    """Every adapter with every sequence in one batch: the tokens of each alone, the log-probs of the merged models."""
    pairs = [(name, ids) for ids in sequences for name in adapters]
    found = sample(llm, [ids for _, ids in pairs], [adapters[name] for name, _ in pairs])
    for (name, ids), mixed in zip(pairs, found, strict=True):
        assert gap(merged[name], ids, mixed) < 1e-4
        ((tokens, logprobs),) = sample(llm, [ids], [adapters[name]])
        assert tokens == mixed[0] and max_gap([logprobs], [mixed[1]]) < 1e-4


def test_cached_prefixes_belong_to_one_adapter(llm, adapters, sequences, adapter_dir, tmp_path):
    """A prompt of several cache blocks: found again by the same adapter, by no other, nor by another of that name."""
    from vllm import SamplingParams

    prompt = (sequences[0] * 60)[:400]
    llm.reset_prefix_cache()

    def cached(request):
        options = SamplingParams(max_tokens=1, temperature=0)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], options, lora_request=[request], use_tqdm=False)
        return output.num_cached_tokens

    for name in adapters:
        assert cached(adapters[name]) == 0
        assert cached(adapters[name]) > 0
    folder = shutil.copytree(adapter_dir / "a", tmp_path / "reused")
    first = load_adapter(llm, "reused", folder)
    assert cached(first) == 0
    shutil.copytree(adapter_dir / "b", folder, dirs_exist_ok=True)
    assert cached(load_adapter(llm, "reused", folder)) == 0  # one name and path, other weights


@pytest.mark.parametrize(
    "config",
    [
        {"singular_values": "merged"},
        {"basis": "identity"},
        {"target_modules": ["q_proj", "up_proj", "o_proj"]},
        {"block_size": {"q_proj": 8, "down_proj": 64, "o_proj": 4}},
    ],
    ids=["merged", "identity", "parts", "blocks"],
)
def test_members_of_the_family(llm, merged, config, tmp_path, sequences, tiny_model):
    """Other factors, layers of which only one part is adapted, smaller blocks, and larger ones known at the start."""
    folder = make_adapter(tiny_model, tmp_path / "adapter", seed=3, **config)
    request = load_adapter(llm, "member", folder)
    model = merged_model(tiny_model, folder)
    for ids, found in zip(sequences, sample(llm, sequences, [request] * len(sequences)), strict=True):
        assert gap(model, ids, found) < 1e-4
        assert gap(merged[None], ids, found) > 0.01


def test_the_delta_form_serves_the_same(llm, merged, adapter_dir, tmp_path, sequences):
    to_delta(shutil.copytree(adapter_dir / "a", tmp_path / "delta"))
    request = load_adapter(llm, "delta", tmp_path / "delta")
    (found,) = sample(llm, sequences[:1], [request])
    assert gap(merged["a"], sequences[0], found) < 1e-4


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (swapping.truncated, "truncated"),
        (swapping.pickled, "pickle"),
        (swapping.other_base, "another base model: the weight of"),
        (swapping.other_shape, "cover 1024 features, this model has 512"),
        (swapping.other_layers, "no layer model.layers.7"),
        (swapping.without_basis, "lacks basis"),
        (swapping.not_finite, "NaN"),
        (swapping.extra_module, "modules_to_save"),
        (swapping.head, "no layer lm_head"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_others_go_on(llm, adapters, merged, spoil, reason, adapter_dir,
                                                           tmp_path, sequences):  # fmt: skip
    spoil(shutil.copytree(adapter_dir / "b", tmp_path / "b"))
    with pytest.raises(FuraError, match=reason):
        load_adapter(llm, "spoilt", tmp_path / "b")
    names = ["a", "b", None]
    for name, ids, found in zip(names, sequences, sample(llm, sequences, [adapters[n] for n in names]), strict=True):
        assert gap(merged[name], ids, found) < 1e-4


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"side": "output"}, "multiplies the layers' outputs"),
        ({"block_size": "full"}, "was not known when the engine started"),
    ],
)
def test_what_only_a_merge_can_serve(llm, config, reason, tmp_path, tiny_model):
    folder = make_adapter(tiny_model, tmp_path / "adapter", seed=3, **config)
    with pytest.raises(FuraError, match=reason):
        load_adapter(llm, "other", folder)


def test_more_adapters_than_slots(llm, adapters, merged, adapter_dir, sequences):
    """They take turns in the slots, and a slot that changes its kind keeps nothing of the other."""
    folders = [adapter_dir / "ab"[i % 2] for i in range(4)]
    more = [load_adapter(llm, f"more{i}", folder) for i, folder in enumerate(folders)]
    for request, folder in zip(more, folders, strict=True):
        (found,) = sample(llm, sequences[:1], [request])
        assert gap(merged[folder.name], sequences[0], found) < 1e-4
    for name in adapters:
        (found,) = sample(llm, sequences[:1], [adapters[name]])
        assert gap(merged[name], sequences[0], found) < 1e-4


def test_a_loaded_adapter_is_not_replaced_under_its_requests(llm, adapters, adapter_dir):
    from vllm.lora.request import LoRARequest

    request = adapters["a"]
    with pytest.raises(FuraError, match="a cannot be loaded in place"):
        llm.llm_engine.add_lora(LoRARequest("a", request.lora_int_id, str(adapter_dir / "b"), load_inplace=True))


def test_the_names_file_says_what_a_new_vllm_has_moved(llm, monkeypatch):
    from vllm.lora import layers
    from vllm.v1.core import kv_cache_utils

    assert vllm_names.missing_for_per_request() == []
    monkeypatch.delattr(layers, "RowParallelLinearWithLoRA")
    monkeypatch.delattr(kv_cache_utils, "_gen_lora_extra_hash_keys")
    missing = vllm_names.missing_names()
    assert missing[0] == "vllm.lora.layers.RowParallelLinearWithLoRA.apply"
    assert missing[-1] == "vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys"
