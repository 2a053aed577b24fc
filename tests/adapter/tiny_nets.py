"""Small models that several tests of the adapter use."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fura_rl.adapter import FuraConfig, FuraLayer


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama, of 2 layers unless told otherwise, with logits of order 1."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
    sizes |= dict(num_hidden_layers=2, max_position_embeddings=64)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 12, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def perturb(model: nn.Module, size: float = 0.05, seed: int = 2) -> None:
    """Moves all trained FuRA tensors away from zero, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fura_" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def adapted_llama(
    dtype: torch.dtype = torch.float32, moved: bool = True, layers: int = 2, hidden_act: str = "silu", **options
) -> PeftModel:
    base = tiny_llama(dtype, num_hidden_layers=layers, hidden_act=hidden_act)
    model = get_peft_model(base, FuraConfig(**{"target_modules": "all-linear", **options}))
    if moved:
        perturb(model)
    return model.eval()


def loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """ "loss", and the gradient of each parameter that has one, by its name."""
    batch = tokens().to(next(model.parameters()).device)
    model.zero_grad()
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def fura_layers(model: nn.Module) -> dict[str, FuraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FuraLayer)}


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "fura_" not in name}
