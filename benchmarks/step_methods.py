"""Shapes and methods of `train_step.py`: each method turns a model of bf16 weights into what it trains."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import nn

from fura_rl.adapter import FuraConfig
from fura_rl.adapter.basis import closest_block_size

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES = {
    "qwen3-1.7b": dict(
        hidden_size=2048, intermediate_size=6144, num_attention_heads=16, num_key_value_heads=8, head_dim=128
    ),
    "qwen2.5-7b": dict(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, head_dim=128
    ),
}
TINY = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)


class PublishedFura(nn.Module):
    """`y = (L diag(s)) blockdiag(R) x`, with `L` (out, in) of orthonormal columns by blocks stored in place of `W`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        b = min(closest_block_size(linear.in_features), linear.out_features)
        blocks = weight.float().reshape(linear.out_features, -1, b).transpose(0, 1)  # (n, out, b)
        left, sigma, right = torch.linalg.svd(blocks, full_matrices=False)
        self.register_buffer("left", left.transpose(0, 1).reshape(weight.shape).to(weight.dtype))
        self.s = nn.Parameter(sigma.flatten().to(weight.dtype))
        self.core = nn.Parameter(right.to(weight.dtype).contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, b, _ = self.core.shape
        x_nTb = x.reshape(-1, n, b).transpose(0, 1)
        z = torch.bmm(x_nTb, self.core.mT).transpose(0, 1).reshape(x.shape)
        return nn.functional.linear(z, self.left * self.s)


def published(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.layers:
        for room in (layer.self_attn, layer.mlp):
            for name, child in list(room.named_children()):
                if name in PROJECTIONS:
                    setattr(room, name, PublishedFura(child))
    return model


def with_adapter(config: peft.PeftConfig) -> Callable[[nn.Module], nn.Module]:
    config.target_modules = PROJECTIONS
    return lambda model: peft.get_peft_model(model, config)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "floor": frozen,
    "full": lambda model: model.requires_grad_(True),
    "lora_r32": with_adapter(peft.LoraConfig(r=32, lora_alpha=64)),
    "lora_r64": with_adapter(peft.LoraConfig(r=64, lora_alpha=128)),
    "dora_r32": with_adapter(peft.LoraConfig(r=32, lora_alpha=64, use_dora=True)),
    "oft": with_adapter(peft.OFTConfig()),
    "published": published,
    "fura": with_adapter(FuraConfig()),
    "fura_aligned": with_adapter(FuraConfig(block_size="aligned")),
    "fura_inputs": with_adapter(FuraConfig()),
    "fura_torch": with_adapter(FuraConfig()),
}
OWN_WEIGHTS = {"full", "published"}  # these do without the shared frozen weights


def checkpoint_bytes(model: nn.Module) -> int:
    """What has to be written so that a run can be used: an adapter as PEFT saves it, or all that is trained."""
    if isinstance(model, peft.PeftModel):
        return sum(tensor.nbytes for tensor in peft.get_peft_model_state_dict(model).values())
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)
