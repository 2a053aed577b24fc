"""The names of vLLM that adapters per request rest on; `multi_names` says what for."""

LORA_LAYERS = (
    "ColumnParallelLinearWithLoRA",
    "MergedColumnParallelLinearWithLoRA",
    "QKVParallelLinearWithLoRA",
    "MergedQKVParallelLinearWithLoRA",
    "RowParallelLinearWithLoRA",
)
_LORA_METHODS = (
    "apply",
    "can_replace_layer",
    "create_lora_weights",
    "reset_lora",
    "set_lora",
    "set_mapping",
    "_apply_lora_to_output",
)
PER_REQUEST = (
    *(f"vllm.lora.layers.{layer}.{method}" for layer in LORA_LAYERS for method in _LORA_METHODS),
    "vllm.config.lora.LoRAConfig.compute_hash",
    "vllm.config.vllm.get_current_vllm_config_or_none",
    "vllm.lora.layers.LoRAMapping",
    "vllm.lora.lora_model.LoRAModel",
    "vllm.lora.lora_weights.LoRALayerWeights",
    "vllm.lora.model_manager.get_supported_lora_modules",
    "vllm.lora.punica_wrapper.punica_base.PunicaWrapperBase.update_metadata",
    "vllm.lora.request.LoRARequest",
    "vllm.lora.utils._all_lora_classes",
    "vllm.lora.utils.get_adapter_absolute_path",
    "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter",
    "vllm.v1.core.kv_cache_utils._gen_lora_extra_hash_keys",
    "vllm.v1.engine.llm_engine.LLMEngine.add_lora",
)
