"""Merging into an engine's storage: the kernel against float64, and vLLM's own layers, unpacked as on a GPU."""

import copy
import gc
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from fura_rl import FuraConfig
from fura_rl.rollout import merged_weights
from fura_rl.rollout.in_place import InPlaceMerge

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_the_kernel_in_the_interpreter():
    """Triton's interpreter has to be chosen before Triton is imported."""
    environment = dict(os.environ, TRITON_INTERPRET="1", FURA_KERNELS="triton", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_kernel", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize("block", [(2, 64), (2, 96), (3, 28), (1, 128), (5, 3)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernel_is_the_float32_product_rounded_once(weight_dtype, block):
    from fura_rl.rollout.merge_kernel import merge_into, supports

    device = "cpu" if INTERPRETED else "cuda"
    n, b = block
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, n * b, generator=generator).to(device, weight_dtype)
    delta = 0.1 * torch.randn(n, b, b, generator=generator).to(device) / b**0.5
    exact = weight.double() @ (torch.eye(n * b, device=device).double() + torch.block_diag(*delta.double()))
    fused = torch.full((300, n * b + 8), float("nan"), dtype=torch.float16, device=device)
    out = fused[50:250, : n * b]
    assert supports(weight, b, out)
    merge_into(weight, delta, out)
    # half a spacing of float16, and what the sums in float32 and the two halves of D leave
    error = (out.double() - exact).abs()
    assert (error <= 2.0**-11 * 1.01 * exact.abs() + 2.0**-15).all()
    assert fused[:50].isnan().all() and fused[250:].isnan().all() and fused[:, n * b :].isnan().all()


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or Triton's interpreter")
def test_kernel_copies_where_the_update_is_zero():
    from fura_rl.rollout.merge_kernel import merge_into

    weight = torch.randn(100, 128).to("cpu" if INTERPRETED else "cuda", torch.bfloat16)
    out = torch.empty_like(weight)
    merge_into(weight, torch.zeros(2, 64, 64, device=weight.device), out)
    assert torch.equal(out, weight)


# -- vLLM's layers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vllm_model(own_environment):
    """`vllm_model(folder)`: vLLM's model for a checkpoint, as it is before its CPU build packs the weights."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    mine = not torch.distributed.is_initialized()  # an engine of an earlier test may have left its groups

    def make(folder):
        arguments = EngineArgs(
            str(folder), dtype="float32", max_model_len=64, enforce_eager=True, skip_tokenizer_init=True
        )
        config = arguments.create_engine_config()
        with set_current_vllm_config(config), torch.no_grad():
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
                initialize_model_parallel(1)
            return initialize_model(config)

    yield make
    if mine and torch.distributed.is_initialized():
        destroy_model_parallel()
        destroy_distributed_environment()
    gc.collect()


def policy(config_class, config, tied=False, **changes):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_class(**SHAPE, tie_word_embeddings=tied, **changes))
    return get_peft_model(base, config)


def move(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def loaded(vllm_model, model, folder):
    """vLLM's model with the policy's merged weights, through its own loader."""
    base = copy.deepcopy(model).unload()
    base.save_pretrained(folder)
    engine_model = vllm_model(folder)
    engine_model.load_weights(merged_weights(model))
    return engine_model


def contents(engine_model):
    return {name: tensor.clone() for name, tensor in engine_model.state_dict().items()}


def fura(**options):
    return FuraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


CASES = {
    "llama": (LlamaConfig, fura(), {}),
    "llama with biases": (LlamaConfig, fura(train_bias=True), {"attention_bias": True, "mlp_bias": True}),
    "qwen2": (Qwen2Config, fura(train_bias=True), {}),
    "qwen2, some parts of fused layers, output side": (
        Qwen2Config, fura(target_modules=["q_proj", "up_proj"], side="output"), {},
    ),
    "qwen3": (Qwen3Config, fura(), {}),
    "qwen3, tied": (Qwen3Config, fura(singular_values="merged"), {"tied": True}),
}  # fmt: skip


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_the_loader_would_have_written(vllm_model, tmp_path, case):
    config_class, config, changes = CASES[case]
    model = policy(config_class, config, **changes)
    engine_model = loaded(vllm_model, model, tmp_path)
    merge = InPlaceMerge(model, engine_model)
    assert merge.complete and all(layer.in_rows for layer in merge.layers)
    storage = {name: p.data_ptr() for name, p in engine_model.named_parameters()}
    start = contents(engine_model)
    for _ in range(2):
        move(model)
        merge.write()
        written = contents(engine_model)
        engine_model.load_weights(merged_weights(model))
        expected = contents(engine_model)
        assert all(torch.equal(written[name], expected[name]) for name in expected)
    changed = {name for name in start if not torch.equal(start[name], written[name])}
    fused = (
        ["qkv_proj", "gate_up_proj"] if "some parts" in case else ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    )
    assert {name.split(".")[-2] for name in changed} == set(fused)
    assert {name: p.data_ptr() for name, p in engine_model.named_parameters()} == storage  # CUDA graphs read there


@pytest.mark.vllm
@pytest.mark.slow
def test_an_engine_that_holds_something_else_is_left_to_the_loader(vllm_model, tmp_path):
    model = policy(Qwen3Config, fura())
    engine_model = loaded(vllm_model, model, tmp_path)
    with torch.no_grad():
        down = [layer.mlp.down_proj.weight for layer in engine_model.model.layers]
        swapped = down[0].clone()
        down[0].copy_(down[1])
        down[1].copy_(swapped)
    merge = InPlaceMerge(model, engine_model)
    assert not merge.complete and not any("down_proj" in name for name in merge.names)
    assert len(merge.names) == 6 * SHAPE["num_hidden_layers"]
    rest = dict(merged_weights(model, only_adapted=True, skip=merge.names))
    assert set(rest) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


@pytest.mark.vllm
@pytest.mark.slow
def test_what_else_is_trained_is_known(vllm_model, tmp_path):
    """Other adapters of PEFT's, and further trained modules, go through the loader."""
    model = policy(Qwen2Config, LoraConfig(r=2, target_modules="all-linear"))
    merge = InPlaceMerge(model, loaded(vllm_model, model, tmp_path))
    assert not merge.names and not merge.complete
    merge.write()
    model = policy(Qwen2Config, fura(modules_to_save=["model.norm"]))
    merge = InPlaceMerge(model, loaded(vllm_model, model, tmp_path))
    assert merge.names and not merge.complete
    assert set(dict(merged_weights(model, only_adapted=True, skip=merge.names))) == {"model.norm.weight"}
