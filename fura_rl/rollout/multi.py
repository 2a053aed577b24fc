"""Adapters per request: many FuRA adapters in one engine, each request with its own, beside ordinary LoRA adapters.

`register` is the entry point `fura_rl` of `vllm.general_plugins`: vLLM calls it in each of its processes, so that with
this package installed `vllm serve BASE --enable-lora --lora-modules NAME=PATH` takes FuRA adapters. For an engine
without LoRA it changes nothing. In this process:

    llm = LLM("Qwen/Qwen2.5-Coder-0.5B", enable_lora=True, max_loras=4)
    gsm8k = load_adapter(llm, "gsm8k", "runs/gsm8k")
    llm.generate(prompts, lora_request=[gsm8k, None])
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME

from fura_rl.errors import FuraError
from fura_rl.rollout import multi_names, vllm_names
from fura_rl.rollout.allowed import AllowedAdapters
from fura_rl.rollout.multi_layers import PerRequestLayer
from fura_rl.rollout.multi_settings import MultiSettings
from fura_rl.rollout.payload import Adapter, read_folder

logger = logging.getLogger("vllm.fura")  # below vLLM's own logger, whose format and level the server's user chose

_registered = False
_numbers = itertools.count(1_000_000)  # apart from those that users choose


def register() -> None:
    """Makes vLLM's LoRA in this process take FuRA adapters too. Safe to call again."""
    global _registered
    if _registered:
        return
    _registered = True
    missing = vllm_names.missing_for_per_request()
    if missing:
        logger.warning("FuRA adapters per request are off: this vLLM has no %s.", missing[0])
        return
    multi_names.join_lora(PerRequestLayer, _load, _graph_key, lambda: MultiSettings.from_environment().with_lora)


def load_adapter(llm: Any, name: str, path: str | Path) -> Any:
    """Loads an adapter, of FuRA or LoRA, into a `vllm.LLM` made with `enable_lora=True`.

    Returns:
        The `LoRARequest` to generate with. Further loads of changed files are adapters of their own.

    Raises:
        FuraError: the adapter does not fit. The engine and its other adapters are as they were.
    """
    from vllm.lora.request import LoRARequest

    request = LoRARequest(name, next(_numbers), str(Path(path).resolve()))
    try:
        vllm_names.attribute(llm, "llm_engine.add_lora")(request)
    except FuraError:
        raise
    except Exception as error:  # vLLM's own, or a FuraError that came from another process as a sentence
        raise FuraError(f"{path} was not loaded: {error}") from error
    return request


def _graph_key() -> str:
    settings = MultiSettings.from_environment()
    decides = settings.with_fura, settings.with_lora, sorted(settings.block_sizes.items())
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:16]


def _load(manager: Any, request: Any, load_lora: Callable[[Any, Any], Any]) -> Any:
    """In place of a worker's `_load_adapter`: a `LoRAModel`, or an exception before anything has changed."""
    layers = multi_names.lora_layers(manager)
    settings = next((layer.fura_settings for layer, _ in _ours(layers)), MultiSettings.from_environment())
    if settings.folders is None:
        folder = Path(multi_names.adapter_folder(request.lora_path))
    else:
        folder = AllowedAdapters({}, [Path(root) for root in settings.folders]).find(request.lora_path)
    fura = is_fura(folder)
    if fura:
        if request.load_inplace:  # vLLM would do so again at each step
            raise FuraError(
                f"{request.lora_name} cannot be loaded in place, where requests may be running: unload the old adapter "
                "first, or load the new one under another name."
            )
        model = multi_names.lora_model(request.lora_int_id, read_deltas(folder, layers))
    elif settings.with_lora:
        if settings.folders is not None:  # vLLM would look up a relative path elsewhere
            request = multi_names.with_folder(request, folder)
        model = load_lora(manager, request)
    else:
        raise FuraError(f"{folder} is no FuRA adapter: start the server with --enable-lora to serve LoRA beside FuRA.")
    for rows in {id(layer.punica_wrapper): layer.punica_wrapper.fura_rows for layer, _ in _ours(layers)}.values():
        rows.add(request.lora_int_id, fura=fura)
    return model


def read_deltas(folder: Path, layers: dict[str, tuple[Any, int]]) -> dict[str, torch.Tensor]:
    """Checkpoint layer -> `D` as the engine's layer keeps it, in its dtype, in CPU memory.

    Raises:
        FuraError: the adapter cannot be read, does not fit, or is of a kind that only a merge can serve.
    """
    adapter = read_folder(folder)
    _check_kind(folder, adapter)
    device = next((layer.device for layer, _ in _ours(layers)), torch.device("cpu"))
    deltas = {}
    with torch.inference_mode():
        for name, multiplier in adapter.multipliers(device).items():
            layer, number = layers.get(name, (None, 0))
            if not isinstance(layer, PerRequestLayer):
                raise FuraError(
                    f"The adapter was made for another model: this engine has no layer {name} that takes FuRA adapters."
                )
            delta = layer.own_blocks(name, number, multiplier.delta, adapter.modules[name].get("base_sample"))
            deltas[name] = delta.to("cpu", vllm_names.attribute(layer.base_layer, "params_dtype")).contiguous()
    return deltas


def _check_kind(folder: Path, adapter: Adapter) -> None:
    if not adapter.modules:
        raise FuraError("The adapter holds no layers.")
    if adapter.family["side"] != "input":
        raise FuraError(f"{folder} multiplies the layers' outputs: merge it (fura-rl serve without --multi).")
    for name, tensors in adapter.modules.items():
        if "bias" in tensors:
            raise FuraError(f"{folder} trains a bias of {name}: merge it (fura-rl serve without --multi).")


def is_fura(folder: Path) -> bool:
    """Whether the adapter in `folder` calls itself one of FuRA."""
    try:
        return json.loads((folder / CONFIG_NAME).read_text()).get("peft_type") == "FURA"
    except (OSError, ValueError):  # vLLM says what is wrong with it
        return False


def _ours(layers: dict[str, tuple[Any, int]]) -> list[tuple[PerRequestLayer, int]]:
    return [(layer, number) for layer, number in layers.values() if isinstance(layer, PerRequestLayer)]
