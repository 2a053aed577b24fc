"""Adapters in a running engine of this process: every change is exact, and what is refused changes nothing."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from swapping import make_adapter, max_gap, prompt_logprobs, reference_logprobs

from fura_rl.adapter.saving import to_delta
from fura_rl.errors import FuraError
from fura_rl.rollout import vllm_names
from fura_rl.rollout.attach import attach
from fura_rl.rollout.payload import pack, read_folder, unpack, update

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def llm(tiny_model):
    import os

    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
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


def rewrite(folder: Path, change) -> None:
    """Saves the adapter in `folder` again with `change(tensors)` applied."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def first(tensors, suffix):
    return next(key for key in tensors if key.endswith(suffix))


def truncated(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickled(folder):
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def other_base(folder):
    rewrite(folder, lambda t: {k: torch.randn_like(v) if k.endswith("base_sample") else v for k, v in t.items()})


def other_shape(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "down_proj" not in k} | _doubled(t, "down_proj"))


def _doubled(tensors, part):
    return {
        k: v if k.endswith("base_sample") else torch.cat([v, v])
        for k, v in tensors.items()
        if part in k and "layers.0" in k
    }


def other_layers(folder):
    rewrite(folder, lambda t: {k.replace("layers.0.", "layers.7."): v for k, v in t.items()})


def without_basis(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != first(t, "basis")})


def bad_factor(folder):
    rewrite(folder, lambda t: {k: v[..., :-1].contiguous() if k == first(t, "scale") else v for k, v in t.items()})


def not_finite(folder):
    rewrite(folder, lambda t: {k: v * float("nan") if k == first(t, "core") else v for k, v in t.items()})


def extra_module(folder):
    rewrite(folder, lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(4)})


def lora(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))


def head(folder):
    rewrite(folder, lambda t: {k.replace("model.layers.0.self_attn.q_proj", "lm_head"): v for k, v in t.items()})


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (truncated, "truncated"),
        (pickled, "pickle"),
        (other_base, "another base model"),
        (other_shape, "cover 1024 features, this model has 512"),
        (other_layers, "no layer model.layers.7"),
        (without_basis, "lacks basis"),
        (bad_factor, "do not fit together"),
        (not_finite, "NaN"),
        (extra_module, "modules_to_save"),
        (lora, "not one of FuRA"),
        (head, "no linear layer"),
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
        "vllm.moved.away",
    ]
    with pytest.raises(FuraError, match=r"has no dict\.model_runner\.get_model"):
        vllm_names.engine_model({})


def test_an_engine_elsewhere_needs_the_extension(monkeypatch, llm):
    monkeypatch.setattr(vllm_names, "runs_in_process", lambda llm: False)
    with pytest.raises(FuraError, match="worker_extension_cls"):
        attach(llm)


def test_a_packed_adapter_travels_unchanged(adapter_dir):
    """Whole and as an update: at the other end the tensors and so the checksum are the same."""
    a, b = read_folder(adapter_dir / "a"), read_folder(adapter_dir / "b")
    kind, copy = unpack(pack(a))
    assert kind == "full" and copy.checksum == a.checksum != b.checksum
    kind, trained = unpack(pack(b, only_trained=True))
    assert kind == "trained"
    assert update(a, trained).checksum == b.checksum  # both were made on one basis
    size = {kind: len(pack(b, only_trained=kind == "trained")) for kind in ("full", "trained")}
    assert size["trained"] < 0.6 * size["full"]
    with pytest.raises(FuraError, match="no adapter that fura-rl has packed"):
        unpack(pack(a)[:-5])
