"""Training methods by name: FuRA, and PEFT's own implementations of what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, OFTConfig, PeftConfig, RandLoraConfig

from fura_rl.adapter import FuraConfig
from fura_rl.errors import FuraError
from fura_rl.trainer.arguments import AdapterArguments


def _fura(arguments: AdapterArguments, common: dict[str, Any], **changes: Any) -> FuraConfig:
    block_size: Any = arguments.block_size
    options = {
        "block_size": int(block_size) if block_size.isdigit() else block_size,
        "side": arguments.side,
        "singular_values": arguments.singular_values,
        "basis": arguments.basis,
        "train_bias": arguments.train_bias,
    }
    return FuraConfig(**common, **{**options, **changes})


def _lora(arguments: AdapterArguments, common: dict[str, Any], **changes: Any) -> LoraConfig:
    return LoraConfig(r=arguments.lora_r, lora_alpha=arguments.lora_alpha, **common, **changes)


METHODS: dict[str, Callable[[AdapterArguments, dict[str, Any]], PeftConfig | None]] = {
    "fura": _fura,
    "svd": lambda arguments, common: _fura(arguments, common, block_size="full"),
    "lora": _lora,
    "dora": lambda arguments, common: _lora(arguments, common, use_dora=True),
    "pissa": lambda arguments, common: _lora(arguments, common, init_lora_weights="pissa"),
    "oft": lambda arguments, common: OFTConfig(oft_block_size=arguments.oft_block_size, **common),
    "randlora": lambda arguments, common: RandLoraConfig(
        r=arguments.lora_r, randlora_alpha=arguments.lora_alpha, **common
    ),
    "full": lambda arguments, common: None,
}


def adapter_config(arguments: AdapterArguments) -> PeftConfig | None:
    """The adapter's configuration from flat options; None trains every weight.

    Raises:
        FuraError: There is no such method.
    """
    if arguments.method not in METHODS:
        raise FuraError(f"Unknown method {arguments.method!r}: use one of {', '.join(METHODS)}.")
    modules: Any = arguments.target_modules
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": "all-linear" if modules == ["all-linear"] else modules,
    }
    if arguments.exclude_modules is not None:
        common["exclude_modules"] = arguments.exclude_modules  # RandLoRA has no such option
    return METHODS[arguments.method](arguments, common)
