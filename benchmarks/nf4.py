"""bitsandbytes' NF4 with double quantisation, and the methods that are compared on it."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from fura_rl.adapter import FuraConfig

METHODS = {
    "qfura": FuraConfig(),
    "qfura_aligned": FuraConfig(block_size="aligned"),
    "qlora_r32": peft.LoraConfig(r=32, lora_alpha=64),
    "qlora_r64": peft.LoraConfig(r=64, lora_alpha=128),
    "qdora_r32": peft.LoraConfig(r=32, lora_alpha=64, use_dora=True),
    # Other numbers of trained parameters: on Qwen2.5-0.5B 0.9 and 1.8 of QLoRA r=32's, and 1.0 of QFuRA's.
    "qfura_b64": FuraConfig(block_size=64),
    "qfura_b128": FuraConfig(block_size=128),
    "qlora_r24": peft.LoraConfig(r=24, lora_alpha=48),
}
TIMED = ["qfura", "qfura_aligned", "qlora_r32", "qlora_r64", "qdora_r32"]  # unless rows are asked for
REFERENCE = "qlora_r32"


def nf4(weight: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, Any]:
    """`weight` in NF4 with double quantisation: what is stored, and its state."""
    stored = weight.to(dtype) if dtype else weight.contiguous()
    return bnb.functional.quantize_4bit(stored, quant_type="nf4", compress_statistics=True)


def nf4_error(weight: torch.Tensor) -> float:
    """`|NF4(W) - W| / |W|`."""
    rounded = bnb.functional.dequantize_4bit(*nf4(weight.float()))
    return float((rounded.float() - weight.float()).norm() / weight.float().norm())


def quantise(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with each linear layer but the head in NF4, one layer at a time."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear) or name == "lm_head":
                continue
            bias = linear.bias is not None
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=dtype, device="meta")
            layer.weight = bnb.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            layer.support_avx512bf16_for_cpu = False  # such CPUs would repack the weight at the first inference
            if bias:
                layer.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
            setattr(parent, name, layer)
    model.is_loaded_in_4bit = True  # PEFT looks for it
    return model.to(device)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
