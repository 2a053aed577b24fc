"""Quantised bases: FuRA reads a dequantised weight once, for the basis, and leaves the stored one alone."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from tiny_nets import fura_layers, perturb, tiny_llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from fura_rl.adapter import AdapterError, FuraConfig, FuraLayer, save_adapter
from fura_rl.adapter import layer as layer_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


def load(checkpoint, config=None):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=copy.deepcopy(config), device_map={"": "cpu"}, dtype=torch.float32
    ).eval()


def bnb_4bit(checkpoint):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = load(checkpoint, config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # some CPUs repack weights, lossily, at the first inference
    return model


def bnb_8bit(checkpoint):
    pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
    return load(checkpoint, BitsAndBytesConfig(load_in_8bit=True))


def torchao(checkpoint):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return load(checkpoint, TorchAoConfig(quantization.Int8WeightOnlyConfig()))


def hqq(checkpoint):
    """transformers quantises with HQQ on GPUs only; HQQ itself does on a CPU too."""
    quantize = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed")
    model = load(checkpoint)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
                    setattr(parent, name, quantize.HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return model


@pytest.fixture(params=[bnb_4bit, bnb_8bit, torchao, hqq], ids=lambda make: make.__name__)
def quantised(request, checkpoint):
    """A function that loads the checkpoint quantised, each time anew."""
    return lambda: request.param(checkpoint)


def logits(model):
    return model(tokens()).logits.detach().float()


def test_starts_as_the_quantised_base_trains_merges_and_unmerges(quantised, tmp_path):
    base = quantised()
    expected = logits(base)
    model = get_peft_model(base, FuraConfig(target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    assert all(layer.quantization_backend is not None for layer in fura_layers(model).values())
    assert "quantization_backend=" in repr(model)
    assert torch.equal(logits(model), expected)

    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    perturb(model)
    moved = logits(model)
    assert (moved - expected).norm() > 0.05 * expected.norm()

    model.merge_adapter(safe_merge=True)
    error = (logits(model) - moved).norm() / moved.norm()
    assert 0 < error < 0.3  # the merged weight is quantised again
    model.unmerge_adapter()
    assert torch.equal(logits(model), moved)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(logits(model), moved)


def test_basis_is_that_of_the_dequantised_weight(quantised):
    model = get_peft_model(quantised(), FuraConfig(target_modules=["q_proj"]))
    for layer in fura_layers(model).values():
        weight = layer.quantization_backend.get_base_weight(layer.get_base_layer()).float()
        assert torch.equal(layer.merged_weight(), weight)
        blocks = layer.fura_blocks["default"]
        sigma = torch.stack([torch.linalg.svdvals(part) for part in weight.split(blocks.block_size, dim=1)])
        torch.testing.assert_close(blocks.sigma, sigma, rtol=1e-4, atol=1e-5)
        assert blocks.core.dtype == blocks.basis.dtype == torch.float32


def test_adapter_of_a_quantised_base_saves_loads_and_serves_an_unquantised_one(quantised, checkpoint, tmp_path):
    model = get_peft_model(quantised(), FuraConfig(target_modules=["q_proj", "down_proj"])).eval()
    perturb(model)
    folder = save_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(quantised(), folder, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    full = PeftModel.from_pretrained(load(checkpoint), folder).eval()
    with full.disable_adapter(), model.disable_adapter():
        quantisation_error = (logits(full) - logits(model)).norm() / logits(full).norm()
    assert (logits(full) - logits(model)).norm() / logits(full).norm() < 1.5 * quantisation_error


def test_a_weight_that_bitsandbytes_has_repacked_is_refused(checkpoint):
    model = bnb_4bit(checkpoint)
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight.quant_state.packing_format_for_cpu = True  # what its first inference sets on some CPUs
    with pytest.raises(AdapterError, match="repacked this 4-bit weight"):
        get_peft_model(model, FuraConfig(target_modules=["q_proj"]))


class ForwardOnlyLinear(nn.Linear):
    """Stands for a layer of GPTQ or AWQ: it multiplies, but nobody can read its weight."""


@pytest.fixture
def forward_only(monkeypatch):
    def resolve(layer, **kwargs):
        return ForwardOnlyQuantizationBackend("gptq") if isinstance(layer, ForwardOnlyLinear) else None

    monkeypatch.setattr(layer_module, "resolve_quantization_backend", resolve)
    return ForwardOnlyLinear(12, 20)


def test_a_base_that_cannot_be_read_is_refused_unless_no_weight_is_needed(forward_only):
    with pytest.raises(AdapterError, match="a gptq layer cannot be dequantised") as error:
        FuraLayer(forward_only, "default", FuraConfig(), name="q_proj")
    assert 'basis="identity"' in str(error.value)
    for basis in ("identity", "random"):
        layer = FuraLayer(forward_only, "default", FuraConfig(basis=basis))
        x = torch.randn(3, 12)
        assert torch.equal(layer(x), forward_only(x))
        layer(x).sum().backward()
        assert layer.fura_blocks["default"].core.grad.any()
        with pytest.raises(AdapterError, match="cannot be merged"):
            layer.merge()
