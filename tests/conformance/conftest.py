"""Keeps, of PEFT's suite, the cases that run on `FuraConfig`, and marks what does not apply to FuRA."""

from pathlib import Path

import pytest
import torch

from fura_rl.adapter import FuraConfig

PICKLE = "FuRA refuses pickled weights: adapters are saved and loaded as safetensors only"
FLOAT32 = "asserts that autocast_adapter_dtype=False rounds the adapter to the base's dtype; FuRA stays in float32"


def not_applicable(test_class: str, name: str, parameters: dict) -> str | None:
    """Why a case of PEFT's suite does not apply to FuRA, or None."""
    if name in ("test_save_pretrained_pickle", "test_save_pretrained_selected_adapters_pickle"):
        return PICKLE
    if name == "test_add_adapter_no_autocast_adapter_dtype":
        return FLOAT32
    if name.endswith("mixed_adapter_batches") and test_class in ("TestDecoderModels", "TestEncoderDecoderModels"):
        return "admits LoRA only; TestMixedBatches runs these tests on FuRA"
    if name == "test_quantized_output_similar_to_non_quantized" and parameters["quant"].name == "bnb_4bit":
        return "gives both models one random core; FuRA's is relative to a basis, which 4 bits of random weights turn"
    if name == "test_adapter_dtype_autocast":
        return FLOAT32 if not parameters["autocast_adapter_dtype"] and parameters["dtype"] != torch.float32 else None
    return None


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("single_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", f"{marker}: PEFT's own marker")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    kept, dropped = [], []
    for item in items:
        if here not in item.path.parents:
            kept.append(item)
            continue
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        values = [part for value in parameters.values() for part in (value if isinstance(value, tuple) else (value,))]
        if not any(value is FuraConfig or isinstance(value, FuraConfig) for value in values):
            dropped.append(item)
            continue
        kept.append(item)
        test_class = item.getparent(pytest.Class)
        reason = not_applicable(test_class.name if test_class else "", item.name.split("[")[0], parameters)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)
