"""PEFT's tests of quantised bases, on FuRA, for those quantisation libraries that are installed."""

import peft_suite
import pytest

from fura_rl.adapter import FuraConfig

suite = peft_suite.load("test_quantization")
suite.TEST_CASES[:] = [
    (FuraConfig, {"target_modules": ["q_proj", "v_proj"]}),
    (FuraConfig, {"target_modules": ["q_proj", "v_proj"], "side": "output", "singular_values": "merged"}),
]
if not suite.QUANTIZATION_BACKENDS:
    pytest.skip("neither bitsandbytes nor torchao is installed", allow_module_level=True)

(MODEL,) = peft_suite.local("OPT-64")
# GPTQ's checkpoint cannot be made here, and FuRA refuses it: its weight cannot be read (tests/adapter)
suite.QUANTIZATION_BACKENDS[:] = [loader for loader in suite.QUANTIZATION_BACKENDS if loader.name != "gptq_4bit"]


def without_repacking(load_model):
    """Some CPUs make bitsandbytes repack 4-bit weights at the first inference, after which none can be merged."""

    def load():
        model = load_model()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return load


for loader in suite.QUANTIZATION_BACKENDS:
    loader.model_id = MODEL
    loader.expected_layer_count = 6  # q_proj and v_proj of 3 layers
    loader.load_model = without_repacking(loader.load_model)

TestQuantization = suite.TestQuantization
