"""PEFT's tests of torch.compile, on FuRA."""

import os

import datasets
import peft_suite
import pytest
import tiny_models
from peft import TaskType

from fura_rl.adapter import FuraConfig

pytestmark = pytest.mark.slow

os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"  # else PEFT's module skips itself
suite = peft_suite.load("test_torch_compile")

# Through the whole of torch.compile but the generation of machine code, which takes minutes on a CPU; once with it.
EAGER = {"backend": "aot_eager", "torch_compile_backend": "aot_eager"}
suite.SETTINGS.clear()
suite.SETTINGS["fura"] = (FuraConfig(task_type=TaskType.CAUSAL_LM), EAGER)
suite.SETTINGS["fura-output"] = (FuraConfig(task_type=TaskType.CAUSAL_LM, side="output", train_bias=True), EAGER)
suite.SETTINGS["fura-inductor"] = (FuraConfig(task_type=TaskType.CAUSAL_LM), {})

TestTorchCompileCausalLM = suite.TestTorchCompileCausalLM
(TestTorchCompileCausalLM.model_id,) = peft_suite.local("OPT")
tiny_models.add_tokenizer(TestTorchCompileCausalLM.model_id)


def some_quotes() -> datasets.DatasetDict:
    """PEFT trains on a data set of the Hub; any text will do."""
    quotes = ["To be, or not to be", "I think, therefore I am", "All's well that ends well", "Know thyself"] * 10
    empty = [""] * len(quotes)
    columns = {"quote": quotes, "author": empty, "tags": [[] for _ in quotes]}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))


suite.load_dataset_english_quotes = some_quotes
