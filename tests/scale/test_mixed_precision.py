"""FSDP2 with `bf16`: an adapter computes, and its gradients are summed, in float32; without one accelerate decides."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from test_world_size import SPREAD
from torch.distributed.fsdp import MixedPrecisionPolicy

from fura_rl.trainer.fsdp_precision import keep_adapter_whole


@pytest.mark.slow
@pytest.mark.parametrize(("method", "dtype"), [("fura", "float32"), ("full", "bfloat16")])
def test_what_is_trained_computes_in(method, dtype, ranks):
    ranks.run(
        2, method, **SPREAD[2], method=method, rewards=["job:watching_reward"], fsdp=True, bf16=True, use_cpu=True,
        dtype="bfloat16" if method == "fura" else "float32", max_steps=1, max_grad_norm=0.0, save_strategy="no",
    )  # fmt: skip
    for rank in range(2):
        log = (ranks.folder / f"{method}_{rank}.log").read_text()
        kinds, rounded = re.search(r"seen (\[.*\]), (\d+)% of the sums are bf16 numbers", log).groups()
        assert kinds == f"['gradient torch.{dtype}', 'trained torch.{dtype}']"
        assert int(rounded) == 100 if method == "full" else int(rounded) < 50


@pytest.mark.parametrize(("mixed_precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_policy_that_was_set_stays(mixed_precision, dtype):
    def after(policy):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=policy)
        plugin.set_mixed_precision(mixed_precision)
        keep_adapter_whole(SimpleNamespace(mixed_precision=mixed_precision, state=SimpleNamespace(fsdp_plugin=plugin)))
        return plugin.mixed_precision_policy

    assert after(None) == MixedPrecisionPolicy()
    chosen = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    assert after(chosen) == chosen
