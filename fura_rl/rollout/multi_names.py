"""How adapters per request join vLLM's LoRA: the functions over the names that `multi_imports` lists.

Read from vLLM 0.26 and 0.31. A worker's LoRA manager keeps `max_loras` slots. It wraps each linear layer in a class of
`_all_lora_classes`, loads an adapter through `_load_adapter`, hands its tensors for a slot to each wrapped layer
(`set_lora`, or `reset_lora` where it has none), and before each batch says which slot each row has (`update_metadata`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fura_rl.rollout.multi_imports import LORA_LAYERS
from fura_rl.rollout.vllm_names import attribute


def join_lora(
    layer_mixin: type,
    load_adapter: Callable[[Any, Any, Callable], Any],
    graph_key: Callable[[], str],
    with_lora: Callable[[], bool],
) -> None:
    """Puts adapters of another kind beside vLLM's LoRA, in this process. To be called once, before an engine is made.

    Args:
        layer_mixin: Mixed into the layers that vLLM wraps linear layers in. Each has `n_slices` parts (`output_slices`
            are their rows), `base_layer`, `input_size`, `tp_rank`, `tp_size`, `device`, `punica_wrapper`.
        load_adapter: Called as `load_adapter(manager, request, original)` on each worker for every adapter, where
            `original(manager, request)` is what vLLM would have done. Returns a `LoRAModel` or raises.
        graph_key: What changes compiled graphs; part of the key by which vLLM caches them on disk.
        with_lora: Whether embeddings and output heads are to be wrapped, which only LoRA adapts.
    """
    from vllm.config.lora import LoRAConfig
    from vllm.lora import layers, model_manager, utils, worker_manager
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.v1.core import kv_cache_utils

    # vLLM takes the first class that can replace a layer; subclasses of these are left alone
    originals = [getattr(layers, name) for name in LORA_LAYERS]
    added = tuple(type(f"Fura{cls.__name__}", (layer_mixin, cls), {}) for cls in originals)
    utils._all_lora_classes = (*added, *utils._all_lora_classes)

    load: Any = worker_manager.WorkerLoRAManager._load_adapter

    @wraps(load)
    def load_either(manager: Any, request: Any) -> Any:
        return load_adapter(manager, request, load)

    worker_manager.WorkerLoRAManager._load_adapter = load_either  # type: ignore[method-assign, assignment]

    supported = model_manager.get_supported_lora_modules

    @wraps(supported)
    def supported_modules(model: nn.Module) -> list[str]:
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LinearBase)}
        return [name for name in supported(model) if with_lora() or name in linear]

    model_manager.get_supported_lora_modules = supported_modules

    compute_hash: Any = LoRAConfig.compute_hash

    @wraps(compute_hash)
    def hash_both(config: Any) -> str:
        return f"{compute_hash(config)}-{graph_key()}"

    LoRAConfig.compute_hash = hash_both  # type: ignore[method-assign, assignment]

    # Cached prefixes are found by an adapter's name (0.31: and path), which may be given to another after an unload.
    keys = kv_cache_utils._gen_lora_extra_hash_keys

    @wraps(keys)
    def keys_with_id(request: Any) -> list:
        found = keys(request)
        return [*found, ("lora_id", request.lora_request.lora_int_id)] if found else found

    kv_cache_utils._gen_lora_extra_hash_keys = keys_with_id


def adapter_folder(path: str) -> str:
    """The folder of an adapter that a request names: a local one, or that of a model on the Hugging Face Hub."""
    from vllm.lora.utils import get_adapter_absolute_path

    return get_adapter_absolute_path(path)


def with_folder(request: Any, folder: Path) -> Any:
    """A `LoRARequest` for the adapter in `folder`."""
    import msgspec

    return msgspec.structs.replace(request, lora_path=str(folder))


def lora_layers(manager: Any) -> dict[str, tuple[nn.Module, int]]:
    """Checkpoint layer -> the wrapped layer that holds it and its number there, of a worker's LoRA manager.

    Without layers of which one of the checkpoint's makes several parts.
    """
    adapters = attribute(manager, "_adapter_manager")
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, module in attribute(adapters, "modules").items():
        parts = attribute(adapters, "packed_modules").get(name, [name])
        if len(parts) == getattr(module, "n_slices", 1):
            found |= {part: (module, number) for number, part in enumerate(parts)}
    return found


def input_shard(layer: Any) -> tuple[int, int]:
    """Which shard of a wrapped layer's input this rank has, and of how many: (0, 1) for the whole input."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    base = attribute(layer, "base_layer")
    return (attribute(base, "tp_rank"), attribute(base, "tp_size")) if isinstance(base, RowParallelLinear) else (0, 1)


def part_rows(layer: Any, number: int) -> tuple[int, int] | None:
    """Of one part of a wrapped layer: the rows of its whole weight, and the first one that this rank holds.

    None if this rank's rows lie apart: a checkpoint's fused matrix under tensor parallelism.
    """
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear

    base, sizes = attribute(layer, "base_layer"), attribute(layer, "output_slices")
    if isinstance(base, QKVParallelLinear) and len(sizes) == 3:
        heads = attribute(base, "total_num_heads" if number == 0 else "total_num_kv_heads")
        return heads * attribute(base, "head_size"), attribute(layer, "output_ids")[number] * sizes[number]
    if len(sizes) > 1:
        return attribute(base, "output_sizes")[number], attribute(layer, "output_ids")[number] * sizes[number]
    if input_shard(layer)[1] > 1:  # each rank has a part of every row
        return sizes[0], 0
    ranks = attribute(base, "tp_size")
    if ranks > 1 and isinstance(base, (QKVParallelLinear, MergedColumnParallelLinear)):
        return None
    return sizes[0] * ranks, sizes[0] * attribute(base, "tp_rank")


def traced_on_cpu(layer: Any) -> bool:
    """Whether the engine that is being made compiles a wrapped layer that is on a CPU. With LoRA, vLLM does not."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    on_cpu = attribute(layer, "device").type == "cpu"
    return on_cpu and config is not None and attribute(config, "compilation_config.mode") != 0


def dense_weight(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight (rows, K) of this rank. What vLLM's CPU build has packed is computed back, exactly."""
    weight = attribute(module, "weight")
    if weight.numel():
        return weight
    unit = torch.eye(attribute(module, "input_size_per_partition"), dtype=attribute(module, "params_dtype"))
    return attribute(module, "quant_method").apply(module, unit, None).T.contiguous()


def without_adapters(mapping: Any, adapters: set[int]) -> Any:
    """A `LoRAMapping` whose rows of the given adapters have none."""
    index, prompt = (
        tuple(0 if number in adapters else number for number in attribute(mapping, name))
        for name in ("index_mapping", "prompt_mapping")
    )
    return replace(mapping, index_mapping=index, prompt_mapping=prompt)


def row_capacity(punica_wrapper: Any) -> tuple[int, torch.device]:
    """The most rows of a batch, and the device, of what tells LoRA's kernels which slot each row has."""
    ids = attribute(punica_wrapper, "_token_lora_indices")
    return ids.numel(), ids.device


def lora_model(adapter: int, deltas: dict[str, torch.Tensor]) -> Any:
    """What a worker's LoRA manager keeps of an adapter: per checkpoint layer one tensor, which `set_lora` gets back."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    unused = torch.zeros(1, 1)  # the second tensor of a LoRA
    layers = {name: LoRALayerWeights(name, 1, 1, delta, unused, scaling=1) for name, delta in deltas.items()}
    return LoRAModel(adapter, 1, layers)
