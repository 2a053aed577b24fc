"""PEFT's tests of custom models and of several active adapters, on FuRA."""

import peft_suite
import torch

from fura_rl.adapter import FuraConfig

suite = peft_suite.load("test_custom_models")
suite.TEST_CASES[:] = peft_suite.CUSTOM_MODEL_CASES
suite.ALL_PEFT_CONFIG_CLASSES[:] = [FuraConfig]
suite.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = peft_suite.TWO_ADAPTER_CASES


class SameWeights(suite.DeepMLP):
    """PEFT's tests of loading save an adapter of one random model and load it onto another, which FuRA refuses."""

    def __init__(self, *args, **kwargs):
        torch.manual_seed(0)
        super().__init__(*args, **kwargs)


suite.DeepMLP = SameWeights

TestPeftCustomModel = suite.TestPeftCustomModel
TestMultipleActiveAdapters = suite.TestMultipleActiveAdapters
TestRequiresGrad = suite.TestRequiresGrad
