"""Saved adapters: three forms, and everything that must be refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_nets import adapted_llama, fura_layers, perturb, tiny_llama, tokens
from typer import Typer
from typer.testing import CliRunner

from fura_rl.adapter import AdapterError, FuraConfig, load_deltas, save_adapter
from fura_rl.adapter.inspect import info, info_command

WEIGHTS = "adapter_model.safetensors"
OPTIONS = {
    "default": {},
    "output": {"side": "output"},
    "frozen": {"singular_values": "frozen"},
    "merged-output": {"singular_values": "merged", "side": "output"},
    "identity": {"basis": "identity"},
}
LOW_CPU = [False, True]


def logits(model):
    return model(tokens()).logits.detach()


def load(folder, base=None, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama() if base is None else base, folder, **kwargs).eval()


def trained_model(**options) -> PeftModel:
    model = get_peft_model(
        tiny_llama(attention_bias=True), FuraConfig(target_modules="all-linear", train_bias=True, **options)
    )
    perturb(model)
    return model.eval()


def biased_llama():
    return tiny_llama(attention_bias=True)


@pytest.mark.parametrize("low_cpu_mem_usage", LOW_CPU)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", ["full", "delta", "compact"])
def test_each_form_computes_the_same(tmp_path, form, options, low_cpu_mem_usage):
    model = trained_model(**options)
    folder = save_adapter(model, tmp_path, form)
    loaded = load(folder, biased_llama(), low_cpu_mem_usage=low_cpu_mem_usage)
    assert FuraConfig.from_pretrained(folder).saved_form == form
    if form == "full":
        state, expected = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    # not to the last bit, even so: by where a tensor lies in memory some CPUs sum it in another order
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-4)


def test_smaller_forms_are_smaller(tmp_path):
    sizes = {}
    for form in ("full", "delta", "compact"):
        folder = save_adapter(adapted_llama(), tmp_path / form, form)
        sizes[form] = (folder / WEIGHTS).stat().st_size
        assert info(folder).file_bytes == sizes[form]
    assert sizes["delta"] < 0.7 * sizes["full"] and sizes["compact"] < 0.8 * sizes["full"]


def test_an_adapter_loaded_from_the_compact_form_is_saved_in_full(tmp_path):
    model = adapted_llama()
    load(save_adapter(model, tmp_path / "a", "compact")).save_pretrained(tmp_path / "b")
    assert info(tmp_path / "b").config.saved_form == "full"
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_compact_form_trains_on_as_the_full_form_does(tmp_path):
    model = adapted_llama()
    losses = {}
    for form in ("full", "compact"):
        loaded = load(save_adapter(model, tmp_path / form, form), is_trainable=True)
        optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = loaded(tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
        losses[form] = float(loss)
    assert losses["compact"] == pytest.approx(losses["full"], abs=1e-5)


def test_delta_form_is_not_trained_further(tmp_path):
    folder = save_adapter(adapted_llama(), tmp_path, "delta")
    with pytest.raises(AdapterError, match="not trained further"):
        load(folder, is_trainable=True)
    again = save_adapter(load(folder), tmp_path / "again", "delta")  # but saved again, it is
    torch.testing.assert_close(logits(load(again)), logits(load(folder)))


def test_load_deltas_needs_no_model(tmp_path):
    model = adapted_llama()
    for form in ("full", "delta"):
        deltas = load_deltas(save_adapter(model, tmp_path / form, form))
        assert len(deltas) == 14
        for name, layer in fura_layers(model).items():
            torch.testing.assert_close(deltas[name.removeprefix("base_model.model.")], layer.delta("default").detach())
    with pytest.raises(AdapterError, match="without its basis"):
        load_deltas(save_adapter(model, tmp_path / "compact", "compact"))


def test_named_adapters_go_into_subfolders(tmp_path):
    model = adapted_llama()
    model.add_adapter("other", FuraConfig(target_modules=["q_proj"]))
    folder = save_adapter(model, tmp_path, "compact", "other")
    assert folder == tmp_path / "other" and (folder / WEIGHTS).exists() and not (tmp_path / WEIGHTS).exists()
    load(folder)


def test_modules_to_save_survive_each_form(tmp_path):
    for form in ("full", "delta", "compact"):
        model = adapted_llama(target_modules=["q_proj"], modules_to_save=["lm_head"])
        torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
        loaded = load(save_adapter(model, tmp_path / form, form))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_compact_form_of_a_random_basis_is_refused_before_writing(tmp_path):
    with pytest.raises(AdapterError, match="random basis"):
        save_adapter(adapted_llama(basis="random"), tmp_path / "x", "compact")
    assert not (tmp_path / "x").exists()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    return save_adapter(adapted_llama(), tmp_path / "adapter")


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def some(tensors, suffix):
    return next(key for key in tensors if key.endswith(suffix))


@pytest.mark.parametrize("low_cpu_mem_usage", LOW_CPU)
@pytest.mark.parametrize("form", ["full", "delta", "compact"])
def test_wrong_base_is_refused(tmp_path, form, low_cpu_mem_usage):
    folder = save_adapter(adapted_llama(), tmp_path, form)
    reason = "not the one it was trained on" if form == "compact" else "made for another base model"
    with pytest.raises(AdapterError, match=reason):
        load(folder, tiny_llama(seed=7), low_cpu_mem_usage=low_cpu_mem_usage)


def test_same_base_in_another_precision_is_welcome_but_to_the_compact_form(tmp_path):
    full, compact = (save_adapter(adapted_llama(), tmp_path / form, form) for form in ("full", "compact"))
    load(full, tiny_llama(torch.bfloat16))
    with pytest.raises(AdapterError, match="not the one it was trained on"):
        load(compact, tiny_llama(torch.bfloat16))


def test_compact_form_of_a_bf16_base_loads_on_the_same_values_in_float32(tmp_path):
    folder = save_adapter(adapted_llama(torch.bfloat16), tmp_path, "compact")
    load(folder, tiny_llama(torch.bfloat16).float())


def test_other_basis_is_refused(tmp_path):
    folder = save_adapter(adapted_llama(), tmp_path, "compact")

    def turn(tensors):
        tensors[some(tensors, "probe")].mul_(-1)

    rewrite(folder, turn)
    with pytest.raises(AdapterError, match="computes another one"):
        load(folder)


def test_wrong_shape_is_refused(saved):
    with pytest.raises(AdapterError, match=r"has shape \(4, 8, 8\) in the adapter"):
        load(saved, tiny_llama(hidden_size=64))


def test_other_block_size_is_refused(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "block_size": "full"}))
    with pytest.raises(AdapterError, match="made for another base model or block size"):
        load(saved)


@pytest.mark.parametrize("low_cpu_mem_usage", LOW_CPU)
def test_missing_tensor_is_refused(saved, low_cpu_mem_usage):
    rewrite(saved, lambda tensors: tensors.pop(some(tensors, "q_proj.fura_blocks.scale")))
    with pytest.raises(AdapterError, match=r"lacks scale of .*q_proj"):
        load(saved, low_cpu_mem_usage=low_cpu_mem_usage)


def test_missing_layer_is_refused(saved):
    rewrite(saved, lambda tensors: [tensors.pop(k) for k in list(tensors) if "layers.1.mlp.up_proj" in k])
    with pytest.raises(AdapterError, match=r"lacks .* of .*layers\.1\.mlp\.up_proj"):
        load(saved)


def test_surplus_layer_and_tensor_are_refused(saved, tmp_path):
    shorter = tiny_llama()
    del shorter.model.layers[1]
    with pytest.raises(AdapterError, match="7 modules that this model does not adapt"):
        load(saved, shorter)
    rewrite(saved, lambda tensors: tensors.update({some(tensors, "core").replace("core", "gate"): torch.zeros(1)}))
    with pytest.raises(AdapterError, match="unknown tensor, gate"):
        load(saved)


@pytest.mark.parametrize(
    ("tensor", "damage", "reason"),
    [
        ("core", lambda t: t.view(-1)[5].fill_(torch.nan), "NaN or infinite"),
        ("scale", lambda t: t.view(-1)[5].fill_(torch.inf), "NaN or infinite"),
        ("sigma", lambda t: t.view(-1)[5].fill_(-1.0), "not positive"),
        ("basis", lambda t: t[0, 0].zero_(), "not orthogonal"),
    ],
)
def test_corrupted_values_are_refused(saved, tensor, damage, reason):
    rewrite(saved, lambda tensors: damage(tensors[some(tensors, tensor)]))
    with pytest.raises(AdapterError, match=reason):
        load(saved)
    with pytest.raises(AdapterError, match=reason):
        info(saved)


@pytest.mark.parametrize("keep", [0.5, 0.0, 8])
def test_truncated_file_is_refused(saved, keep):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    for read in (load, info, load_deltas):
        with pytest.raises(AdapterError, match="truncated or no safetensors file"):
            read(saved)


def test_garbage_is_refused(saved):
    (saved / WEIGHTS).write_bytes(b"\xff" * 1000)
    with pytest.raises(AdapterError, match="truncated or no safetensors file"):
        load(saved)


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickle_is_never_opened(saved, tmp_path):
    (saved / WEIGHTS).unlink()
    torch.save({"x": Bomb(tmp_path / "exploded")}, saved / "adapter_model.bin")
    for read in (load, info, load_deltas):
        with pytest.raises(AdapterError, match="a pickle, which can run code"):
            read(saved)
    assert not (tmp_path / "exploded").exists()


def test_pickle_in_a_cached_hub_repository_is_never_opened(saved, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--adapter" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "models--someone--adapter" / "refs").mkdir()
    (cache / "models--someone--adapter" / "refs" / "main").write_text("abc")
    shutil.copy(saved / "adapter_config.json", snapshot)
    torch.save({"x": Bomb(tmp_path / "exploded")}, snapshot / "adapter_model.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="a pickle, which can run code"):
        load("someone/adapter")
    assert not (tmp_path / "exploded").exists()


def test_other_methods_are_told_apart(tmp_path):
    get_peft_model(tiny_llama(), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="LORA adapter, not one of FuRA"):
        info(tmp_path)
    with pytest.raises(AdapterError, match="does not exist"):
        info(tmp_path / "nothing")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="holds no adapter"):
        info(tmp_path)


# -- fura-rl info -----------------------------------------------------------------------------------------------------


def test_info_describes_the_adapter(saved):
    model = adapted_llama()
    found = info(saved)
    assert found.config.block_size == "closest" and found.config.saved_form == "full"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.trained == trained
    layers = {f"base_model.model.{layer.name}": layer for layer in found.layers}
    assert layers.keys() == fura_layers(model).keys()
    for name, layer in fura_layers(model).items():
        update, weight = layer.get_delta_weight("default"), layer.base_layer.weight
        assert layers[name].spectra.relative_norm == pytest.approx(float(update.norm() / weight.norm()), rel=1e-4)
        assert layers[name].block_size == layer.block_size["default"]
        assert 1 <= layers[name].spectra.stable_rank <= layers[name].block_size


def test_info_of_a_file_and_of_smaller_forms(saved, tmp_path):
    assert info(saved / WEIGHTS).trained == info(saved).trained
    delta = info(save_adapter(adapted_llama(), tmp_path / "d", "delta"))
    assert all(layer.spectra is None and layer.delta_norm > 0 for layer in delta.layers)
    compact = info(save_adapter(adapted_llama(), tmp_path / "c", "compact"))
    assert all(layer.spectra is None and layer.delta_norm is None for layer in compact.layers)


def test_info_command_prints_size_configuration_and_layers(saved, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = Typer()
    app.command()(info_command)
    result = CliRunner().invoke(app, [str(saved)])
    assert result.exit_code == 0
    size = (saved / WEIGHTS).stat().st_size / 2**20
    for part in (f"{size:.1f} MiB", "14 layers", "side input", "model.layers.1.self_attn.q_proj", "4 x 8"):
        assert part in result.output
