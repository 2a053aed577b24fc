"""Every name of vLLM outside its documented interface that adapters in a running engine rest on.

Those of adapters per request are listed in `multi_imports`; their functions are in `multi_names`.

Documented, and so not here: `LLM.collective_rpc`, the options `--worker-extension-cls` and `--middleware`. When a
new vLLM moves something, `missing_names()` says what, and only these files have to follow.

Read from vLLM 0.31; what the names are for:
- a worker's `model_runner.get_model()` is the engine's model, `model_config` says which checkpoint it was loaded from;
- a model class's `packed_modules_mapping` says which checkpoint matrices one fused layer holds;
- a linear layer has a `quant_method`, and each parameter a `weight_loader(param, full tensor, shard)`, which knows
  fused storage and tensor parallelism. vLLM's CPU build repacks a weight in `process_weights_after_loading` and leaves
  an empty parameter behind;
- the server keeps its engine in `app.state.engine_client`, and that can pause, resume and call the workers;
- adapters per request (`multi`) join vLLM's LoRA: its layers (`can_replace_layer`, `create_lora_weights`, `set_lora`,
  `reset_lora`, `apply`, `set_mapping`, `_apply_lora_to_output`), the worker's `_load_adapter`, the rows' slots in
  `update_metadata`, the keys of cached prefixes and of compiled graphs.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from functools import reduce
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fura_rl.errors import FuraError
from fura_rl.rollout.multi_imports import PER_REQUEST

WORKER_EXTENSION = "fura_rl.rollout.worker.FuraWorker"
MIDDLEWARE = "fura_rl.rollout.middleware.FuraMiddleware"
# Run with `python -m`, newest first: `vllm serve` looks for a distribution named vllm, which the CPU build is not.
SERVER_MODULES = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")

IMPORTED = (
    "vllm.LLM.collective_rpc",
    "vllm.LLM.reset_prefix_cache",
    "vllm.v1.engine.async_llm.AsyncLLM.pause_generation",
    "vllm.v1.engine.async_llm.AsyncLLM.resume_generation",
    "vllm.v1.engine.async_llm.AsyncLLM.collective_rpc",
    "vllm.v1.engine.core_client.DPLBAsyncMPClient._call_utility_async",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.get_model",
    "vllm.model_executor.layers.linear.QKVParallelLinear.weight_loader",
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear.weight_loader",
    "vllm.model_executor.layers.linear.QKVParallelLinear.weight_loader_v2",
    "vllm.model_executor.layers.linear.MergedColumnParallelLinear.weight_loader_v2",
    "vllm.model_executor.layers.linear.ColumnParallelLinear.weight_loader_v2",
    "vllm.model_executor.layers.linear.RowParallelLinear.weight_loader_v2",
    "vllm.model_executor.layers.linear.LinearBase.update_param_tp_status",
    "vllm.model_executor.layers.linear.UnquantizedLinearMethod.create_weights",
    "vllm.model_executor.layers.linear.UnquantizedLinearMethod.process_weights_after_loading",
    "vllm.model_executor.models.qwen3.Qwen3ForCausalLM.packed_modules_mapping",
)


def missing_names() -> list[str]:
    """Which of the names this vLLM does not have: empty if all is well."""
    missing = [name for name in (*IMPORTED, *PER_REQUEST) if not _exists(name)]
    return missing if any(map(_exists, SERVER_MODULES)) else [*missing, SERVER_MODULES[0]]


def missing_for_per_request() -> list[str]:
    """As `missing_names`, of those that adapters per request rest on."""
    return [name for name in PER_REQUEST if not _exists(name)]


def _exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            reduce(getattr, parts[length:], module)
        except AttributeError:
            return False
        return True
    return False


def attribute(obj: Any, dotted: str) -> Any:
    """`obj.a.b` for "a.b".

    Raises:
        FuraError: this vLLM has no such attribute; the message names it.
    """
    try:
        return reduce(getattr, dotted.split("."), obj)
    except AttributeError as error:
        import vllm

        raise FuraError(
            f"vLLM {vllm.__version__} has no {type(obj).__name__}.{dotted}, on which swapping adapters rests: use a "
            "version that this release of fura-rl was tested with."
        ) from error


# -- a worker -------------------------------------------------------------------------------------------------------


def engine_model(worker: Any) -> nn.Module:
    return attribute(worker, "model_runner.get_model")()


def checkpoint_of(worker: Any) -> tuple[str, str | None]:
    """Model name or folder, and revision, that the worker's engine was started with."""
    config = attribute(worker, "model_runner.model_config")
    return attribute(config, "model"), attribute(config, "revision")


def compiles_on_cpu(worker: Any) -> bool:
    """Whether a compiled graph may hold on to the packed CPU weights that a swap replaces."""
    config = attribute(worker, "model_runner.model_config")
    return next(engine_model(worker).parameters()).device.type == "cpu" and not attribute(config, "enforce_eager")


# -- a model's layers -----------------------------------------------------------------------------------------------


def packed_modules(model: nn.Module) -> dict[str, list[str]]:
    """Fused layer -> the checkpoint's layers in it, such as {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}."""
    return attribute(model, "packed_modules_mapping")


def shard_ids(module: nn.Module, count: int) -> list[tuple]:
    """The further arguments that a layer's `weight_loader` takes for each of its `count` parts."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if count == 1:
        return [()]
    shards = ("q", "k", "v") if isinstance(module, QKVParallelLinear) else range(count)
    return [(shard,) for shard in shards]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the layer is linear with a weight that is not quantised."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return isinstance(module, LinearBase) and isinstance(attribute(module, "quant_method"), UnquantizedLinearMethod)


def is_split(module: nn.Module) -> bool:
    """Whether each rank holds only a part of a linear layer."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    return attribute(module, "tp_size") > 1 and not isinstance(module, ReplicatedLinear)


def store_weight(module: nn.Module, parts: list[torch.Tensor]) -> None:
    """Replace a layer's weight by the whole checkpoint-shaped matrices `parts`, one for each part of a fused layer.

    An unpacked weight is written in place, so that CUDA graphs go on reading it, and each rank keeps its own slice. A
    packed one is made anew, as when the engine started.
    """
    weight = attribute(module, "weight")
    if weight.numel():
        _load(module, weight, parts)
        return
    if is_split(module):
        attribute(module, "quant_method").create_weights(
            layer=module,
            input_size_per_partition=attribute(module, "input_size_per_partition"),
            output_partition_sizes=attribute(module, "output_partition_sizes"),
            input_size=attribute(module, "input_size"),
            output_size=attribute(module, "output_size"),
            params_dtype=weight.dtype,
            weight_loader=attribute(module, "weight_loader_v2"),
        )
        attribute(module, "update_param_tp_status")()  # a new parameter holds the process's rank, not the layer's
        _load(module, attribute(module, "weight"), parts)
    else:
        module.weight = nn.Parameter(torch.cat([part.to(weight.dtype) for part in parts]), requires_grad=False)
    attribute(module, "quant_method").process_weights_after_loading(module)


def store_bias(module: nn.Module, parts: list[torch.Tensor]) -> None:
    """As `store_weight`; biases are never packed."""
    _load(module, attribute(module, "bias"), parts)


def _load(module: nn.Module, parameter: torch.Tensor, parts: list[torch.Tensor]) -> None:
    loader = attribute(parameter, "weight_loader")
    for part, shard in zip(parts, shard_ids(module, len(parts)), strict=True):
        loader(parameter, part, *shard)


def version() -> str:
    import vllm

    return vllm.__version__


def model_of(llm: Any) -> nn.Module:
    """The model of a `vllm.LLM` whose engine is in this process; one rank's slice of it with tensor parallelism."""
    return attribute(llm, "llm_engine.model_executor.driver_worker.model_runner.get_model")()


def is_asleep(llm: Any, tag: str) -> bool:
    """Whether "weights" or "kv_cache" of an engine in this process are asleep."""
    return tag in attribute(llm, "llm_engine.model_executor.sleeping_tags")


def wake_up(llm: Any, tags: list[str]) -> None:
    """Wakes those that are asleep: vLLM warns of others, each time."""
    if tags := [tag for tag in tags if is_asleep(llm, tag)]:
        type(llm).wake_up(llm, tags=tags)


# -- a server -------------------------------------------------------------------------------------------------------


def server_module() -> str:
    """What `python -m` runs to start an OpenAI-compatible server, found without importing it, which takes seconds.

    Raises:
        FuraError: vLLM is not installed, or has none of the modules.
    """
    for name in SERVER_MODULES:
        try:
            if find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # a package above it does not exist
            continue
    raise FuraError(f"{SERVER_MODULES[-1]} is not installed: install fura-rl[vllm].")


def engine_of_app(app: Any) -> Any:
    """The `AsyncLLM` behind a vLLM server's FastAPI application."""
    return attribute(app, "state.engine_client")


async def pause(engine: Any) -> None:
    """`AsyncLLM.pause_generation` in mode "wait", with caches cleared, but without the 20 ms that it sleeps at the end.

    They are for callers who want the last outputs before it returns; the gate has let every request finish.
    """
    pause_scheduler = getattr(engine.engine_core, "pause_scheduler_async", None)
    if pause_scheduler is None or not hasattr(engine, "renderer"):  # an older vLLM
        await engine.pause_generation(mode="wait", clear_cache=True)
    else:
        await attribute(engine, "renderer.clear_mm_cache_async")()
        await pause_scheduler(mode="wait", clear_cache=True)


async def ask_workers(engine: Any, method: str, *args: Any) -> list[Any]:
    """`AsyncLLM.collective_rpc`, but with the replies of all data parallel engines: vLLM returns the first one's."""
    client = engine.engine_core
    engines = getattr(client, "core_engines", ())
    if len(engines) < 2:
        return await engine.collective_rpc(method, args=args)
    ask = attribute(client, "_call_utility_async")
    asked = (ask("collective_rpc", method, None, args, None, engine=one) for one in engines)
    return [reply for replies in await asyncio.gather(*asked) for reply in replies]


def logprobs_mode(engine: Any) -> str:
    """Which log-probs an `AsyncLLM` returns, such as "processed_logprobs"."""
    return attribute(engine, "vllm_config.model_config.logprobs_mode")


def api_keys_of_app(app: Any) -> list[str]:
    """The keys that a vLLM server asks for; empty if it asks for none."""
    keys = attribute(app, "state.args.api_key") or [os.environ.get("VLLM_API_KEY", "")]
    return [key for key in keys if key]


def has_extension(llm: Any) -> bool:
    """Whether a `vllm.LLM` was made with `worker_extension_cls=WORKER_EXTENSION`."""
    config = attribute(llm, "llm_engine.vllm_config.parallel_config")
    return attribute(config, "worker_extension_cls") == WORKER_EXTENSION


def runs_in_process(llm: Any) -> bool:
    """Whether a `vllm.LLM`'s engine shares this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    return hasattr(attribute(llm, "llm_engine.engine_core"), "engine_core")
